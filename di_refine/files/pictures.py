"""Pictures to look at: network output becomes 8-bit images, grids and side-by-side figures. All files are PNG.

Images are [N, C, H, W] and single pictures [C, H, W], with C = 1 (greyscale), 2 (with transparency), 3 (RGB) or 4 (RGB
with transparency), as tensors or numpy arrays: either uint8, or floating point in the networks' range [-1, 1].
"""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from di_refine.errors import InputError
from torch_utils import safe_files
from torch_utils.misc import open_atomic

Images = torch.Tensor | np.ndarray

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's name for such pictures. PNG holds these and no others."""

Titles = tuple[Sequence[str], Sequence[str]]
"""What stands above the columns of a grid, and left of its rows; empty for nothing. Equal neighbours share a title."""

CELL = 64  # pixels of an image in the pictures of a run, at least

MAX_TITLE = 20  # characters
TITLE_SIZE = 12  # pixels

INK, FAINT_INK, PAPER = (32, 32, 32), (110, 110, 110), (255, 255, 255)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Turn floating-point images in [-1, 1] into uint8 in 0..255: 127.5 x + 128, clamped, then truncated.

    This is the rounding behind published FID figures; any other shifts the statistics.

    Args:
        images: floating point, any shape and device.

    Returns:
        uint8, same shape and device.
    """
    return (images.to(torch.float32) * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def check_channels(channels: int) -> None:
    """Check that images of so many channels can be written.

    Raises:
        InputError: PNG does not hold such images.
    """
    if channels not in MODES:
        raise InputError(f"the network makes images of {channels} channels, and a PNG picture holds 1 to {max(MODES)}")


def grid_columns(count: int, columns: int | None = None) -> int:
    """Return how many of `count` images stand in a row if `columns` are asked for; None is about as many as rows."""
    return min(columns or math.ceil(math.sqrt(count)), count)


def enlargement(resolution: int, pixels: int = 32) -> int:
    """Return the whole-number enlargement with which small images can be seen: they come to at most `pixels`."""
    return max(1, pixels // resolution)


def make_grid(images: Images, columns: int | None = None, scale: int = 1, gap: int = 0) -> np.ndarray:
    """Arrange images row by row on white.

    Args:
        images: [N, C, H, W], see the module's docstring.
        columns: images per row; by default about as many as there are rows.
        scale: whole-number enlargement: each pixel becomes `scale` x `scale` pixels, so that tiny images can be seen.
        gap: number of white pixels between neighbours.

    Returns:
        uint8 picture [C, rows * (H * scale + gap) - gap, columns * (W * scale + gap) - gap].
    """
    pixels = _pixels(images)
    if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1] not in MODES:
        raise ValueError(f"expected images [N, 1 to 4, H, W] with N > 0, got shape {list(pixels.shape)}")
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    count, channels, height, width = pixels.shape
    columns = grid_columns(count, columns)
    rows = math.ceil(count / columns)
    padded = np.full((rows * columns, channels, height + gap, width + gap), 255, np.uint8)
    padded[:count, :, :height, :width] = pixels
    grid = padded.reshape(rows, columns, channels, height + gap, width + gap).transpose(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, rows * (height + gap), columns * (width + gap))
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def save_png(path: str | os.PathLike, image: Images) -> None:
    """Write one picture [C, H, W] as a PNG, atomically; its folder must exist."""
    _save(path, to_pillow(_pixels(image)))


def save_grid(
    path: str | os.PathLike,
    images: Images,
    columns: int | None = None,
    scale: int = 1,
    gap: int = 0,
    titles: Titles = ((), ()),
) -> None:
    """Write `make_grid(...)`, with titles of columns or rows, as a PNG, atomically; its folder must exist."""
    step = images.shape[-1] * scale + gap
    _save(path, _titled(to_pillow(make_grid(images, columns, scale, gap)), titles, step))


def save_side_by_side(path: str | os.PathLike, panels: Sequence[tuple[str, Images]], **layout) -> None:
    """Write `side_by_side(panels, **layout)` as a PNG, atomically; its folder must exist."""
    _save(path, side_by_side(panels, **layout))


def side_by_side(
    panels: Sequence[tuple[str, Images]],
    columns: int | None = None,
    scale: int | None = None,
    width: int = 320,
    titles: Titles = ((), ()),
) -> Image.Image:
    """Return a figure that compares sets of images: a grid each, next to each other, each under its title.

    Args:
        panels: (title, images) pairs, left to right; text after a line break in the title is a smaller second line.
        columns: images per row within each panel; by default about as many as rows.
        scale: whole-number enlargement of the pixels; by default what brings a panel nearest to `width`.
        width: the width in pixels a panel should have when `scale` is not given.
        titles: of the columns or rows within each panel.
    """
    gap, margin = 2, 16
    grids = []
    for _, images in panels:
        per_row = grid_columns(len(images), columns)
        enlarge = scale or max(1, round((width - gap * (per_row - 1)) / (per_row * images.shape[-1])))
        grid = to_pillow(make_grid(images, per_row, enlarge, gap))
        grids.append(on_paper(_titled(grid, titles, images.shape[-1] * enlarge + gap)))

    headings = [title.split("\n") for title, _ in panels]
    fonts = [ImageFont.load_default(size) for size in (18, 14)]
    lines = [[(text, fonts[min(row, 1)]) for row, text in enumerate(title)] for title in headings]
    line_height = 24
    top = margin + line_height * max(len(title) for title in headings) + 4
    widths = [
        max(grid.width, *(math.ceil(font.getlength(text)) for text, font in title)) for grid, title in zip(grids, lines)
    ]
    figure_width = sum(widths) + 2 * margin * len(widths)
    figure = Image.new("RGB", (figure_width, top + max(grid.height for grid in grids) + margin), PAPER)
    draw = ImageDraw.Draw(figure)
    left = margin
    for grid, title, panel_width in zip(grids, lines, widths):
        centre = left + panel_width / 2
        for row, (text, font) in enumerate(title):
            ink = INK if row == 0 else FAINT_INK
            draw.text((centre, margin + line_height * (row + 0.5)), text, fill=ink, font=font, anchor="mm")
        figure.paste(grid, (left + (panel_width - grid.width) // 2, top))
        left += panel_width + 2 * margin
    return figure


def headed(picture: Image.Image, title: str, others: Sequence[str] = ()) -> Image.Image:
    """Return a picture under a title, on paper as wide as it would be under any of some other titles, too."""
    font, margin, line = ImageFont.load_default(18), 16, 24
    width = max(picture.width, *(math.ceil(font.getlength(text)) for text in (title, *others))) + 2 * margin
    figure = Image.new("RGB", (width, picture.height + 3 * margin + line), PAPER)
    ImageDraw.Draw(figure).text((width / 2, margin + line / 2), title, fill=INK, font=font, anchor="mm")
    figure.paste(on_paper(picture), ((width - picture.width) // 2, 2 * margin + line))
    return figure


def read_png(path: str | os.PathLike) -> tuple[bytes, Image.Image]:
    """Return the content of a PNG, and the picture.

    Raises:
        InputError: the file is no picture that can be read.
    """
    try:
        with safe_files.open_regular(path) as file:
            content = file.read()
        picture: Image.Image = Image.open(io.BytesIO(content), formats=["PNG"])
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable picture ({error}); remove it") from None
    return content, picture


def is_drawable(text: str) -> bool:
    """Say whether the font of titles has all characters of a text; Pillow's own has those of English."""
    font = ImageFont.load_default(TITLE_SIZE)
    missing = bytes(font.getmask("\uffff"))
    return text.isprintable() and all(char == " " or bytes(font.getmask(char)) != missing for char in text[:MAX_TITLE])


