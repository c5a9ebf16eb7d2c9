"""Training states on disk: written whole or not at all, verified when read, the newest few kept.

A state file is what `torch.save` writes: a zip archive, which has a CRC-32 of each of its entries. `torch.load` does
not look at these, so they are verified here before it reads the file.
"""

import contextlib
import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from di_refine.errors import InputError, RunError
from di_refine.files.run_files import RunFiles
from torch_utils import misc, safe_files

MAX_BYTES = 1 << 36  # of a training state
_FOLDER = 0x10  # the attribute by which an archive marks an entry as a folder


class CheckpointError(InputError):
    """A state file cannot be used: it is damaged, cut short, or something else altogether."""


def save(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write a state; a crash at any moment leaves the old file or the new one at `path`.

    Args:
        path: the file to write; its folder must exist.
        state: tensors on any device, and plain values, in dicts and lists.

    Raises:
        RunError: the disk is full, the folder is read-only, ...; what was at `path` before is still there.
    """
    with saving(path), misc.open_atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # says only that writing failed; what it was raised in says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def saving(path: str | os.PathLike) -> Iterator[None]:
    """Turn a failure to write `path` into one sentence that says what to do.

    Raises:
        InputError, RunError: in place of an OSError; the former where something else than a file is at `path`.
    """
    try:
        yield
    except OSError as error:
        special = os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path))
        if special and error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR):
            raise InputError(f"{path} is {error.strerror}; remove it, or name another `outdir`") from None
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some space" if full else f"make {Path(path).parent} writable"
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); {remedy}, then repeat the command with "
            f"resume={Path(path).parent}"
        ) from None


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Return the state in a file, verified, with its tensors on the CPU. Nothing in the file can run code.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    _check(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(state)
        return state
    except pickle.UnpicklingError:  # its text advises to load the file without the check
        raise CheckpointError(f"{path} is no training state (it holds more than tensors and plain values)") from None
    except Exception as error:  # torch, too, raises a dozen kinds of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # the same advice
            reason = "it is a program"
        raise CheckpointError(f"{path} is no training state ({reason})") from None


def _check_tensors(state: Any) -> None:
    """Raise ValueError for a tensor that is no plain one, or has more elements than are stored of it."""
    pending, seen = [state], set()
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            plain = item.layout == torch.strided and not item.is_meta
            if not plain or item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {list(item.shape)} of which less is stored")
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            pending += item.values() if isinstance(item, dict) else item


def _check(path: str | os.PathLike) -> None:
    """Compare the content of all entries of an archive with their checksums.

    The archive's directory has no checksum. Where an altered bit in it matters, `torch.load` refuses the file, with one
    exception: of an entry that is marked as a folder it reads nothing, and leaves in the tensor what was in memory.
    """
    try:
        file = safe_files.open_regular(path, MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    try:
        with file, zipfile.ZipFile(file) as archive:
            entries = safe_files.check_saved(file, os.fstat(file.fileno()).st_size)
            intact = not any(entry.external_attr & _FOLDER for entry in entries)
            intact = intact and archive.testzip() is None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is no training state (it holds more than tensors and plain values)") from None
    except Exception:  # zipfile raises a dozen kinds of them for a file that was altered
        raise CheckpointError(f"{path} is damaged (it is no archive, or one that was cut short or altered)") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged (its checksum differs)")


def newest_intact(folder: str | os.PathLike, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """Return the newest state that can be loaded; None where there are no states at all.

    Args:
        folder: a run directory.
        warn: called with a sentence for each newer one that cannot.

    Raises:
        CheckpointError: there are states, and none can be loaded.
    """
    damaged: list[CheckpointError] = []
    for path in RunFiles(folder).states():
        try:
            load(path)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for reason in damaged:
            warn(f"{reason}; going back to {path.name}")
        return path
    if damaged:
        raise CheckpointError(f"no training state in {folder} can be used: {'; '.join(map(str, damaged))}")
    return None


def prune(folder: str | os.PathLike, keep: int) -> None:
    """Remove all but the `keep` newest states."""
    for path in RunFiles(folder).states()[keep:]:
        path.unlink(missing_ok=True)
