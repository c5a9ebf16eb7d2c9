"""Image data sets in the layout of the StyleGAN family, and training batches from them.

A data set is a zip file or a folder of images, PNG as a rule, in sub-folders or not, with an optional `dataset.json`:

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 9], ...]}

A label is a class number or a list of numbers; `"labels": null` means there are none. `"classes"` may be a list of the
names of classes, or of the numbers in a list. Other keys are ignored.
"""

import copy
import functools
import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from di_refine import terminal
from di_refine.errors import InputError
from di_refine.files import decoding
from di_refine.files.image_files import DamagedImages, open_files, reason
from di_refine.labels import DATASET, LabelLaw
from torch_utils import distributed
from torch_utils.misc import derive_seed

MAX_CLASSES = 100_000  # one-hot labels of more would not fit anywhere, so a larger number is a mistake in the file
MEMORY_LIMIT = 2 << 30  # bytes of decoded images kept in memory


def label_array(values: Sequence[Any], names: Sequence[str], path: Path) -> np.ndarray:
    """Return class numbers [N] as int64, or label vectors [N, L] as float32.

    Args:
        values: of `dataset.json`.
        names: of the images, for messages.
        path: of the data set, for messages.

    Raises:
        InputError: they are neither.
    """
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        if wrong := next(((n, v) for n, v in zip(names, numbers) if not 0 <= v < MAX_CLASSES), None):
            raise InputError(
                f"{path}: dataset.json gives {wrong[0]} the label {wrong[1]}; class numbers are 0 to {MAX_CLASSES - 1}"
            )
        return np.array(numbers, np.int64)
    vectors: np.ndarray
    try:
        found = np.array(values)
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            vectors = found.astype(np.float32) if found.dtype.kind in "fiu" else np.empty(0)
    except (ValueError, TypeError, OverflowError):
        vectors = np.empty(0)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise InputError(f"{path}: labels in dataset.json must be all class numbers, or all vectors of one length")
    return vectors


def absent_classes(counts: Sequence[int] | np.ndarray, names: Sequence[str] | None = None) -> str | None:
    """Say which classes have no image; None where all have some.

    Args:
        counts: images of each class.
        names: of the classes, where they have any.
    """
    absent = [
        f"{number} ({names[number]})" if names and number < len(names) else str(number)
        for number, count in enumerate(counts)
        if count == 0
    ]
    if not absent:
        return None
    shown = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
    return f"no image of class{'es' * (len(absent) > 1)} {shown} of {len(counts)}"


