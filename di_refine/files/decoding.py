"""Pictures of users become pixels here, and nowhere else.

What a file says about how its pixels are to be read is honoured: orientation (EXIF or XMP) is applied before anything
else, 16-bit greyscale is scaled to 8 bits, a palette gives RGB (or greyscale, where it holds nothing else), one
transparent colour gives an alpha channel, and a PNG's gamma is applied. What is not honoured, such as a colour profile,
is a remark.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageOps

#: What may have to be said about images that are read, as the end of a sentence that begins with their number.
FRAMES = "with several frames or pages, of which only the first is read"
DEEP = "with 16 bits per channel, scaled to 8"
GAMMA = "with a gamma of its own, which is applied"
PROFILE = "with a colour profile other than sRGB, which is not applied"
CMYK = "in CMYK, whose colours without a profile are approximate"
BROKEN_EXIF = "with damaged EXIF data, taken to be upright"

Image.init()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half the size that is refused
# The C library gives blocks of more than 32 MiB back to the system at once, and keeps smaller ones for each thread.
Image.core.set_block_size(1 << 26)
_PIXELS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "SUN", "TIFF", "WEBP"]
#: The formats of pictures made of pixels that this Pillow reads. Content of any other kind, such as PostScript, which
#: Pillow hands to another program, is never looked into, whatever the file is called.
FORMATS = [name for name in _PIXELS if name in Image.OPEN]
#: Of files that are taken for pictures. TGA is told by its extension alone, for nothing in the file does.
EXTENSIONS = tuple(sorted(extension for extension, kind in Image.EXTENSION.items() if kind in {*FORMATS, "TGA"}))

LARGE = 1 << 24  # pixels; of pictures with more, one is decoded at a time
_one_large = threading.Lock()
_turn = threading.local()

SRGB = 1 / 2.2
VERSION = 2  # of the rules above; statistics of images that were read by other rules are not reused


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Within this block a thread may hold a large picture; no other thread decodes one until the block ends."""
    if getattr(_turn, "stack", None) is not None:
        yield  # within another such block
        return
    with contextlib.ExitStack() as stack:
        _turn.stack = stack
        try:
            yield
        finally:
            _turn.stack = None


def _wait_for_turn() -> None:
    stack = getattr(_turn, "stack", None)
    if stack is not None and not getattr(stack, "has_turn", False):
        stack.enter_context(_one_large)
        stack.has_turn = True


def decode(content: bytes, name: str) -> tuple[Image.Image, set[str]]:
    """Decode one picture.

    Args:
        content: of the file.
        name: of the file.

    Returns:
        The image, upright, with Pillow mode L or RGB, or another where that would lose something; and the remarks.

    Raises:
        Exception: of any type, as Pillow raises them for damaged data.
    """
    with turn():
        image = _open(io.BytesIO(content), name)
        if image.width * image.height > LARGE:
            _wait_for_turn()
        remarks = _remarks(image)
        image.load()
        return _interpret(image), remarks


def header(file: IO[bytes], name: str) -> tuple[tuple[int, int], str, set[str]]:
    """Return (width, height), Pillow mode and remarks as `decode` does, from the header alone where that tells.

    Raises:
        Exception: as `decode`.
    """
    with _open(file, name) as image:
        remarks = _remarks(image)
        if image.width != image.height or image.mode not in ("L", "RGB") or "transparency" in image.info:
            image.load()  # only now is it known whether the image lies on its side, and what is in its palette
            image = _interpret(image)
        return image.size, image.mode, remarks


def _open(file: IO[bytes], name: str) -> Image.Image:
    by_name = Image.EXTENSION.get(PurePosixPath(name.lower()).suffix)
    return Image.open(file, formats=["TGA"] if by_name == "TGA" else FORMATS)


def _remarks(image: Image.Image) -> set[str]:
    """Return what has to be said about an image that is opened and not loaded."""
    info = image.info
    profile = info.get("icc_profile") or b""
    found = {
        FRAMES: getattr(image, "is_animated", False),
        DEEP: _is_deep(image) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())),
        GAMMA: _gamma(image) != 1,
        PROFILE: profile and b"sRGB" not in profile.replace(b"\0", b""),  # names are ASCII or UTF-16
        CMYK: image.mode == "CMYK",
        BROKEN_EXIF: "exif" in info and not _has_readable_exif(image),
    }
    return {remark for remark, applies in found.items() if applies}


def _interpret(image: Image.Image) -> Image.Image:
    """Return the image of a loaded file as it is meant."""
    gamma = _gamma(image)
    with contextlib.suppress(Exception):  # damaged EXIF data, of which Pillow makes errors of several types
        ImageOps.exif_transpose(image, in_place=True)
    if _is_deep(image):
        image = _eight_bits(image)
    elif image.mode == "P" and "transparency" not in image.info:
        palette = np.reshape(image.getpalette() or [], (-1, 3))
        image = image.convert("L" if (palette == palette[:, :1]).all() else "RGB")
    elif image.mode in ("P", "PA", "RGBa") or (image.mode == "RGB" and "transparency" in image.info):
        image = image.convert("RGBA")
    elif image.mode == "La" or (image.mode in ("1", "L") and "transparency" in image.info):
        image = image.convert("LA")
    elif image.mode == "1":
        image = image.convert("L")
    if gamma != 1 and image.mode in ("L", "LA", "RGB", "RGBA"):
        curve = [round(255 * (value / 255) ** gamma) for value in range(256)]
        image = image.point([*curve * len(image.mode.rstrip("A")), *(range(256) if "A" in image.mode else ())])
    return image


def _has_readable_exif(image: Image.Image) -> bool:
    try:
        image.getexif()
    except Exception:  # see above
        return False
    return True


def _gamma(image: Image.Image) -> float:
    """Return the exponent that brings an image's values to sRGB; 1 where they are, or are not said not to be."""
    gamma = image.info.get("gamma")
    if not gamma or "srgb" in image.info or "icc_profile" in image.info or abs(gamma / SRGB - 1) < 0.02:
        return 1
    return SRGB / gamma


def _is_deep(image: Image.Image) -> bool:
    """Say whether the mode is Pillow's for 16-bit greyscale, where that can be told from 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _eight_bits(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:
        raise ValueError("it has 16 bits and a transparent colour, which is not supported")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    white = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    values = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = 255 - values
    return Image.fromarray(values.astype(np.uint8))
