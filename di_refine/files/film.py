"""Films: pictures one after another, as GIF, WebP or MP4."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from di_refine.errors import InputError
from di_refine.files.pictures import on_paper
from torch_utils.misc import open_atomic

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".mp4": "MP4"}
"""What a film's file is called at the end -> its format."""


def check(path: str | os.PathLike, option: str) -> None:
    """Check that a film can be written as the name of its file asks.

    Raises:
        InputError: naming the option, for another format, or for MP4 without imageio-ffmpeg.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"{option}={path}: a film is one of {', '.join(FORMATS)}")
    if kind == "MP4" and find_spec("imageio_ffmpeg") is None:
        raise InputError(f"{option}={path}: MP4 needs imageio-ffmpeg (pip install 'di-refine[video]'); or name a .gif")


def save(path: str | os.PathLike, frames: Iterable[Image.Image], fps: float) -> int:
    """Write a film that begins again at its end, atomically; its folder must exist.

    Args:
        path: ends in one of `FORMATS`.
        frames: pictures of one size, at least one. GIF and WebP take them as they come, without keeping them.
        fps: frames per second. GIF knows hundredths of a second, so its nearest rate is taken.

    Returns:
        How many frames there were.
    """
    count = itertools.count()
    counted = (on_paper(frame) for frame, _ in zip(frames, count))
    kind = FORMATS[Path(path).suffix.lower()]
    with open_atomic(path) as file:
        if kind == "MP4":
            _encode(file, counted, fps)
        else:
            first = next(counted)
            # Browsers slow a GIF down whose frames are shorter than 20 ms. Of WebP, only the lossless kind keeps the
            # pixels of small pictures.
            duration = max(2, round(100 / fps)) * 10 if kind == "GIF" else round(1000 / fps)
            first.save(
                file, kind, save_all=True, append_images=counted, duration=duration, loop=0, lossless=kind == "WEBP"
            )
    return next(count)


def _encode(file, frames: Iterator[Image.Image], fps: float) -> None:
    """Write H.264 that every browser plays. It wants even sides, so an odd one grows by a pixel of its edge."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "film.mp4")  # ffmpeg goes back to the beginning at the end, so it gets a name
        writer = None
        for frame in frames:
            pixels = np.asarray(frame)
            pixels = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
            if writer is None:
                size = pixels.shape[1], pixels.shape[0]
                writer = imageio_ffmpeg.write_frames(path, size, fps=fps, quality=8, macro_block_size=2)
                writer.send(None)
            writer.send(np.ascontiguousarray(pixels))
        if writer is not None:
            writer.close()
        with open(path, "rb") as encoded:
            shutil.copyfileobj(encoded, file)
