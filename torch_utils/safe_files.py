"""Files that somebody else may have put there: opened only where they are regular files, written only where no link is.

Opening a pipe would wait for a writer for ever, reading a device would never end, and writing through a symbolic link
would change a file that nobody named. Every reader of a file that a user names opens it here first, also where a
library then opens it by its name. All failures are `OSError`, whose `strerror` is the end of a sentence.
"""

import errno
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # Windows has neither pipes nor links like these
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

JSON_BYTES = 1 << 24  # of a JSON text with no bound of its own; its values take up to 16 times the memory
JSON_CONTAINERS = 500_000  # lists and objects in it
NETWORK_BYTES = 1 << 33  # the largest published network of the kinds read here has 3 GB
SAFETENSORS_HEADER = 1 << 22  # bytes; that of a network with 10,000 tensors has 1 MB


def open_regular(path: str | os.PathLike, most: int | None = None) -> IO[bytes]:
    """Open a regular file for reading; links to one are followed.

    Args:
        path: the file.
        most: how many bytes it may have.

    Raises:
        OSError: it is missing, no regular file, or too large.
    """
    handle = os.open(path, os.O_RDONLY | _NO_WAIT)
    try:
        _check(os.fstat(handle), path, most)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def open_append(path: str | os.PathLike) -> IO[bytes]:
    """Open a regular file, which is made where there is none, for writing at its end, without a buffer.

    Raises:
        OSError: it is a symbolic link or no regular file, or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_WAIT | _NO_LINK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed", os.fspath(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "not a regular file", os.fspath(path)) from None
        raise
    try:
        _check(os.fstat(handle), path, None)
        return os.fdopen(handle, "ab", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def _check(status: os.stat_result, path: str | os.PathLike, most: int | None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than the {most} there may be", os.fspath(path))


def read_json(path: str | os.PathLike, most: int = JSON_BYTES) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: as `open_regular`.
        ValueError: as `parse_json`.
    """
    with open_regular(path, most) as file:
        return parse_json(file.read())


def parse_json(text: bytes, containers: int = JSON_CONTAINERS, **hooks: Any) -> Any:
    """Return the value of a JSON text, as `json.loads` does, within bounds that are known before it begins.

    Args:
        text: in UTF-8.
        containers: how many lists and objects it may hold.
        hooks: for `json.loads`.

    Raises:
        ValueError: it is no JSON, nests too deeply, or holds too many lists and objects.
    """
    found = text.count(b"[") + text.count(b"{")  # also those within texts, of which honest files have few
    if found > containers:
        raise ValueError(f"{found} lists and objects, more than the {containers} there may be")
    try:
        return json.loads(text.decode("utf-8"), **hooks)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def check_safetensors(path: str | os.PathLike) -> None:
    """Raise OSError unless a file is a regular one of a size that networks have, and so is its safetensors header."""
    with open_regular(path, NETWORK_BYTES) as file:
        header = int.from_bytes(file.read(8), "little")
    if header > SAFETENSORS_HEADER:
        most = f"more than the {SAFETENSORS_HEADER} there may be"
        raise OSError(errno.EFBIG, f"a header of {header} bytes, {most}", os.fspath(path))


def unpacked_entries(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """Return the entries of a zip file of `size` bytes that `torch.save` wrote, none of which is compressed.

    Raises:
        zipfile.BadZipFile: some are compressed, or overlap: unpacked, they could be a thousand times the file.
    """
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise zipfile.BadZipFile("its entries are packed, or overlap")
    return entries


def write_line(path: str | os.PathLike, line: str) -> None:
    """Add a line by a single write, so that a kill cannot tear it; where the disk is full, add nothing.

    Raises:
        OSError: as `open_append`, or the disk is full.
    """
    data = line.encode() + b"\n"
    with open_append(path) as file:
        size = os.fstat(file.fileno()).st_size
        if os.write(file.fileno(), data) < len(data):
            os.ftruncate(file.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(Path(path)))