def _titled(grid: Image.Image, titles: Titles, step: int) -> Image.Image:
    """Return a grid with titles above its columns and left of its rows, on paper; without titles the grid as it is.

    Titles of columns that are wider than these are turned.

    Args:
        grid: the picture.
        titles: see `Titles`.
        step: pixels from one image of the grid to the next, in both directions.
    """
    if not any(titles):
        return grid
    font = ImageFont.load_default(min(TITLE_SIZE, step))
    spans = [_spans([_shortened(text) for text in line]) for line in titles]
    labels = [[(_text(text, font), (start + stop) * step // 2) for text, start, stop in line] for line in spans]
    across = [(label, middle) for label, middle in labels[0]]
    if any(label.width > (stop - start) * step for (label, _), (_, start, stop) in zip(across, spans[0])):
        across = [(label.rotate(90, expand=True), middle) for label, middle in across]
    top = max((label.height for label, _ in across), default=0)
    left = max((label.width for label, _ in labels[1]), default=0)
    paper = Image.new("RGB", (left + grid.width, top + grid.height), PAPER)
    paper.paste(on_paper(grid), (left, top))
    for label, middle in across:
        paper.paste(label, (left + middle - label.width // 2, top - label.height))
    for label, middle in labels[1]:
        paper.paste(label, (left - label.width, top + middle - label.height // 2))
    return paper


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TITLE else f"{text[: MAX_TITLE - 3].rstrip()}..."


def _spans(texts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return each run of equal neighbours as (text, first, last + 1)."""
    starts = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    return [(texts[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(texts)])]


def _text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    """Return a picture of one line of text, with some room around it."""
    left, top, right, bottom = font.getbbox(text)
    height = font.getbbox("Xg")[3]
    picture = Image.new("RGB", (math.ceil(right - left) + 6, math.ceil(max(bottom, height)) + 2), PAPER)
    ImageDraw.Draw(picture).text((3 - left, 0), text, fill=INK, font=font)
    return picture


def _pixels(images: Images) -> np.ndarray:
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        return images
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floating point in [-1, 1], not {images.dtype}")
        images = to_uint8(images.detach())
    return images.cpu().numpy()


def to_pillow(picture: np.ndarray) -> Image.Image:
    """Return a uint8 picture [C, H, W] as Pillow's."""
    if picture.ndim != 3 or picture.shape[0] not in MODES:
        raise ValueError(f"expected a picture [1 to 4, H, W], got shape {list(picture.shape)}")
    if picture.shape[0] == 1:
        return Image.fromarray(np.ascontiguousarray(picture[0]))
    return Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))


def on_paper(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB; what is transparent in it shows white."""
    if picture.mode not in ("LA", "RGBA"):
        return picture.convert("RGB")
    paper = Image.new("RGBA", picture.size, (*PAPER, 255))
    return Image.alpha_composite(paper, picture.convert("RGBA")).convert("RGB")


def _save(path: str | os.PathLike, picture: Image.Image) -> None:
    with open_atomic(path) as file:
        picture.save(file, format="PNG")
