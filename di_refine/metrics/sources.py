"""Where the images to be measured come from: samplers over networks and over images that exist already."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.generators import NetworkSampler, load_sampler


class ImageSampler:
    """A `Sampler` of images that exist already: image i of a data set for index i, whatever the seed.

    Args:
        dataset: the images.
        workers: threads that decode images, one batch ahead of what is asked for.
    """

    def __init__(self, dataset: ImageDataset, workers: int = 2):
        self.dataset = dataset
        self.num_images: int | None = len(dataset)
        self.resolution, self.num_channels, self.label_dim = dataset.resolution, dataset.num_channels, dataset.label_dim
        self._workers = max(workers, 1)
        self._pool = ThreadPoolExecutor(self._workers)
        self._ahead: dict[range, list[Future]] = {}

    def __call__(self, first_index: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return uint8 images [count, C, R, R], and labels [count, label_dim] or None without labels.

        Raises:
            InputError: naming the image, when one is damaged.
        """
        wanted = range(first_index, first_index + count)
        parts = self._ahead.pop(wanted, None) or self._request(wanted)
        following = range(wanted.stop, min(wanted.stop + count, len(self.dataset)))
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
    **settings: Any,
) -> NetworkSampler:
    """Make a sampler over the network in a file.

    Args:
        path: a StyleGAN2 or EDM pickle.
        labels: which classes it draws: 'uniform', 'dataset' (as frequent as in `dataset`), or a class number.
        dataset: see `labels`.
        settings: further arguments of `di_refine.generators.load_sampler`.

    Raises:
        InputError: a setting does not suit the network; the message names it.
    """
    sampler = load_sampler(path, **settings)
    if labels == "dataset":
        if dataset is None or not dataset.has_labels:
            raise InputError("labels=dataset needs `data` with labels")
        if dataset.label_dim != sampler.label_dim:
            raise InputError(f"labels=dataset: `data` has {dataset.label_dim} classes, {path} {sampler.label_dim}")
        sampler.class_probs = dataset.class_frequencies()
    elif labels != "uniform":
        if not labels.isdecimal():
            raise InputError(f"`labels` must be uniform, dataset or a class number, not {labels!r}")
        if int(labels) >= sampler.label_dim:
            raise InputError(f"labels={labels}: {path} has {sampler.label_dim} classes, counted from 0")
        sampler.label = int(labels)
    return sampler