class ImageDataset:
    """Square images of one size with optional labels.

    Args:
        path: a zip file or folder in the layout of this module's docstring, or an .npz file as `ArrayFiles` reads it.
        mirror: append a left-right mirrored copy of every image, which doubles the data set.
        setting: the name of the setting that holds the path, for messages.

    Raises:
        InputError: there are no images, a header is damaged, images differ in size or channels, are not square, are
            neither 8-bit greyscale nor RGB, or the labels do not fit; the message names the first file at fault.
    """

    def __init__(self, path: str | os.PathLike, mirror: bool = False, setting: str = "data"):
        self.files = open_files(path, setting)
        self.path, self.mirror, self.setting = self.files.path, mirror, setting
        self._names = self.files.image_names
        self.resolution, self.num_channels = self._check_headers()
        self._labels = self._read_labels()
        if distributed.is_first():
            for note in self.files.notes():
                terminal.say(f"note: {self.path}: {note}")
        #: Number of classes (largest class number plus one, or as many as have names) or length of the label vectors; 0
        #: without labels.
        self.label_dim = self._labels.shape[1] if self._labels.ndim == 2 else int(self._labels.max()) + 1
        names = self.files.class_names() if self.label_dim else None
        if names and self._labels.ndim == 1:
            self.label_dim = max(self.label_dim, min(len(names), MAX_CLASSES))
            names = [*names, *("" for _ in range(self.label_dim - len(names)))]
        #: What class numbers, or the numbers in label vectors, mean; empty where the data set does not say.
        self.class_names = tuple(names) if names and len(names) == self.label_dim else ()

    def _check_headers(self) -> tuple[int, int]:
        headers = {}
        faults: dict[str, str] = {}
        for name in self._names:
            try:
                headers[name] = self.files.header(name)
            except DamagedImages as error:
                faults |= error.faults
        if faults:
            raise DamagedImages(self.path, faults)
        first = self._names[0]
        size, mode = headers[first]
        if size[0] != size[1]:
            raise InputError(f"{self.path}: image {first} is {size[0]}x{size[1]}, not square; see dataset_tool.py")
        if mode not in ("L", "RGB"):
            raise InputError(
                f"{self.path}: image {first} has Pillow mode {mode}, neither 8-bit greyscale nor RGB; convert it with "
                "dataset_tool.py --rgb"
            )
        for name in self._names[1:]:
            other_size, other_mode = headers[name]
            if other_size != size:
                sizes = [f"{width}x{height}" for width, height in (other_size, size)]
                raise InputError(
                    f"{self.path}: image {name} is {sizes[0]} but {first} is {sizes[1]}; bring them to one size with "
                    "dataset_tool.py --resolution"
                )
            if other_mode != mode:
                raise InputError(
                    f"{self.path}: image {name} has Pillow mode {other_mode} but {first} has {mode}; convert them with "
                    "dataset_tool.py --grey or --rgb"
                )
        return size[0], 1 if mode == "L" else 3

    def _read_labels(self) -> np.ndarray:
        """Return class numbers [N] as int64, label vectors [N, L] as float32, or without labels [N, 0]."""
        labels = self.files.labels()
        if labels is None:
            return np.zeros([len(self._names), 0], np.float32)
        return label_array([labels[name] for name in self._names], self._names, self.path)

    def __len__(self) -> int:
        return len(self._names) * (2 if self.mirror else 1)

    @property
    def name(self) -> str:
        """The file's name without folder and extension."""
        return self.path.stem

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def has_classes(self) -> bool:
        """Whether the labels are class numbers or one-hot vectors."""
        if self._labels.ndim == 1:
            return True
        return self.has_labels and bool((np.sort(self._labels) == np.eye(self.label_dim)[-1]).all())

    def class_counts(self) -> np.ndarray:
        """Return the number of images of each class, int64 [label_dim] (empty without labels).

        Raises:
            InputError: the labels are vectors other than one-hot, so they have no classes.
        """
        if not self.has_labels:
            return np.zeros(0, np.int64)
        if not self.has_classes:
            raise InputError(f"{self.setting}={self.path}: its labels are vectors, so it has no classes to count")
        if self._labels.ndim != 1:
            return self._labels.sum(axis=0, dtype=np.float64).astype(np.int64)
        return np.bincount(self._labels, minlength=self.label_dim)

    def class_numbers(self) -> np.ndarray:
        """Return the class of each image, int64 [len(self)]; needs `has_classes`."""
        numbers = self._labels if self._labels.ndim == 1 else self._labels.argmax(axis=1)
        return np.tile(numbers, 2) if self.mirror else numbers

    def label_law(self) -> LabelLaw:
        """Return the law that draws labels as often as images have them."""
        about: dict[str, Any] = {"names": self.class_names, "origin": DATASET, "where": str(self.path)}
        if self.has_labels and not self.has_classes:
            return LabelLaw.of_rows(self._labels, **about)
        return LabelLaw(self.label_dim, self.class_counts().astype(np.float64), **about)

    def check_compatible(
        self, resolution: int, num_channels: int, label_dim: int | None = None, what: str = "network"
    ) -> None:
        """Check that the images suit a network.

        Args:
            resolution: the network's.
            num_channels: the network's.
            label_dim: the network's, or None where labels do not matter. 0 accepts any data set.
            what: a name for the network, for the message.

        Raises:
            InputError: they do not; the message says what differs.
        """
        mine, wanted = (self.resolution, self.num_channels), (resolution, num_channels)
        if mine != wanted:
            raise InputError(
                f"{self.setting}={self.path} holds {mine[0]}x{mine[0]} images with {mine[1]} channel(s), but the "
                f"{what} has {wanted[0]}x{wanted[0]} with {wanted[1]}; convert the data with dataset_tool.py"
            )
        if label_dim and label_dim != self.label_dim:
            raise InputError(
                f"{self.setting}={self.path} has {self.label_dim} classes, but the {what} is conditional on {label_dim}"
            )

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode images.

        Returns:
            uint8 [N, C, H, W].

        Raises:
            DamagedImages: pixels of some are damaged.
        """
        shape = [len(indices), self.num_channels, self.resolution, self.resolution]
        images = np.empty(shape, np.uint8)
        faults: dict[str, str] = {}
        for row, index in enumerate(indices):
            try:
                pixels = np.asarray(self.files.image(self._names[index % len(self._names)]))
            except DamagedImages as error:
                faults |= error.faults
                continue
            images[row] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            if index >= len(self._names):
                images[row] = images[row, :, :, ::-1]
        if faults:
            raise DamagedImages(self.path, faults)
        return images

    def labels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return one-hot labels, or the label vectors: float32 [N, label_dim]."""
        rows = self._labels[np.asarray(indices, np.int64) % len(self._names)]
        if rows.ndim == 2:
            return rows
        one_hot = np.zeros([len(rows), self.label_dim], np.float32)
        one_hot[np.arange(len(rows)), rows] = 1
        return one_hot

    def decode_all(self, workers: int = 4) -> np.ndarray:
        """Return all images, uint8 [len(self), C, H, W], decoded by `workers` threads.

        Raises:
            DamagedImages: pixels of some are damaged.
        """
        count = len(self._names)
        images = np.empty([len(self), self.num_channels, self.resolution, self.resolution], np.uint8)

        def decode(start: int) -> dict[str, str]:
            try:
                images[start : min(start + 512, count)] = self.images(range(start, min(start + 512, count)))
            except DamagedImages as error:
                return error.faults
            return {}

        with ThreadPoolExecutor(max(workers, 1)) as pool:
            faults = {name: fault for part in pool.map(decode, range(0, count, 512)) for name, fault in part.items()}
        if faults:
            raise DamagedImages(self.path, faults)
        if self.mirror:
            images[count:] = images[:count, :, :, ::-1]
        return images

    def content_hash(self) -> str:
        """Return the SHA-256 of all that images and labels depend on: names, files, labels and `mirror`.

        It changes with the rules by which pictures are read, too.
        A zip file and a folder with the same content have the same hash.

        Raises:
            DamagedImages: a file cannot be read to its end.
        """
        digest = hashlib.sha256(f"reading={decoding.VERSION};mirror={self.mirror};".encode())
        digest.update(self._labels.tobytes())
        for name in self._names:
            content = hashlib.sha256()
            try:
                with self.files.open(name) as file:
                    while block := file.read(1 << 20):
                        content.update(block)
            except InputError:
                raise
            except Exception as error:  # see `ImageFiles.image`
                raise DamagedImages(self.path, {name: reason(error)}) from None
            digest.update(name.encode() + b"\0" + content.digest())
        return digest.hexdigest()


