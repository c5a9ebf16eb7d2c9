"""Files that `torch.save` wrote, in its form of today (a zip archive) and in the one from before PyTorch 1.6."""

import argparse
import os
import pickle
import zipfile
from typing import Any

import torch

from torch_utils import safe_files
from torch_utils.persistence import NetworkFormatError, printable

OLD_FORM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save began with before 1.6


def is_torch_file(path: str | os.PathLike) -> bool:
    """Return whether `torch.save` wrote a file, by its first bytes and, in an archive, its names."""
    try:
        with safe_files.open_regular(path) as file:
            head = file.read(len(OLD_FORM))
            if head.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(file) as archive:
                    return any(name.endswith("/data.pkl") for name in archive.namelist())
            return head == OLD_FORM
    except Exception:  # zipfile raises a dozen kinds of them for damaged files
        return False


def load(path: str | os.PathLike, with_settings: bool = False) -> Any:
    """Return what is in a file: tensors, on the CPU, and plain values. Nothing in it is executed.

    Args:
        path: the file.
        with_settings: let it hold the options of a command line (`argparse.Namespace`), too, which are plain values.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    try:
        with safe_files.open_regular(path, safe_files.NETWORK_BYTES) as file:
            allowed: list[Any] = [argparse.Namespace] if with_settings else []
            names = [f"{kind.__module__} {kind.__name__}" for kind in allowed]
            safe_files.check_saved(file, os.fstat(file.fileno()).st_size, names)
            file.seek(0)
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NetworkFormatError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # its text advises to load the file without the check
        raise NetworkFormatError(f"{path} holds more than tensors and plain values") from None
    except Exception as error:  # torch and zipfile raise a dozen kinds of them
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise NetworkFormatError(f"{path} is damaged, or no file of torch.save ({reason})") from None


def tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return a state dictionary.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    return checked(load(path), path)


def checked(content: Any, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the content of a file if it is a state dictionary.

    Raises:
        NetworkFormatError: it is none.
    """
    if not isinstance(content, dict):
        raise NetworkFormatError(f"{path} holds no state dictionary")
    for name, tensor in content.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if type(name) is not str or not plain:
            raise NetworkFormatError(f"{path} holds no state dictionary: {printable(name)} is no tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise NetworkFormatError(f"{path}: less is stored of {printable(name)} than its shape says")
    return dict(content)
