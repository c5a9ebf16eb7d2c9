"""Data sets are written here: zip files of PNG images with labels, as `di_refine.files.datasets` reads them.

The same pictures and labels give the same file, byte for byte, on every day and system.
"""

import contextlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from PIL import Image

from di_refine.errors import InputError

T = TypeVar("T")


@dataclass
class Picture:
    """An image as a PNG file.

    Attributes:
        name: for messages.
        size: (width, height), which must be the same for all images of a data set.
        mode: of Pillow, which must be the same for all, too.
        png: the content of the file.
    """

    name: str
    size: tuple[int, int]
    mode: str
    png: bytes

    @staticmethod
    def encode(image: Image.Image, name: str) -> "Picture":
        """Encode the pixels alone, without the colour profile and text that Pillow would write along."""
        file = io.BytesIO()
        Image.frombytes(image.mode, image.size, image.tobytes()).save(file, format="PNG", compress_level=6)
        return Picture(name, image.size, image.mode, file.getvalue())


def map_in_order(function: Callable[[Any], T], items: Iterable[Any], ahead: int = 256) -> Iterator[T]:
    """Map as `map` does, in order, but by several threads, taking `ahead` items at a time."""
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(items, ahead)):
            yield from pool.map(function, chunk)


def write_archive(
    file: IO[bytes],
    pictures: Iterable[Picture],
    labels: Sequence[int] | Sequence[list[float]] | None,
    record: dict[str, Any],
    classes: Sequence[str] | None = None,
) -> Picture:
    """Write the zip file of a data set.

    Args:
        file: the file to write to.
        pictures: the images, in order.
        labels: class number or label vector of each image. It is read after the last picture, so whoever makes the
            pictures may fill the list.
        record: how the images came about; it is kept in `dataset.json` under "conversion".
        classes: what the class numbers mean; kept under "classes", and the images of each under "class_counts".

    Returns:
        The first picture.

    Raises:
        InputError: naming the first image whose size or colour differs from those before it.
    """
    first: Picture | None = None
    written: list[str] = []
    with zipfile.ZipFile(file, "w") as archive:
        for index, picture in enumerate(pictures):
            first = first or picture
            if picture.size != first.size:
                raise InputError(
                    f"image {picture.name} is {picture.size[0]}x{picture.size[1]} but {first.name} is "
                    f"{first.size[0]}x{first.size[1]}; bring them to one size with `resolution`"
                )
            if picture.mode != first.mode:
                raise InputError(
                    f"image {picture.name} has Pillow mode {picture.mode} but {first.name} has {first.mode}; convert "
                    "them with dataset_tool.py --grey or --rgb"
                )
            written.append(f"{index // 1000:05d}/img{index:08d}.png")
            archive.writestr(_entry(written[-1]), picture.png)
        pairs = None if labels is None else [list(pair) for pair in zip(written, labels)]
        counts = class_counts(labels, classes)
        known = {"classes": classes, "class_counts": counts}
        content = {"labels": pairs, **{key: value for key, value in known.items() if value}, "conversion": record}
        archive.writestr(_entry("dataset.json"), json.dumps(content))
    if first is None:
        raise ValueError("a data set has at least one picture")
    return first


def class_counts(labels: Sequence[Any] | None, classes: Sequence[str] | None = None) -> list[int]:
    """Return the number of images of each class; [] where there are no labels, or they are vectors.

    Args:
        labels: of the images.
        classes: names of the classes, some of which may have no image.
    """
    if not labels or not isinstance(labels[0], int):
        return []
    counts = Counter(labels)
    return [counts[number] for number in range(max(max(counts) + 1, len(classes or ())))]


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a zip entry that is the same on every day and system."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, zipfile.ZIP_STORED
    return entry


@contextlib.contextmanager
def new_folders(path: Path) -> Iterator[None]:
    """Create a folder and its parents for the block, and remove them again if it fails."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def project_version() -> str:
    """Return this project's name and version, for records."""
    try:
        return f"di-refine {metadata.version('di-refine')}"
    except metadata.PackageNotFoundError:  # run from a checkout
        return "di-refine 0.1.0"
