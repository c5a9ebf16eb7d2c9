"""Images to be converted into a data set: where they are read from, and what is done to each."""

import gzip
import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from di_refine.errors import InputError
from di_refine.files.datasets import label_array
from di_refine.files.image_files import ArrayFiles, ImageFiles, open_files
from torch_utils import safe_files

CIFAR_MEMBERS = [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)]
CIFAR_BYTES = 1 << 28  # of the archive, unpacked; it has 187 MB
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COLOURS = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # modes that Pillow can turn into RGB


@dataclass
class Source:
    """Images that are to be converted.

    Attributes:
        origin: where they come from, for the record; no absolute paths, which would differ between machines.
        names: names of the images, for messages.
        read: gives image number i of `names`; called from several threads.
        labels: class number or label vector of each image, or None.
        classes: what the class numbers mean, where that is known.
        notes: gives sentences about the images that were read so far, and about other files there.
        skipped: number of other files by extension.
    """

    origin: str
    names: Sequence[str]
    read: Callable[[int], Image.Image]
    labels: list[Any] | None = None
    classes: list[str] | None = None
    notes: Callable[[], list[str]] = list
    skipped: dict[str, int] = field(default_factory=dict)

    def subset(self, chosen: list[int]) -> "Source":
        """Return only the images with these numbers."""
        labels = None if self.labels is None else [self.labels[index] for index in chosen]
        names = [self.names[index] for index in chosen]
        return replace(self, names=names, read=lambda index: self.read(chosen[index]), labels=labels)

    @property
    def num_classes(self) -> int:
        """The largest class number plus one, or as many as have names; length of label vectors; 0 without labels."""
        if not self.labels:
            return 0
        if isinstance(self.labels[0], list):
            return len(self.labels[0])
        return max(max(self.labels) + 1, len(self.classes or ()))


def open_source(source: str, labels: str) -> Source:
    """Open what the setting `source` names.

    Args:
        source: a path, or the word digits.
        labels: 'auto', 'folder', 'json' or 'none'.

    Raises:
        InputError: naming the setting or file, when the source is not there, not understood, or has no such labels.
    """
    is_archive = source.lower().endswith((".tar.gz", ".tgz"))
    if source == "digits" or is_archive:
        if labels in ("folder", "json"):
            raise InputError(f"labels={labels} does not apply to source={source}, whose classes are part of it")
        opened = cifar_source(Path(source)) if is_archive else digits_source()
        if labels == "none":
            opened.labels = opened.classes = None
        return opened
    return files_source(open_files(source, "source"), labels)


