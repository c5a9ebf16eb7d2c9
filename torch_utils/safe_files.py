"""Files that somebody else may have put there: opened only where they are regular files, written only where no link is.

Opening a pipe would wait for a writer for ever, reading a device would never end, and writing through a symbolic link
would change a file that nobody named. Every reader of a file that a user names opens it here first, also where a
library then opens it by its name. All failures are `OSError`, whose `strerror` is the end of a sentence.
"""

import errno
import io
import json
import os
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # Windows has neither pipes nor links like these
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

JSON_BYTES = 1 << 24  # of a JSON text with no bound of its own; its values take up to 16 times the memory
JSON_CONTAINERS = 500_000  # lists and objects in it
NETWORK_BYTES = 1 << 33  # the largest published network of the kinds read here has 3 GB
SAFETENSORS_HEADER = 1 << 22  # bytes; that of a network with 10,000 tensors has 1 MB
SAVED_PICKLE = 1 << 26  # bytes of what torch.save writes beside the tensors; a state with 10,000 tensors has 2 MB
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
#: What pickles of tensors and plain values name, none of which makes more than there is in the file.
SAVED_NAMES = {
    "collections OrderedDict",
    *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(f"torch {name}Storage" for name in _STORAGES),
}


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


def check_saved(file: IO[bytes], size: int, also: Iterable[str] = ()) -> list[zipfile.ZipInfo]:
    """Check a file of `torch.save` before `torch.load(weights_only=True)` reads it, which has no bounds of its own.

    Such a call takes bytes from packed entries, and calls what makes arrays of any size, as `bytearray(1 << 40)`.

    Args:
        file: in either of PyTorch's formats, a zip file or a row of pickles.
        size: its bytes.
        also: names, such as "argparse Namespace", that its pickle may ask for besides those of tensors.

    Returns:
        The entries of the zip file; none for the other format.

    Raises:
        zipfile.BadZipFile: entries are packed or overlap, or PyTorch would find others than Python does.
        pickle.UnpicklingError: it holds more than tensors and plain values.
    """
    file.seek(0)
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(5):  # a number, a version, facts of the machine, the content, and what is stored behind it
            _check_pickle(file, also)
        return []
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are packed, or overlap")
        if archive.start_dir != _directory(file, size):  # Python allows for bytes before the archive, PyTorch does not
            raise zipfile.BadZipFile("its directory is not where it says")
        pickles = [entry for entry in entries if entry.orig_filename.lower().endswith("data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"it has {len(pickles)} entries named data.pkl")
        if pickles[0].file_size > SAVED_PICKLE:
            raise zipfile.BadZipFile(f"its data.pkl has more than {SAVED_PICKLE} bytes")
        with archive.open(pickles[0]) as content:
            _check_pickle(io.BytesIO(content.read()), also)
        return entries


def _directory(file: IO[bytes], size: int) -> int | None:
    """Return where the directory of a zip file begins, as its end says; None if the end is not as PyTorch writes it."""
    file.seek(max(0, size - 98))
    end = file.read(98)
    if end[-22:-18] != b"PK\5\6":
        return None
    if end[-42:-38] != b"PK\6\7":
        return int.from_bytes(end[-6:-2], "little")
    record = int.from_bytes(end[-34:-26], "little")
    return int.from_bytes(end[-50:-42], "little") if end[:4] == b"PK\6\6" and record == size - 98 else None


def _check_pickle(file: IO[bytes], also: Iterable[str]) -> None:
    """Read a pickle to its end, making nothing of it."""
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and argument not in {*SAVED_NAMES, *also}:
                raise pickle.UnpicklingError(f"its pickle asks for {argument}, which no tensor needs")
            if opcode.name == "PROTO" and argument != 2:  # of which PyTorch would warn
                raise pickle.UnpicklingError(f"its pickle has protocol {argument}, and torch.save writes 2")
    except ValueError as error:
        raise pickle.UnpicklingError(f"it is no pickle ({error})") from None


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
