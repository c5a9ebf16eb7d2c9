"""Downloads over HTTP by pooch: retried, checked, and never seen half-written under their names.

What is not known about a file's checksum is learnt at its first use, kept in `checksums/NAME.json` in the folder of the
file, and enforced from then on.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from di_refine import terminal
from torch_utils import safe_files

if TYPE_CHECKING:
    import requests

TIMEOUT = 30.0  # seconds without a byte from the server
ATTEMPTS = 5  # connections for one file; pooch waits one second before the second one, two before the third, ...
PATIENCE, MIN_RATE = 60.0, 10_000.0  # after so many seconds, so many bytes per second have to have come on average
MAX_SECONDS = 86_400.0  # that a file may take in all
MAX_BYTES = 1 << 36  # of one file; networks have up to 3 GB, and data sets are seldom downloaded by their address
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\xff]")
_UNREADABLE = "what cannot be read"


class DownloadError(RuntimeError):
    """A download failed; the text says why, as in 'the server answers 404 Not Found'."""


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a file to `path`, unless it is there.

    Proxies are those of the environment (`https_proxy` and so on). Several processes may ask for the same file: one
    downloads it, the others wait.

    Args:
        url: http or https; redirects are followed, but not from https to http.
        path: where it goes; nothing incomplete or wrong ever gets this name.
        sha256: its checksum, or the first digits of it; None: the one remembered for `path`, if any.

    Raises:
        DownloadError: the server cannot be reached or does not deliver, or the checksum is wrong.
    """
    import filelock  # like the other two, slow to import and rarely needed
    import pooch
    import requests

    def receive(address: str, temporary: str, _pooch: Any) -> None:
        try:
            _receive(address, temporary, path.name)
        except requests.RequestException as error:
            refused = error.response is not None and 400 <= error.response.status_code < 500
            if refused or isinstance(error, (requests.TooManyRedirects, ValueError)):
                raise DownloadError(_reason(error)) from error  # pooch would ask again
            raise
        if problem := fault(path, url, sha256, Path(temporary)):
            raise DownloadError(problem)

    pooch.get_logger().setLevel("WARNING")  # or it would announce every step on stderr
    memory_path(path).parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(memory_path(path).with_suffix(".lock")):
        try:
            source = pooch.create(path.parent, "", registry={path.name: None}, urls={path.name: url})
            source.retry_if_failed = ATTEMPTS - 1
            source.fetch(path.name, downloader=receive)
        except requests.RequestException as error:
            raise DownloadError(_reason(error)) from error


def _receive(url: str, path: str, name: str) -> None:
    """Write what the server sends to `path`; pooch's own downloader has no bounds and would follow a redirect to http.

    A server that sends a byte now and then never times out, so a thread receives and this one watches its progress.
    """
    outcome: list[Exception] = []
    received, given_up = [0], threading.Event()

    def work() -> None:
        try:
            _transfer(url, path, name, received, given_up)
        except Exception as error:
            outcome.append(error)

    thread, start = threading.Thread(target=work, daemon=True), time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(PATIENCE / 100)
        elapsed = time.monotonic() - start
        too_slow = elapsed > PATIENCE and received[0] < MIN_RATE * elapsed
        if thread.is_alive() and (too_slow or elapsed > MAX_SECONDS):
            given_up.set()
            raise DownloadError(f"the server is too slow: {received[0]} bytes in {elapsed:.0f} seconds")
    if outcome:
        raise outcome[0]


