"""Convert images into a data set: `python dataset_tool.py --source=photos --dest=photos-64x64.zip --resolution=64`."""

import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import click
import numpy as np
import PIL
from PIL import Image

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError
from di_refine.files.dataset_writer import Picture, map_in_order, new_folders, tool, write_archive
from di_refine.files.datasets import ImageFiles
from di_refine.files.download import sha256_of
from torch_utils.misc import open_atomic

CIFAR_MEMBERS = [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)]
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@cli.command()
@click.option(
    "--source",
    required=True,
    metavar="PATH|digits",
    help="Folder or zip of images, cifar-10-python.tar.gz, or the word digits (scikit-learn's 8x8 handwritten digits).",
)
@click.option("--dest", required=True, metavar="FILE.zip", help="Data set to write.")
@click.option(
    "--resolution", metavar="N|NxN", help="Resize to N x N pixels.  [default: keep the size]", show_default=False
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop"]),
    default="none",
    help="center-crop cuts the largest centred square out of each image before it is resized.",
)
@click.option(
    "--resize-filter",
    type=click.Choice(["box", "bilinear", "bicubic", "lanczos", "nearest"]),
    default="lanczos",
    help="How to resize; recorded in the data set, because metrics depend on it.",
)
@click.option("--max-images", type=cli.POSITIVE_INT, help="Take only so many images, a random but fixed choice.")
@click.option(
    "--labels",
    type=click.Choice(["auto", "folder", "json", "none"]),
    default="auto",
    help="Classes from folder names or from the source's dataset.json; auto takes whichever is there.",
)
@click.option(
    "--grey/--rgb",
    default=None,
    help="Convert every image; transparency becomes white. Without it greyscale and RGB are kept, and anything else or "
    "a mixture is refused.",
)
@click.option("--overwrite", is_flag=True, help="Replace --dest if it exists.")
def main(source, dest, resolution, transform, resize_filter, max_images, labels, grey, overwrite):
    """Convert images into a data set for --data: a zip of PNG files with their labels in dataset.json.

    The same input gives the same file, byte for byte.

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=digits-16x16.zip --resolution=16
      python dataset_tool.py --source=cifar-10-python.tar.gz --dest=cifar10-32x32.zip
      python dataset_tool.py --source=photos --dest=photos-64x64.zip --resolution=64 --transform=center-crop
    """
    size = parse_resolution(resolution)
    if not dest.lower().endswith(".zip"):
        raise InputError(f"--dest={dest} must end in .zip")
    dest = cli.check_outfile(dest, "--dest", overwrite)
    images = open_source(source, labels)
    if max_images and max_images < len(images.names):
        chosen = np.random.default_rng(0).choice(len(images.names), max_images, replace=False)
        images = images.subset(sorted(chosen.tolist()))  # any regular choice may hit one class only

    colour = {None: "keep", True: "grey", False: "rgb"}[grey]

    def convert(index: int) -> Picture:
        image = check_colour(images.read(index), images.names[index], colour)
        return Picture.encode(fit(image, images.names[index], size, transform, resize_filter), images.names[index])

    record = {
        "source": images.origin,
        "resolution": size,
        "transform": transform,
        "resize_filter": resize_filter,
        "colour": colour,
        "max_images": max_images,
        "tool": tool(),
        "pillow": PIL.__version__,
    }
    total = len(images.names)
    with new_folders(dest.parent), open_atomic(dest) as file, terminal.progress(total, "converting", "img") as bar:
        first = write_archive(
            file, map_in_order(convert, range(total)), images.labels, record, images.classes, bar.update
        )
    terminal.print_result(
        {
            "dest": dest,
            "images": total,
            "resolution": first.size[0],
            "channels": 1 if first.mode == "L" else 3,
            "classes": images.num_classes,
            "sha256": sha256_of(dest),
        }
    )


# ----------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass
class Source:
    """Images to convert.

    Attributes:
        origin: where they come from, for the record; no absolute paths, which would differ between machines.
        names: what each image is called in messages.
        read: gives image number i of `names`; called from several threads.
        labels: class number or label vector of each image, or None.
        classes: what the class numbers mean, where that is known.
    """

    origin: str
    names: Sequence[str]
    read: Callable[[int], Image.Image]
    labels: list | None = None
    classes: list[str] | None = None

    def subset(self, chosen: list[int]) -> "Source":
        """Only the images with these numbers."""
        labels = None if self.labels is None else [self.labels[index] for index in chosen]
        names = [self.names[index] for index in chosen]
        return Source(self.origin, names, lambda index: self.read(chosen[index]), labels, self.classes)

    @property
    def num_classes(self) -> int:
        """Largest class number plus one, the length of label vectors, or 0 without labels."""
        if not self.labels:
            return 0
        return len(self.labels[0]) if isinstance(self.labels[0], list) else max(self.labels) + 1


