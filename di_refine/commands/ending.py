"""What `refine.py` and `distill.py` say at the end: a table with a verdict, and a picture."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from di_refine import terminal
from di_refine.commands.comparison import Comparison, verdict
from di_refine.commands.job import Job
from di_refine.commands.training import end, unless_interrupted
from di_refine.files import diffusers_folder, networks, pictures
from di_refine.files.datasets import ImageDataset
from di_refine.generators import NetworkSampler
from di_refine.labels import LabelLaw
from di_refine.metrics import compare
from di_refine.runs import checkpoint, stopping
from di_refine.runs.directory import RunDirectory
from di_refine.runs.loop import Loop, Snapshot
from di_refine.trainer import Trainer
from torch_utils import distributed

DRAWING_SECONDS = 15.0  # after which a picture in the course of a training gets no further row

COLUMNS = 10
"""Of the picture that compares before and after; they are classes where there are any."""


def finish(job: Job, loop: Loop, trainer: Trainer, comparison: Comparison) -> None:
    """Measure what the table compares, draw the picture, close the directory, and print table, verdict and result.

    Args:
        job: what was trained.
        loop: which has ended.
        trainer: which the loop drove.
        comparison: of the run, whose beginning is measured.
    """
    directory, net = comparison.directory, trainer.ema.net

    def work() -> list[dict[str, Any]]:
        comparison.finish(loop, net)
        summaries = comparison.summaries()
        if distributed.is_first():
            _before_after(job, directory.files.before_after, loop, summaries, net)
            directory.picture("before_after", directory.files.before_after, trainer.nimg)
            if job.subject.writes_diffusers:
                with checkpoint.saving(directory.files.diffusers):
                    diffusers_folder.save(job.snapshot(trainer), directory.files.diffusers)
                directory.log(f"wrote {directory.files.diffusers}, which diffusers opens")
        return summaries

    summaries = unless_interrupted(loop, directory, work) or []  # who sends a signal does not want to wait
    end(directory, _result(job, loop, summaries, directory) if distributed.is_first() else {})


def class_grid(
    sampler: NetworkSampler, rows: int = 8, seconds: float | None = None
) -> tuple[torch.Tensor, pictures.Titles]:
    """Samples from fixed latents, uint8 `[columns(law) rows, C, R, R]`, and titles of the columns.

    The columns are classes where there are any; those that are never drawn are left out.

    Args:
        sampler: makes them.
        rows: how many.
        seconds: begin no further row after so long, as a large diffusion model takes minutes for all; None for no
            limit.

    Raises:
        stopping.Interrupted: inside a loop, when a signal asks it to stop.
    """
    start, law, parts = time.monotonic(), sampler.law, []
    width = columns(law)
    with terminal.progress(rows, "drawing", "rows", check=stopping.check) as bar:
        for row in range(rows):
            if row and seconds is not None and time.monotonic() - start > seconds:
                break
            seeds = list(range(width * row, width * (row + 1)))
            classes = _column_classes(law)
            labels = law.of_seeds(seeds) if classes is None else torch.eye(law.label_dim)[classes]
            parts.append((pictures.to_uint8(sampler.images(seeds, labels)), labels))
            bar.update()
    images, all_labels = (torch.cat(part) for part in zip(*parts))
    return images, law.titles(all_labels, width, pictures.is_drawable)


def _column_classes(law: LabelLaw) -> list[int] | None:
    """The class of each column; None where there are no classes."""
    if not (law.label_dim and law.has_classes):
        return None
    present = law.present
    if len(present) > COLUMNS:
        return [present[column * len(present) // COLUMNS] for column in range(COLUMNS)]
    return present * (COLUMNS // len(present))  # each as often


def columns(law: LabelLaw) -> int:
    """How many columns `class_grid` has: ten, or fewer where each class then has as many."""
    return len(_column_classes(law) or range(COLUMNS))


def real_images(dataset: ImageDataset, law: LabelLaw, rows: int) -> np.ndarray:
    """Images of a data set in the columns of `class_grid`, uint8 `[columns(law) rows, C, R, R]`."""
    classes, numbers = _column_classes(law), np.arange(len(dataset))
    members: dict[int | None, Iterator[int]] = {
        None: itertools.cycle(numbers[:: max(len(numbers) // (rows * columns(law)), 1)].tolist())
    }
    if classes is None or not (dataset.has_labels and dataset.has_classes):
        return dataset.images(list(itertools.islice(members[None], rows * columns(law))))
    of_images = dataset.class_numbers()
    members |= {number: itertools.cycle(np.flatnonzero(of_images == number).tolist()) for number in set(classes)}
    return dataset.images([next(members[number], 0) for _ in range(rows) for number in classes])


def save_class_grid(path: Path, sampler: NetworkSampler) -> None:
    """Write `class_grid` as a picture in which small images are enlarged; what is slow has fewer rows."""
    samples, titles = class_grid(sampler, seconds=DRAWING_SECONDS)
    pictures.save_grid(
        path,
        samples,
        columns(sampler.law),
        scale=pictures.enlargement(sampler.resolution, pictures.CELL),
        titles=titles,
    )


def _before_after(job: Job, path: Path, loop: Loop, summaries: list[dict[str, Any]], net: torch.nn.Module) -> None:
    """Draw the original and the best network, beside images of the data set where there is one."""
    best, original = loop.best or Snapshot(0, None), job.subject.file.average
    drawn = net if best.path is None or best is loop.last else networks.load(best.path).average
    rows = job.subject.rows
    panels: list[tuple[str, pictures.Images]] = []
    width = columns(job.labels)
    for row, title, which in (
        (rows["original"], f"{rows['original']}: {job.subject.file.path.stem}", original),
        (rows["best"], f"{rows['best']}, {best.nimg / 1000:g} kimg", drawn),
    ):
        samples, titles = class_grid(job.sampler(which, "const"))
        found = next((summary for summary in summaries if summary["source"] == row), None)
        key, mean = next(iter(found["results"].items())) if found else ("", 0.0)
        value = f"\n{key} {compare.number(mean, found['sd'].get(key))}" if found else ""
        panels.append((f"{title}{value}", samples))
    if job.dataset is not None:
        panels.insert(0, ("real", real_images(job.dataset, job.labels, len(panels[0][1]) // width)))
    pictures.save_side_by_side(path, panels, columns=width, titles=titles)


def _result(job: Job, loop: Loop, summaries: list[dict[str, Any]], directory: RunDirectory) -> dict[str, Any]:
    """Print the table, say the verdict, and return the JSON result."""
    last, best = (snapshot or Snapshot(0, None) for snapshot in (loop.last, loop.best))  # none yet: an early signal
    result: dict[str, Any] = {
        "run_dir": directory.path,
        "snapshot": last.path,
        "best_snapshot": best.path,
        "images_per_sec": loop.images_per_sec,
        "kimg": loop.trainer.nimg / 1000,
        "stopped": loop.stopped,
        "labels": job.labels.described,
    }
    if summaries:
        rows, header, legend = compare.table(summaries)
        terminal.table(rows, header)
        for line in legend:
            terminal.show(line)
        margins = [record["score_margin"] for record in directory.stats() if record.get("score_margin") is not None]
        sentences = verdict(job, loop, summaries, margins)
        for sentence in sentences:
            directory.log(sentence)
        means: dict[str, dict[str, float]] = {}
        for summary in summaries:
            means.setdefault(summary["source"], {}).update(summary["results"])
        first = next(iter(means[job.subject.rows["original"]]))
        values = {key: means[row][first] for key, row in job.subject.rows.items()}
        best_row = job.subject.rows["best"]
        changed = next(item for item in summaries if item["source"] == best_row and first in item["results"])
        result = {
            "metric": first,
            **values,
            "change": changed["delta"][first],
            "change_interval": changed["delta_interval"].get(first),
            "verdict": sentences,
            **result,
            "all": means,
        }
    return result
