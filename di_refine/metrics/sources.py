"""Where the images to be measured come from: samplers over networks and over images that exist already."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from di_refine.files.datasets import ImageDataset
from di_refine.labels import LabelLaw


class ImageSampler:
    """A `Sampler` of images that exist already: image i of a data set for index i, whatever the seed.

    Args:
        dataset: the images.
        workers: threads that decode images, one batch ahead of what is asked for.
    """

    def __init__(self, dataset: ImageDataset, workers: int = 2):
        self.dataset = dataset
        self.num_images: int | None = len(dataset)
        self.law: LabelLaw | None = None
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
