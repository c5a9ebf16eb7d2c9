"""The command `dataset_tool.py`, which converts images into a data set."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError


@cli.command()
@click.option(
    "--source",
    required=True,
    metavar="PATH|digits",
    help="Read the images from a folder, a zip file, an .npz file with uint8 images [N, H, W, C] in arr_0, or "
    "cifar-10-python.tar.gz; the word digits stands for scikit-learn's 8x8 handwritten digits.",
)
@click.option("--dest", required=True, metavar="FILE.zip", help="Write the data set to this file.")
@click.option(
    "--resolution", metavar="N|NxN|WxH", help="Resize to N x N pixels.  [default: keep the size]", show_default=False
)
@click.option(
    "--transform",
    type=click.Choice(["none", "center-crop", "center-crop-wide", "pad"]),
    default="none",
    help="center-crop cuts the largest centred square out of each image before it is resized. center-crop-wide cuts "
    "the largest centred rectangle of the shape of --resolution=WxH, resizes it to W x H, and adds bars above and "
    "below. pad adds bars to whole images.",
)
@click.option(
    "--pad-colour",
    metavar="COLOUR",
    help="Fill bars with this colour, a name or #rrggbb; greyscale images take its brightness.  [default: black]",
    show_default=False,
)
@click.option(
    "--resize-filter",
    type=click.Choice(["box", "bilinear", "bicubic", "lanczos", "nearest"]),
    default="lanczos",
    help="Resize with this filter of Pillow; the data set records it, because metrics depend on it.",
)
@click.option("--max-images", type=cli.POSITIVE_INT, help="Take only so many images, a random but fixed choice.")
@click.option(
    "--labels",
    type=click.Choice(["auto", "folder", "json", "none"]),
    default="auto",
    help="Take classes from folder names, or from the source's dataset.json or arr_1; auto takes whichever is there.",
)
@click.option(
    "--grey/--rgb",
    default=None,
    help="Convert every image to greyscale or to RGB; transparency becomes white. Without either, greyscale and RGB "
    "are kept, and anything else or a mixture is refused.",
)
@click.option(
    "--skip-damaged", is_flag=True, help="Leave out images that are damaged, and say which, instead of stopping."
)
@click.option("--overwrite", is_flag=True, help="Replace --dest if it exists.")
def main(
    source, dest, resolution, transform, pad_colour, resize_filter, max_images, labels, grey, skip_damaged, overwrite
):
    """Convert images into a data set for the other commands: a zip of PNG files with their labels in dataset.json.

    The same input gives the same file, byte for byte.

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=digits-16x16.zip --resolution=16
      python dataset_tool.py --source=cifar-10-python.tar.gz --dest=cifar10-32x32.zip
      python dataset_tool.py --source=photos --dest=photos-64x64.zip --resolution=64 --transform=center-crop
    """
    # These import PyTorch, which --help must not wait for.
    import numpy as np
    import PIL

    from di_refine.files import decoding
    from di_refine.files.dataset_sources import check_colour, fit, open_source
    from di_refine.files.dataset_writer import (
        Picture,
        class_counts,
        map_in_order,
        new_folders,
        project_version,
        write_archive,
    )
    from di_refine.files.datasets import absent_classes
    from di_refine.files.download import sha256_of
    from di_refine.files.image_files import DamagedImages
    from di_refine.pretraining.gan import is_size
    from torch_utils.misc import open_atomic

    size = parse_resolution(resolution, wide=transform == "center-crop-wide")
    if pad_colour is not None and transform not in ("pad", "center-crop-wide"):
        raise InputError("--pad-colour is of bars, which --transform=pad and center-crop-wide alone make")
    bars = check_colour_name(pad_colour or "black")
    if not dest.lower().endswith(".zip"):
        raise InputError(f"--dest={dest} must end in .zip")
    dest = cli.check_outfile(dest, "--dest", overwrite)
    images = open_source(source, labels)
    if max_images and max_images < len(images.names):
        chosen = np.random.default_rng(0).choice(len(images.names), max_images, replace=False)
        images = images.subset(sorted(chosen.tolist()))  # any regular choice may hit one class only

    colour = {None: "keep", True: "grey", False: "rgb"}[grey]

    def convert(index: int) -> Picture | DamagedImages:
        name = images.names[index]
        with decoding.turn():
            try:
                image = check_colour(images.read(index), name, colour)
            except DamagedImages as error:
                return error
            return Picture.encode(fit(image, name, size, transform, resize_filter, bars), name)

    record = {
        "source": images.origin,
        "resolution": size and (size[0] if size[0] == size[1] else list(size)),
        "transform": transform,
        **({"pad_colour": bars} if transform in ("pad", "center-crop-wide") else {}),
        "resize_filter": resize_filter,
        "colour": colour,
        "max_images": max_images,
        "tool": project_version(),
        "pillow": PIL.__version__,
    }
    total = len(images.names)
    labelled: list[Any] = []
    faults: dict[str, str] = {}

    def readable() -> Iterator[Picture]:
        """Give the pictures that are not damaged; all are read before one that is becomes an error."""
        for index, picture in enumerate(map_in_order(convert, range(total))):
            bar.update()
            if isinstance(picture, Picture):
                labelled.append(images.labels[index] if images.labels else None)
                yield picture
            else:
                faults.update(picture.faults)
        if faults and not (skip_damaged and labelled):
            advice = "; none is left" if skip_damaged else "; mend them, or leave them out with `skip_damaged`"
            raise InputError(f"{DamagedImages(Path(source), faults)}{advice}")

    with new_folders(dest.parent), open_atomic(dest) as file, terminal.progress(total, "converting", "img") as bar:
        first = write_archive(file, readable(), labelled if images.labels else None, record, images.classes)
    if images.labels:
        images.labels = labelled
    notes, counts = images.notes(), class_counts(images.labels, images.classes)
    if faults:
        notes.append(f"left out: {DamagedImages(Path(source), faults)}")
    side = first.size[0]
    if not is_size(side):
        notes.append(f"{side}x{side} is no size that pretrain.py gan takes, which are powers of two from 8 on")
    if absent := absent_classes(counts, images.classes):
        notes.append(absent)
    for note in notes:
        terminal.say(f"note: {note}")
    if counts:
        class_names = [*(images.classes or ()), *[""] * len(counts)]
        terminal.table([*zip(range(len(counts)), class_names, counts)], ["class", "name", "images"])
    terminal.print_result(
        {
            "dest": dest,
            "images": len(labelled),
            "resolution": side,
            "channels": 1 if first.mode == "L" else 3,
            "classes": images.num_classes,
            "class_names": images.classes,
            "class_counts": counts,
            "skipped": images.skipped,
            "damaged": list(faults),
            "notes": notes,
            "sha256": sha256_of(dest),
        }
    )


def parse_resolution(text: str | None, wide: bool = False) -> tuple[int, int] | None:
    """Return (16, 16) for '16' or '16x16', and None for None.

    Args:
        text: of the option.
        wide: expect a rectangle that is wider than high, as in '32x18'.

    Raises:
        InputError: for anything else.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", (text or "").strip().lower())
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if wide:
        if not 0 < height < width:
            raise InputError("--transform=center-crop-wide needs --resolution=WxH with W above H, such as 512x288")
        return width, height
    if text is None:
        return None
    if not width or not height:
        raise InputError(f"--resolution must be a positive number such as 16 or 16x16, not {text!r}")
    if width != height:
        raise InputError(f"--resolution={text} is not square; data sets have square images")
    return width, height


def check_colour_name(text: str) -> str:
    """Return the name of a colour that Pillow knows.

    Raises:
        InputError: it does not.
    """
    from PIL import ImageColor

    try:
        if len(ImageColor.getrgb(text)) == 3:
            return text
    except ValueError:
        pass
    raise InputError(f"--pad-colour must be a name such as white, or #rrggbb, not {text!r}")


if __name__ == "__main__":
    main()
