"""What a training says before it begins: its data, networks, device and plan."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from di_refine.files import pictures
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.evaluate import Evaluator
from di_refine.runs.config import LoopConfig

MAX_CLASSES = 10  # that a line lists, and a picture has rows for
COLUMNS = 10  # of the picture of real images

_LEVEL = re.compile(r"(?:^|\.)b(\d+)\.|(?:^|\.)(\d+)x\2_")


@dataclass(frozen=True)
class Overview:
    """What there is to say of a training.

    Attributes:
        networks: those that take part, by what they are.
        batch: images per update.
        device: where they are.
        precision: of their arithmetic.
        dataset: the images that are read, if any are.
        notes: further sentences, after the networks.
    """

    networks: Mapping[str, torch.nn.Module]
    batch: int
    device: torch.device
    precision: str = "fp32"
    dataset: ImageDataset | None = None
    notes: Sequence[str] = ()

    def lines(self, loop: LoopConfig, warmup: int, evaluator: Evaluator | None) -> list[str]:
        """Sentences to print.

        Args:
            loop: the settings of the loop.
            warmup: images at the start during which the generator does not change.
            evaluator: what measures snapshots.
        """
        found = [] if self.dataset is None else [of_data(self.dataset)]
        found += [f"{name}: {of_network(net)}" for name, net in self.networks.items()]
        found += self.notes
        threads = f", threads: {torch.get_num_threads()}" if self.device.type == "cpu" else ""
        found.append(f"device: {self.device}{threads}, {self.precision}")
        return [*found, self._plan(loop, warmup, evaluator)]

    def _plan(self, loop: LoopConfig, warmup: int, evaluator: Evaluator | None) -> str:
        updates = math.ceil(loop.total_nimg / self.batch)
        parts = [f"{loop.kimg:g} kimg in {updates:,} updates of {self.batch} images"]
        if warmup:
            parts.append(f"the generator moves after {warmup / 1000:g} kimg")
        measured = "" if evaluator is None else f", and measured by {', '.join(spec.name for spec in evaluator.specs)}"
        parts.append(f"a network is saved every {loop.tick * loop.snap:g} kimg{measured}")
        if loop.max_minutes:
            parts.append(f"it stops after {loop.max_minutes:g} minutes in any case")
        return "plan: " + "; ".join(parts)

    def draw_reals(self, path: Path) -> None:
        """Draw images of the data set, where there is one: a row for each of up to ten classes, with its name."""
        dataset = self.dataset
        if dataset is None:
            return
        titles: pictures.Titles = ((), ())
        if dataset.has_labels and dataset.has_classes:
            classes = dataset.class_numbers()
            shown = np.unique(classes)[:MAX_CLASSES]
            members = [_spread(np.flatnonzero(classes == number), COLUMNS) for number in shown]
            # A class of fewer images repeats them, so that every row is of one class.
            chosen = np.concatenate([np.resize(numbers, COLUMNS) for numbers in members])
            labels = torch.from_numpy(dataset.labels(chosen))
            titles = dataset.label_law().titles(labels, COLUMNS, pictures.is_drawable)
        else:
            chosen = _spread(np.arange(len(dataset)), COLUMNS * MAX_CLASSES)
        scale = pictures.enlargement(dataset.resolution, pictures.CELL)
        pictures.save_grid(path, dataset.images(chosen), COLUMNS, scale, titles=titles)


def of_data(dataset: ImageDataset) -> str:
    """A data set in one line: its images, and its classes with how many images each has."""
    size, channels = dataset.resolution, dataset.num_channels
    depth = f"{channels} channel{'s' if channels > 1 else ''}"
    line = f"data: {dataset.path}, {len(dataset):,} images of {size}x{size} pixels and {depth}"
    if not dataset.has_labels:
        return f"{line}, without labels"
    if not dataset.has_classes:
        return f"{line}, with vectors of {dataset.label_dim} numbers as labels"
    law, counts = dataset.label_law(), dataset.class_counts()
    named = [f"{law.title(number)} {count:,}" for number, count in enumerate(counts[:MAX_CLASSES])]
    more = f" and {len(counts) - MAX_CLASSES} more" if len(counts) > MAX_CLASSES else ""
    return f"{line}, {len(counts)} classes: {', '.join(named)}{more}"


def of_network(net: torch.nn.Module) -> str:
    """How many parameters a network has, and how many of them at which resolution."""
    counts: Counter[int] = Counter()
    for name, parameter in net.named_parameters():
        level = _LEVEL.search(name)
        counts[int(level[1] or level[2]) if level else 0] += parameter.numel()
    levels = [f"{size}x{size} {counts[size]:,}" for size in sorted(counts, reverse=True) if size]
    inner = f" ({', '.join([*levels, f'others {counts[0]:,}'])})" if levels else ""
    return f"{sum(counts.values()):,} parameters{inner}"


def _spread(numbers: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the numbers, evenly spaced."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.arange(most) * len(numbers) // most]