def sample_order(length: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return which images come at positions `start`, `start` + 1, ... of an endless shuffled stream: int64 [count].

    Each epoch is one permutation that depends on `seed` and the epoch's number alone, so a run that is resumed at any
    position continues exactly where it would have been.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, length)
        order = np.random.default_rng(derive_seed(seed, "data order", epoch)).permutation(length)
        parts.append(order[offset : offset + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


def batches(
    dataset: ImageDataset,
    batch: int,
    seed: int,
    start_nimg: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 2,
    mirror: bool = False,
    rank: int = 0,
    world_size: int = 1,
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give training batches without end, in an order that is a function of `seed` and the number of images seen.

    A data set that fits into memory is decoded once; a larger one is decoded ahead by worker processes.

    Args:
        dataset: where the images come from.
        batch: images per batch and process.
        seed: seed of the order; it is the same in all processes.
        start_nimg: images seen so far by all processes together.
        device: where the batches are put.
        workers: threads for decoding at once, or worker processes for decoding as needed.
        mirror: use the data set with mirrored images even if it was opened without.
        rank: number of this process.
        world_size: number of processes; each gets its own share of every step's images.
        memory_limit: bytes of decoded images that count as fitting.

    Yields:
        uint8 images [batch, C, H, W] and float32 labels [batch, label_dim], on `device`.

    Raises:
        InputError: an image is damaged; the message names it.
    """
    if mirror and not dataset.mirror:
        dataset = copy.copy(dataset)
        dataset.mirror = True
    order = _Order(len(dataset), batch, seed, start_nimg, rank, world_size)
    fits = len(dataset) * dataset.num_channels * dataset.resolution**2 <= memory_limit
    source = (_from_memory if fits else _from_workers)(dataset, order, workers)
    device = torch.device(device)
    for images, labels in source:
        if device.type == "cuda":  # only pinned memory is copied without waiting
            images, labels = images.pin_memory(), labels.pin_memory()
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class Stream:
    """A data set as trainers want it: `stream(start_nimg)` gives batches and labels from that image on.

    Each of several processes gets its share of the batch.

    Args:
        dataset: where the images come from.
        batch: images per batch of all processes together.
        seed, device, workers: as for `batches`.
        labels: give labels, or drop them.
        as_float: give float images in [-1, 1] instead of uint8.

    Attributes:
        seconds: spent waiting for images so far.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch: int,
        seed: int,
        device: torch.device | str,
        workers: int,
        labels: bool = True,
        as_float: bool = True,
    ):
        self._dataset, self._batch, self._seed = dataset, batch, seed
        self._device, self._workers = device, workers
        self._labels, self._as_float = labels and dataset.has_labels, as_float
        self.seconds = 0.0

    @functools.cached_property
    def labels(self) -> LabelLaw:
        """The law of the data's labels."""
        return self._dataset.label_law() if self._labels else LabelLaw(0)

    @property
    def class_frequencies(self) -> np.ndarray | None:
        """The share of each class, `[label_dim]`; None without labels, and where they are vectors."""
        return self.labels.class_frequencies if self._labels else None

    def draw_labels(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Labels `[n, label_dim]` for generated images, drawn as often as the data have them."""
        return self.labels.draw(n, rng)

    def __call__(self, start_nimg: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Give images `[share, C, R, R]` and labels `[share, label_dim]` without end."""
        rank, size = distributed.rank(), distributed.world_size()
        source = batches(
            self._dataset,
            self._batch // size,
            self._seed,
            start_nimg,
            self._device,
            self._workers,
            rank=rank,
            world_size=size,
        )
        while True:
            clock = time.monotonic()
            images, labels = next(source)
            self.seconds += time.monotonic() - clock
            images = images.float() / 127.5 - 1 if self._as_float else images
            yield images, labels if self._labels else labels[:, :0]


class _Order:
    """The index arrays of one process, [batch] each, without end."""

    def __init__(self, length: int, batch: int, seed: int, start: int, rank: int, world_size: int):
        self.length, self.batch, self.seed, self.start = length, batch, seed, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        step = self.batch * self.world_size
        mine = slice(self.rank * self.batch, (self.rank + 1) * self.batch)
        ahead = max(step, min(self.length, 1 << 16))  # permuting once for many batches
        position, ready = self.start, np.empty(0, np.int64)
        while True:
            if len(ready) < step:
                ready = np.concatenate([ready, sample_order(self.length, self.seed, position + len(ready), ahead)])
            yield ready[:step][mine]
            position, ready = position + step, ready[step:]


def _from_memory(dataset: ImageDataset, order: _Order, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.from_numpy(dataset.decode_all(workers))
    for indices in order:
        yield images[torch.from_numpy(indices)], torch.from_numpy(dataset.labels(indices))


class _Fetch(torch.utils.data.Dataset):
    """Batches for worker processes. An error comes back as a value: a DataLoader would bury it in a traceback text."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | InputError:
        try:
            return torch.from_numpy(self.dataset.images(indices)), torch.from_numpy(self.dataset.labels(indices))
        except InputError as error:
            return error


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and batch systems signal all processes at once, and a parent who wants to save first needs its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _from_workers(dataset: ImageDataset, order: _Order, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    loader = torch.utils.data.DataLoader(
        _Fetch(dataset), sampler=order, batch_size=None, num_workers=workers, worker_init_fn=_leave_signals_to_parent
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item
