"""Helpers that know nothing about any model: checks of shapes, files that are written whole, seeds."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Check `tensor.shape` against `ref_shape`, where None matches any size.

    Raises:
        AssertionError: the number of axes or a size differs; the message has both shapes.
    """
    fits = tensor.ndim == len(ref_shape) and all(
        ref is None or size == ref for size, ref in zip(tensor.shape, ref_shape)
    )
    if not fits:
        raise AssertionError(f"expected a tensor of shape {list(ref_shape)}, got {list(tensor.shape)}")


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path` that replaces it only when the block ends without an exception.

    The data and the folder entry are flushed to disk before this returns, so after a crash, a kill or a full disk
    `path` is either the whole old file or the whole new one, and no temporary file stays behind after an exception.

    Args:
        path: the file to write; its folder must exist.
        mode: 'wb' or 'w' (text is UTF-8).
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide results from the user's group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # some network file systems refuse fsync on a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the CPU to a device, without the host waiting for a GPU to be done with its work."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all of `parts`; it is the same on every machine and Python version.

    Args:
        parts: integers, of which the lowest 64 bits count, and texts.
    """
    words: list[int] = []
    for part in parts:
        words += list(part.encode()) if isinstance(part, str) else [part & 0xFFFFFFFF, (part >> 32) & 0xFFFFFFFF]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