def digits_source() -> Source:
    """Open scikit-learn's 1,797 handwritten digits, 8x8, with their values 0..16 stretched to 0..255.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("source=digits needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digits[{index}]" for index in range(len(pixels))]
    classes = [str(digit) for digit in range(10)]
    return Source("digits", names, lambda index: Image.fromarray(pixels[index]), digits.target.tolist(), classes)


def cifar_source(path: Path) -> Source:
    """Open the 50,000 training images of CIFAR-10 in its Python archive, in the archive's order.

    The archive is full of pickles, which `_ArrayUnpickler` reads without running anything from them.

    Raises:
        InputError: the file is missing, another one, or damaged.
    """
    pixels, labels = [], []
    try:
        with safe_files.open_regular(path) as packed:
            unpacked = gzip.GzipFile(fileobj=packed).read(CIFAR_BYTES + 1)
        if len(unpacked) > CIFAR_BYTES:
            raise ValueError(f"it unpacks to more than {CIFAR_BYTES} bytes")
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            for member in CIFAR_MEMBERS:
                file = archive.extractfile(member)
                if file is None:
                    raise ValueError(f"{member} is not a file")
                batch = _ArrayUnpickler(file, encoding="bytes").load()
                data, numbers = batch[b"data"], batch[b"labels"]
                well_formed = (
                    isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(numbers), 3072)
                )
                if not well_formed or not all(type(number) is int and 0 <= number < 10 for number in numbers):
                    raise ValueError(f"{member} holds something else than 32x32 RGB images of ten classes")
                pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
                labels += numbers
    except FileNotFoundError:
        raise InputError(f"source={path} does not exist") from None
    except (
        tarfile.TarError,
        pickle.UnpicklingError,
        zlib.error,
        EOFError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        MemoryError,
        RecursionError,
    ) as error:
        raise InputError(f"source={path} is not the CIFAR-10 Python archive, or is damaged ({error})") from None
    images = np.concatenate(pixels)
    names = [f"{CIFAR_MEMBERS[index // 10_000]}[{index % 10_000}]" for index in range(len(images))]
    return Source(path.name, names, lambda index: Image.fromarray(images[index]), labels, CIFAR_CLASSES)


class _ArrayUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]  # typeshed leaves it out
    """Reads plain Python values and numpy arrays, and refuses every other global.

    It is the one in Python: that in C makes room for as many memo entries as a single index in the file says.
    """

    _reconstruct = np.empty(0).__reduce__()[0]
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which no array needs")
        return self.ALLOWED[module, name]


def files_source(files: ImageFiles | ArrayFiles, labels: str) -> Source:
    """Open the images of a folder, a zip file or an .npz file, in the order of their names.

    Raises:
        InputError: there are not the labels that are asked for.
    """
    names = files.image_names
    source = Source(
        files.path.resolve().name,
        names,
        lambda index: files.image(names[index]),
        notes=files.notes,
        skipped=files.skipped,
    )
    if labels == "json" or (labels == "auto" and (isinstance(files, ArrayFiles) or "dataset.json" in files.names)):
        by_name = files.labels()
        if by_name is not None:
            source.labels = [by_name[name] for name in names]
            label_array(source.labels, names, files.path)
            source.classes = files.class_names()
        elif labels == "json":
            raise InputError(f"labels=json: {files.path} has no labels in a dataset.json")
    elif labels in ("folder", "auto"):
        folders = class_folders(names)
        if folders is not None and (labels == "folder" or not all(re.fullmatch(r"\d{5}", f) for f in folders)):
            source.classes = sorted(set(folders))
            number = {folder: index for index, folder in enumerate(source.classes)}
            source.labels = [number[folder] for folder in folders]
        elif labels == "folder":
            raise InputError(f"labels=folder: the images of {files.path} are not sorted into two or more folders")
    return source


def class_folders(names: Sequence[str]) -> list[str] | None:
    """Return the folder of each image at the first level where their paths part, or None if some image is in none."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = len(os.path.commonprefix([path[:-1] for path in parts]))
    if any(len(path) < depth + 2 for path in parts):
        return None
    return [path[depth] for path in parts]


def check_colour(image: Image.Image, name: str, colour: str) -> Image.Image:
    """Return the image as 8-bit greyscale or RGB.

    Args:
        image: any Pillow image.
        name: for messages.
        colour: 'keep', 'grey' or 'rgb'.

    Raises:
        InputError: when it has another mode and is to be kept, or numbers that are no colours.
    """
    if image.mode not in COLOURS:
        raise InputError(f"image {name} has Pillow mode {image.mode}, which is no colour; convert it to 8-bit RGB")
    if colour == "keep":
        if image.mode not in ("L", "RGB"):
            raise InputError(
                f"image {name} has Pillow mode {image.mode}; convert it with dataset_tool.py --grey or --rgb"
            )
        return image
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({"grey": "L", "rgb": "RGB"}[colour])


def fit(
    image: Image.Image,
    name: str,
    size: tuple[int, int] | None,
    transform: str,
    resize_filter: str,
    pad_colour: str = "black",
) -> Image.Image:
    """Bring an image to a square.

    Args:
        image: greyscale or RGB.
        name: for messages.
        size: width and height to resize to; None keeps the size. They differ for 'center-crop-wide' alone, where bars
            above and below make the square.
        transform: 'none', 'center-crop', 'center-crop-wide' or 'pad'.
        resize_filter: of Pillow.
        pad_colour: of what is added; any that Pillow knows.

    Raises:
        InputError: when it is not square and nothing is to be done about it.
    """
    width, height = image.size
    method = Image.Resampling[resize_filter.upper()]
    if transform == "center-crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif transform == "center-crop-wide" and size is not None:
        image = ImageOps.fit(image, size, method)
    elif transform == "none" and width != height:
        raise InputError(
            f"image {name} is {width}x{height}, not square; use transform=center-crop, center-crop-wide or pad"
        )
    if transform in ("center-crop-wide", "pad"):
        side = max(image.size) if size is None else size[0]
        if round(min(image.size) * side / max(image.size)) == 0:
            raise InputError(f"image {name} is {width}x{height}, too narrow for {side}x{side}; leave it out")
        return ImageOps.pad(image, (side, side), method, pad_colour)
    return image if size is None or image.size == size else image.resize(size, method)
