"""Training states on disk: written whole or not at all, verified when read, the newest few kept.

A state file is what `torch.save` writes, a zip archive, with the SHA-256 of its content as the archive's comment. So
`torch.load(path, weights_only=True)` and zip tools read it like any other, while a file that was cut short or altered,
which `torch.load` may well accept, is known by its checksum.
"""

import contextlib
import errno
import hashlib
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from di_refine.errors import InputError, RunError
from torch_utils import misc

PATTERN = re.compile(r"training-state-(\d+)\.pt")

_LABEL = b"sha256:"
_HEAD = struct.pack("<H", len(_LABEL) + 64) + _LABEL  # the comment's length comes before it
_TRAILER = len(_HEAD) + 64  # bytes at the end of a file
_BLOCK = 1 << 20


class CheckpointError(InputError):
    """A state file that cannot be used: damaged, cut short, or something else altogether."""


def path_of(folder: str | os.PathLike, nimg: int) -> Path:
    """Where the state after `nimg` images is kept: `training-state-<kimg>.pt`, whole thousands."""
    return Path(folder) / f"training-state-{nimg // 1000:06d}.pt"


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write a state with its checksum; a crash at any moment leaves the old file or the new one at `path`.

    Args:
        path: the file to write; its folder must exist.
        state: tensors on any device, and plain values, in dicts and lists.

    Raises:
        RunError: the disk is full, the folder is read-only, ...; what was at `path` before is still there.
    """
    with saving(path), misc.open_atomic(path) as file:
        stream = _Hashed(file)
        try:
            torch.save(state, stream)
        except RuntimeError:
            if stream.error is not None:  # torch.save says only that writing failed, not why
                raise stream.error from None
            raise
        file.seek(-2, os.SEEK_END)
        file.write(_HEAD + stream.digest.hexdigest().encode())


@contextlib.contextmanager
def saving(path: str | os.PathLike) -> Iterator[None]:
    """Turns a failure to write `path` into one sentence that says what to do.

    Raises:
        RunError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some space" if full else f"make {Path(path).parent} writable"
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); {remedy}, then repeat the command with "
            f"--resume={Path(path).parent}"
        ) from None


def check(path: str | os.PathLike) -> None:
    """Verify a file's checksum.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size - _TRAILER
            digest = hashlib.sha256()
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            digest.update(b"\0\0")  # the length of the comment, when there was none yet
            found = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    if not found.startswith(_HEAD):
        raise CheckpointError(f"{path} is damaged (no checksum at its end)")
    if found[len(_HEAD) :] != digest.hexdigest().encode():
        raise CheckpointError(f"{path} is damaged (its checksum differs)")


def load(path: str | os.PathLike) -> dict[str, Any]:
    """The verified state in a file, tensors on the CPU. Nothing in the file can run code.

    Raises:
        CheckpointError: as `check`.
    """
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no training state ({reason})") from None


def kimg_of(path: Path) -> int:
    """Thousands of images in the name of a state file."""
    return int(PATTERN.fullmatch(path.name)[1])


def in_folder(folder: str | os.PathLike) -> list[Path]:
    """The state files of a folder, most images first."""
    found = [entry for entry in Path(folder).iterdir() if PATTERN.fullmatch(entry.name)]
    return sorted(found, key=kimg_of, reverse=True)


def newest_intact(folder: str | os.PathLike, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest state whose checksum is right; None where there are no states at all.

    Args:
        folder: a run directory.
        warn: called with a sentence for each newer one that is damaged.

    Raises:
        CheckpointError: there are states, and all are damaged.
    """
    damaged = []
    for path in in_folder(folder):
        try:
            check(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for error in damaged:
            warn(f"{error}; going back to {path.name}")
        return path
    if damaged:
        raise CheckpointError(f"no training state in {folder} can be used: {'; '.join(map(str, damaged))}")
    return None


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Remove all but the `keep` newest states."""
    for path in in_folder(folder)[keep:]:
        path.unlink(missing_ok=True)


class _Hashed:
    """What `torch.save` writes into: hashes on the way, and remembers why a write failed."""

    def __init__(self, file):
        self._file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return count

    def flush(self) -> None:
        self._file.flush()