def _transfer(url: str, path: str, name: str, received: list[int], given_up: threading.Event) -> None:
    import requests

    headers = {"Accept-Encoding": "identity"}  # or the length would be that of the compressed form
    session = requests.Session()
    session.max_redirects = 10
    if url.startswith("https:"):
        session.adapters.pop("http://")  # so that nothing is sent where a redirect leads away from https
    with session, session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError("the server sends it compressed, though it was asked not to")
        response.raw.enforce_content_length = True  # as urllib3 does by itself since version 2
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() and len(length) < 20 else None
        _check_room(total or 0, path)
        os.unlink(path)  # pooch made it readable for its owner alone, and a cache may be shared
        with open(path, "xb") as file, terminal.progress(total, name, "B") as bar:
            for block in response.iter_content(1 << 16):
                if not received[0] and _is_text(block, name):
                    raise DownloadError("the server sends a web page or another text instead of the file")
                if given_up.is_set():
                    return
                received[0] += len(block)
                if received[0] > MAX_BYTES:
                    _check_room(received[0], path)
                file.write(block)
                bar.update(len(block))


def _check_room(size: int, path: str) -> None:
    """Raise DownloadError for a file that is too large for any use here, or for the disk."""
    free = shutil.disk_usage(os.path.dirname(path)).free
    if size > min(MAX_BYTES, free):
        limit = f"there may be {MAX_BYTES / 1e9:.0f}" if size > MAX_BYTES else f"the disk has {free / 1e9:.2g}"
        raise DownloadError(f"it has {size / 1e9:.3g} GB, and {limit}")


def _is_text(head: bytes, name: str) -> bool:
    """Whether a file that begins so is a text, as web pages and messages of servers are, and nothing read here is."""
    if name.endswith((".json", ".py", ".txt")):
        return False
    return head.lstrip().startswith(b"<") or not _BINARY.search(head[:1024])


def _reason(error: "requests.RequestException") -> str:
    import requests

    if isinstance(error, requests.exceptions.InvalidSchema):
        return "it redirects to an address that is not https"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"no answer within {TIMEOUT:g} seconds"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection ended early"
    return "the server cannot be reached" if isinstance(error, requests.ConnectionError) else str(error)


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal.

    Raises:
        OSError: it cannot be read, is none, or is larger than any network.
    """
    digest = hashlib.sha256()
    with safe_files.open_regular(path, safe_files.NETWORK_BYTES) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def memory_path(path: Path) -> Path:
    """Return where the checksum of a file is remembered."""
    return path.parent / "checksums" / f"{path.name}.json"


def remembered(path: Path) -> str | None:
    """Return the SHA-256 that is remembered of a file, or None; of a damaged memory, words that no SHA-256 equals."""
    try:
        digest = safe_files.read_json(memory_path(path))["sha256"]
        return digest if re.fullmatch("[0-9a-f]{64}", digest) else _UNREADABLE
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return _UNREADABLE  # which no file has


def fault(path: Path, url: str, sha256: str | None = None, received: Path | None = None) -> str | None:
    """Say what is wrong with a file, or return None; the checksum of one seen for the first time is remembered.

    Args:
        path: the file, or where it will be.
        url: where it is from.
        sha256: its checksum, or the first digits of it, where that is known.
        received: where it is meanwhile.
    """
    digest, known = sha256_of(received or path), remembered(path)
    expected = sha256 or known
    if expected and not digest.startswith(expected):
        origin = "" if sha256 else f", which was recorded at its first use in {memory_path(path)}"
        return f"its SHA-256 is {digest} instead of {expected}{origin}"
    if known is None:
        with open(received or path, "rb") as content:
            if not sha256 and _is_text(content.read(1024), path.name):
                return "it is a web page or another text"
        from torch_utils import misc  # imports PyTorch, which --help must not wait for

        with contextlib.suppress(OSError):  # a cache that others maintain may be read-only
            memory_path(path).parent.mkdir(parents=True, exist_ok=True)
            with misc.open_atomic(memory_path(path), "w") as file:
                json.dump({"sha256": digest, "url": terminal.without_secrets(url)}, file, indent=1)
    return None


def offline() -> bool:
    """Whether $DI_REFINE_OFFLINE forbids downloads."""
    return os.environ.get("DI_REFINE_OFFLINE", "") not in ("", "0")