def open_source(source: str, labels: str) -> Source:
    """Open what --source names.

    Args:
        source: a path, or the word digits.
        labels: 'auto', 'folder', 'json' or 'none'.

    Raises:
        InputError: naming the option or file, when the source is not there, not understood, or has no such labels.
    """
    is_archive = source.lower().endswith((".tar.gz", ".tgz"))
    if source == "digits" or is_archive:
        if labels in ("folder", "json"):
            raise InputError(f"--labels={labels} does not apply to --source={source}, whose classes are part of it")
        opened = cifar_source(Path(source)) if is_archive else digits_source()
        if labels == "none":
            opened.labels = opened.classes = None
        return opened
    return files_source(ImageFiles(source, "--source"), labels)


def digits_source() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 with values 0..16, stretched to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--source=digits needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"digits[{index}]" for index in range(len(pixels))]
    classes = [str(digit) for digit in range(10)]
    return Source("digits", names, lambda index: Image.fromarray(pixels[index]), digits.target.tolist(), classes)


def cifar_source(path: Path) -> Source:
    """The 50,000 training images of CIFAR-10 from its Python archive, in the archive's order.

    The archive is full of pickles, which `_ArrayUnpickler` reads without running anything from them.
    """
    if not path.is_file():
        raise InputError(f"--source={path} does not exist")
    pixels, labels = [], []
    try:
        with tarfile.open(path) as archive:
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
    ) as error:
        raise InputError(f"--source={path} is not the CIFAR-10 Python archive, or is damaged ({error})") from None
    images = np.concatenate(pixels)
    names = [f"{CIFAR_MEMBERS[index // 10_000]}[{index % 10_000}]" for index in range(len(images))]
    return Source(path.name, names, lambda index: Image.fromarray(images[index]), labels, CIFAR_CLASSES)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values and numpy arrays, and refuses every other global."""

    _reconstruct = np.empty(0).__reduce__()[0]
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which no array needs")
        return self.ALLOWED[module, name]


def files_source(files: ImageFiles, labels: str) -> Source:
    """The images of a folder or zip file, in the order of their names."""
    names = files.image_names
    if not names:
        raise InputError(f"--source={files.path} holds no images")
    source = Source(files.path.resolve().name, names, lambda index: files.image(names[index]))
    if labels == "json" or (labels == "auto" and "dataset.json" in files.names):
        by_name = files.labels()
        if by_name is not None:
            source.labels = [by_name[name] for name in names]
        elif labels == "json":
            raise InputError(f"--labels=json: {files.path} has no labels in a dataset.json")
    elif labels in ("folder", "auto"):
        folders = class_folders(names)
        if folders is not None and (labels == "folder" or not all(re.fullmatch(r"\d{5}", f) for f in folders)):
            source.classes = sorted(set(folders))
            number = {folder: index for index, folder in enumerate(source.classes)}
            source.labels = [number[folder] for folder in folders]
        elif labels == "folder":
            raise InputError(f"--labels=folder: the images of {files.path} are not sorted into two or more folders")
    return source


def class_folders(names: Sequence[str]) -> list[str] | None:
    """The folder of each image at the first level where their paths part, or None if some image is in none."""
    parts = [PurePosixPath(name).parts for name in names]
    depth = len(os.path.commonprefix([path[:-1] for path in parts]))
    if any(len(path) < depth + 2 for path in parts):
        return None
    return [path[depth] for path in parts]


# ----------------------------------------------------------------------------------------------------------------------
# Conversion


def parse_resolution(text: str | None) -> int | None:
    """'16' or '16x16' -> 16.

    Raises:
        InputError: for anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if not match or int(match[1]) == 0:
        raise InputError(f"--resolution must be a positive number such as 16 or 16x16, not {text!r}")
    if match[2] and int(match[2]) != int(match[1]):
        raise InputError(f"--resolution={text} is not square; data sets have square images")
    return int(match[1])


def check_colour(image: Image.Image, name: str, colour: str) -> Image.Image:
    """The image as 8-bit greyscale or RGB.

    Args:
        image: any Pillow image.
        name: for messages.
        colour: 'keep', 'grey' or 'rgb'.

    Raises:
        InputError: when it has another mode and is to be kept, or more than 8 bits per channel.
    """
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"image {name} has more than 8 bits per channel (Pillow mode {image.mode}); convert it to 8 bits"
        )
    if colour == "keep":
        if image.mode not in ("L", "RGB"):
            raise InputError(f"image {name} has Pillow mode {image.mode}; choose --grey or --rgb to convert it")
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({"grey": "L", "rgb": "RGB"}[colour])


def fit(image: Image.Image, name: str, size: int | None, transform: str, resize_filter: str) -> Image.Image:
    """Crop and resize an image to a square.

    Raises:
        InputError: when it is not square and not to be cropped.
    """
    width, height = image.size
    if width != height:
        if transform != "center-crop":
            raise InputError(f"image {name} is {width}x{height}, not square; use --transform=center-crop")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if size is not None and image.width != size:
        image = image.resize((size, size), Image.Resampling[resize_filter.upper()])
    return image


if __name__ == "__main__":
    main()
