"""Downloads over HTTP that survive broken connections: resumed, checked, and atomic.

A download goes to `partial/NAME` in the folder of its target, with what identifies the server's version of the file in
`partial/NAME.json`, and is renamed only when it is whole and its checksum is right. What is not known about a file's
checksum is learnt at its first use, kept in `checksums/NAME.json`, and enforced from then on.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from di_refine import terminal
from torch_utils.misc import open_atomic

try:
    import fcntl
except ImportError:  # not on Windows: there two processes should not download the same file at the same time
    fcntl = None

if TYPE_CHECKING:
    import requests

TIMEOUT = 30.0  # seconds without a byte from the server
ATTEMPTS = 5  # connections for one file in one go; each goes on where the last one ended
PAUSE = 1.0  # seconds before the second attempt, twice as many before each further one
_BLOCK = 1 << 16


class DownloadError(RuntimeError):
    """A download failed; the text says why, as in 'the server answers 404 Not Found'."""


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file to `path`, going on where an earlier attempt ended.

    Proxies are those of the environment (`https_proxy` and so on). Several processes may ask for the same file: one
    downloads it, the others wait.

    Args:
        url: http or https; redirects are followed.
        path: where it goes; nothing incomplete or wrong ever gets this name.
        sha256: its checksum, or the first digits of it; None: the one remembered for `path`, if any.

    Raises:
        DownloadError: the server cannot be reached or does not deliver, or the checksum is wrong. What has arrived so
            far is kept for the next attempt, except when it is wrong.
    """
    with _Partial(path) as partial:
        if path.is_file():  # another process was faster
            return
        _receive_all(url, partial, path.name)
        digest = sha256_of(partial.path)
        expected = sha256 or remembered(path).get("sha256")
        if expected and not digest.startswith(expected):
            partial.discard()
            origin = "" if sha256 else f", which was recorded at its first use in {memory_path(path)}"
            raise DownloadError(f"its SHA-256 is {digest} instead of {expected}...{origin}")
        partial.finish()
    remember(path, digest, url)


# ---------------------------------------------------------------------------------------------------------------------
# Checksums.


def memory_path(path: Path) -> Path:
    """Where the checksum of a file is remembered."""
    return path.parent / "checksums" / f"{path.name}.json"


def remembered(path: Path) -> dict[str, Any]:
    """What is remembered of a file: `sha256`, `bytes`, `mtime_ns` and `url`; empty if nothing is."""
    try:
        known = json.loads(memory_path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(path: Path, digest: str, url: str) -> None:
    """Keep the checksum of a file that is right."""
    stat = path.stat()
    memory_path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(memory_path(path), "w") as file:
        json.dump({"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "url": url}, file, indent=1)


def fault(path: Path, url: str, sha256: str | None = None, thorough: bool = False) -> str | None:
    """What is wrong with a downloaded file, or None; a file seen for the first time is remembered.

    Args:
        path: an existing file.
        url: where it is from.
        sha256: its checksum, or the first digits of it, where that is known.
        thorough: read the file even if its size and time are those of when it was last checked.
    """
    known, stat = remembered(path), path.stat()
    expected = sha256 or known.get("sha256")
    unchanged = (known.get("bytes"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
    digest = known.get("sha256", "") if unchanged and not thorough else sha256_of(path)
    if expected and not digest.startswith(expected):
        origin = "" if sha256 else f", which {memory_path(path)} has from its first use"
        return f"its SHA-256 is {digest} instead of {expected}{origin}"
    if not unchanged:
        with contextlib.suppress(OSError):  # a cache that others maintain may be read-only
            remember(path, digest, url)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Connections.


class _Partial:
    """The unfinished file of a download, locked against other processes."""

    def __init__(self, path: Path):
        self.target = path
        self.path = path.parent / "partial" / path.name
        self._meta = self.path.with_name(f"{path.name}.json")
        self.file: IO[bytes]

    def __enter__(self) -> "_Partial":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = open(self.path, "a+b")
            if fcntl is not None:
                fcntl.flock(self.file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    return self
            self.file.close()  # while this process waited, another one finished or discarded the file

    def __exit__(self, *_: object) -> None:
        if not self.size() and self.path.exists():
            self.discard()
        self.file.close()

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def validator(self, url: str) -> str | None:
        """What the server called the version of which this is the beginning."""
        try:
            meta = json.loads(self._meta.read_text("utf-8"))
            return meta["validator"] if meta["url"] == url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def begin(self, url: str, validator: str | None) -> None:
        """Start from nothing."""
        self.file.truncate(0)
        with open_atomic(self._meta, "w") as file:
            json.dump({"url": url, "validator": validator}, file)

    def discard(self) -> None:
        for path in (self.path, self._meta):
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.path, self.target)
        self._meta.unlink(missing_ok=True)


def _receive_all(url: str, partial: _Partial, name: str) -> None:
    import requests  # slow to import, and only needed here

    for attempt in range(ATTEMPTS):
        try:
            return _receive(url, partial, name)
        except requests.RequestException as error:
            status = error.response.status_code if isinstance(error, requests.HTTPError) else None
            hopeless = status is not None and status < 500 and status != 416
            if hopeless or isinstance(error, requests.TooManyRedirects) or attempt == ATTEMPTS - 1:
                raise DownloadError(_reason(error)) from error
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _receive(url: str, partial: _Partial, name: str) -> None:
    """One connection: ask for what is missing, and append it.

    Raises:
        requests.RequestException: also when the connection ends early; what has arrived is in the file.
    """
    import requests

    have, validator = partial.size(), partial.validator(url)
    headers = {"Accept-Encoding": "identity"}  # or the length would be that of the compressed form
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise DownloadError(f"it redirects to {response.url}, which is not https")
        if response.status_code == 416:  # there is no such range any more
            partial.begin(url, None)
        response.raise_for_status()
        present = _validator(response)
        announced = response.headers.get("Content-Length", "")
        if response.status_code == 206:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if not resumed or present != validator:
                partial.begin(url, None)
                raise requests.ConnectionError("the server sends another part than the one asked for")
        else:
            have = 0
            partial.begin(url, present)
        total = have + int(announced) if announced.isdecimal() else None
        received = have
        response.raw.enforce_content_length = False  # or the last block before a break would be thrown away
        with terminal.progress(total, name, "B") as bar:
            bar.update(have)
            for block in response.iter_content(_BLOCK):
                partial.file.write(block)
                partial.file.flush()
                received += len(block)
                bar.update(len(block))
    if total is not None and received < total:
        raise requests.ConnectionError(f"the connection ended after {received} of {total} bytes")


def _validator(response: "requests.Response") -> str | None:
    """What `If-Range` may be asked with: a strong entity tag, else the date."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _reason(error: "requests.RequestException") -> str:
    import requests

    if isinstance(error, requests.HTTPError):
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"no answer within {TIMEOUT:g} seconds"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection ended early"
    if isinstance(error, requests.ConnectionError):
        text = str(error)
        return text if text.startswith(("the connection", "the server")) else "the server cannot be reached"
    return str(error)


def offline() -> bool:
    """Whether $DI_REFINE_OFFLINE forbids downloads."""
    return os.environ.get("DI_REFINE_OFFLINE", "") not in ("", "0")


def waiting(folder: Path) -> Iterator[Path]:
    """Unfinished downloads to a folder."""
    partial = folder / "partial"
    yield from (path for path in partial.glob("*") if path.suffix != ".json") if partial.is_dir() else ()
