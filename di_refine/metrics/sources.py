"""Where the images to be measured come from: samplers over networks and over images that exist already."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset


class ImageSampler:
    """Images that exist already, as a sampler: image i of the data set for index i, whatever the seed.

    Args:
        dataset: the images.
        workers: threads that decode, one batch ahead of what is asked for.
    """

    def __init__(self, dataset: ImageDataset, workers: int = 2):
        self.dataset = dataset
        self.num_images = len(dataset)
        self.resolution, self.num_channels, self.label_dim = dataset.resolution, dataset.num_channels, dataset.label_dim
        self._workers = max(workers, 1)
        self._pool = ThreadPoolExecutor(self._workers)
        self._ahead: dict[range, list[Future]] = {}

    def __call__(self, first_index: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 images [count, C, H, W] and one-hot labels [count, L], or None without labels."""
        wanted = range(first_index, first_index + count)
        parts = self._ahead.pop(wanted, None) or self._request(wanted)
        following = range(wanted.stop, min(wanted.stop + count, self.num_images))
        self._ahead = {following: self._request(following)} if following else {}
        images = np.concatenate([part.result() for part in parts])
        labels = torch.from_numpy(self.dataset.labels(wanted)) if self.label_dim else None
        return torch.from_numpy(images), labels

    def _request(self, wanted: range) -> list[Future]:
        share = -(-len(wanted) // self._workers)
        parts = (wanted[i : i + share] for i in range(0, len(wanted), share))
        return [self._pool.submit(self.dataset.images, part) for part in parts]


def network_sampler(
    path: str | os.PathLike,
    labels: str = "uniform",
    dataset: ImageDataset | None = None,
    truncation: float = 1.0,
    **settings,
):
    """A sampler over the network in a file, which asks for classes as `--labels` says.

    Args:
        path: a StyleGAN2 or EDM pickle.
        labels: 'uniform', 'dataset' (as frequent as in `dataset`), or a class number.
        dataset: see `labels`.
        truncation: of StyleGAN2 generators.
        settings: further arguments of `di_refine.generators.load_sampler`.

    Raises:
        InputError: naming the option that does not suit the network.
    """
    from di_refine.generators import load_sampler  # builds networks: not needed for images alone

    sampler = load_sampler(path, truncation=truncation, **settings)
    if truncation != 1 and sampler.is_diffusion:
        raise InputError(f"--truncation is for StyleGAN2 generators, and {path} is a diffusion network")
    if labels == "dataset":
        if dataset is None or not dataset.has_labels:
            raise InputError("--labels=dataset needs --data with labels")
        if dataset.label_dim != sampler.label_dim:
            raise InputError(f"--labels=dataset: --data has {dataset.label_dim} classes, {path} {sampler.label_dim}")
        sampler.class_probs = dataset.class_frequencies()
    elif labels != "uniform":
        if not labels.isdecimal():
            raise InputError(f"--labels must be uniform, dataset or a class number, not {labels!r}")
        if int(labels) >= sampler.label_dim:
            raise InputError(f"--labels={labels}: {path} has {sampler.label_dim} classes, counted from 0")
        sampler.label = int(labels)
    return sampler


def snapshots(folder: Path) -> list[Path]:
    """The networks in a run directory, by their number of images.

    Raises:
        InputError: there are none.
    """
    found = sorted(folder.glob("network-snapshot-*.pkl"))
    if not found:
        raise InputError(f"--network={folder}: a folder without network-snapshot-*.pkl is no run directory")
    return found
