"""Downloads over HTTP by pooch: retried, checked, and never seen half-written under their names.

What is not known about a file's checksum is learnt at its first use, kept in `checksums/NAME.json` in the folder of the
file, and enforced from then on.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from di_refine import terminal

if TYPE_CHECKING:
    import requests

TIMEOUT = 30.0  # seconds without a byte from the server
ATTEMPTS = 5  # connections for one file; pooch waits one second before the second one, two before the third, ...
_WEB_PAGE = (b"<!doctype html", b"<html")  # what a server sends that wants a login or a click first


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
    """Write what the server sends to `path`; pooch's own downloader would follow a redirect to http."""
    import requests

    headers = {"Accept-Encoding": "identity"}  # or the length would be that of the compressed form
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise DownloadError(f"it redirects to {response.url}, which is not https")
        response.raise_for_status()
        response.raw.enforce_content_length = True  # as urllib3 does by itself since version 2
        total = response.headers.get("Content-Length", "")
        os.unlink(path)  # pooch made it readable for its owner alone, and a cache may be shared
        with open(path, "xb") as file, terminal.progress(int(total) if total else None, name, "B") as bar:
            for block in response.iter_content(1 << 16):
                if not bar.count and block.lstrip().lower().startswith(_WEB_PAGE):
                    raise DownloadError("the server sends a web page instead of the file")
                file.write(block)
                bar.update(len(block))


def _reason(error: "requests.RequestException") -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return f"no answer within {TIMEOUT:g} seconds"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection ended early"
    return "the server cannot be reached" if isinstance(error, requests.ConnectionError) else str(error)


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    import pooch

    return pooch.file_hash(os.fspath(path), alg="sha256")


def memory_path(path: Path) -> Path:
    """Return where the checksum of a file is remembered."""
    return path.parent / "checksums" / f"{path.name}.json"


def remembered(path: Path) -> str | None:
    """Return the SHA-256 that is remembered of a file, or None."""
    try:
        return json.loads(memory_path(path).read_text("utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        with contextlib.suppress(OSError):  # a cache that others maintain may be read-only
            memory_path(path).parent.mkdir(parents=True, exist_ok=True)
            memory_path(path).write_text(json.dumps({"sha256": digest, "url": url}, indent=1), "utf-8")
    return None


def offline() -> bool:
    """Whether $DI_REFINE_OFFLINE forbids downloads."""
    return os.environ.get("DI_REFINE_OFFLINE", "") not in ("", "0")
