"""Arrays from .npz files of others: only those that are asked for, and no more bytes than the file can mean."""

import os
import zipfile
from collections.abc import Collection

import numpy as np

from torch_utils import safe_files

ROOM, INFLATION = 1 << 26, 16  # bytes that arrays may unpack to: so many, and so many for each byte of the file

#: What reading such a file may raise. All have a text that says what is wrong.
ERRORS = (OSError, ValueError, MemoryError)


def read(path: str | os.PathLike, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays of an .npz file that have one of the wanted names, and the names of the others, not read.

    Raises:
        Exception: one of `ERRORS`; the file is missing, something else, damaged, or unpacks to too much.
    """
    try:
        return _read(path, wanted)
    except ERRORS:
        raise
    except Exception as error:  # zipfile, zlib and NumPy's parser of headers raise a dozen kinds of them
        raise ValueError(str(error) or type(error).__name__) from error


def _read(path: str | os.PathLike, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    with safe_files.open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        found = {name: entry for name, entry in entries.items() if name in wanted}
        size, most = sum(entry.file_size for entry in found.values()), ROOM + INFLATION * os.stat(path).st_size
        if size > most:
            raise ValueError(f"its arrays unpack to {size} bytes, more than the {most} there may be for its size")
        arrays = {}
        for name, entry in found.items():
            with archive.open(entry) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays, [name for name in entries if name not in wanted]
