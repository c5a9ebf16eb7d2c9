"""From names and URLs of networks, data sets and statistics to local files.

`pretrained/registry.json` maps a name to a record: `file` (shipped in `pretrained/`) or `url` (downloaded once into the
cache folder), `kind`, `resolution`, `channels`, `classes`, what goes with it (`teacher`, `detector`, `statistics`,
each a name in the registry), `licence`, `note` and, where it is known, `sha256` (or its first digits). Records of `.pt`
files have `flags`: what such a file does not say of its network.

`python -m di_refine zoo list|fetch|verify` is the command line.
"""

import difflib
import functools
import hashlib
import os
import re
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from di_refine.errors import InputError
from di_refine.files import download, hub
from torch_utils import safe_files

KINDS = ("stylegan2", "edm", "features", "statistics", "dataset", "inception")
_TEXTS = ("file", "url", "sha256", "teacher", "detector", "statistics", "licence", "note")


def pretrained_folder() -> Path:
    """Return the folder with `registry.json` and the shipped files: beside the packages in a checkout, else in them."""
    beside = Path(__file__).resolve().parents[2] / "pretrained"
    if (beside / "registry.json").is_file():
        return beside
    return Path(str(resources.files("di_refine"))) / "pretrained"


def cache_folder() -> Path:
    """Return where downloads are kept: $DI_REFINE_CACHE, else ~/.cache/di-refine."""
    return Path(os.environ.get("DI_REFINE_CACHE") or Path.home() / ".cache" / "di-refine").expanduser()


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """Return all records by name, or none where no registry is installed.

    Raises:
        InputError: the registry is damaged, or has a record that is none.
    """
    path = pretrained_folder() / "registry.json"
    if not path.is_file():
        return {}
    try:
        records = safe_files.read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); restore it") from None
    if not isinstance(records, dict):
        raise InputError(f"{path} is no table of records by name; restore it")
    for name, record in records.items():
        if fault := _fault(name, record):
            raise InputError(f"{path}: the record of {name!r} cannot be used: {fault}; restore it")
    return records


def _fault(name: str, record: Any) -> str | None:
    """Say what is wrong with a record, or return None."""
    if not isinstance(record, dict):
        return "it is no object"
    if record.get("kind") not in KINDS:
        return f"its kind is none of {', '.join(KINDS)}"
    if ("file" in record) == ("url" in record):
        return "it needs either a file or a url"
    if wrong := next((key for key in _TEXTS if not isinstance(record.get(key, ""), str)), None):
        return f"its {wrong} is no text"
    if not all(_is_file_name(text) for text in (name, record.get("file", name))):
        return "a file has to be named without a folder, in at most 200 characters"
    try:
        urlsplit(record.get("url", ""))
    except ValueError as error:
        return f"its url is none ({error})"
    numbers = {key: record.get(key, 0) for key in ("resolution", "channels", "classes")}
    if wrong := next((key for key, number in numbers.items() if type(number) is not int), None):
        return f"its {wrong} is no whole number"
    if wrong := next((key for key in ("refine", "distill") if not isinstance(record.get(key, {}), dict)), None):
        return f"its {wrong} is no object"
    names = {key: record.get(key, []) for key in ("metrics", "final_metrics")}
    texts = {
        key: isinstance(value, list) and all(isinstance(text, str) for text in value) for key, value in names.items()
    }
    return next((f"its {key} is no list of texts" for key, right in texts.items() if not right), None)


def _is_file_name(text: str) -> bool:
    return text.isprintable() and 0 < len(text) <= 200 and text not in (".", "..") and not set(text) & set("/\\")


def find(name: str) -> str | None:
    """Return the full name in the registry for a name that may lack its extension, or None."""
    known = registry()
    if name in known:
        return name
    matches = [full for full in known if full.rpartition(".")[0] == name]
    return matches[0] if len(matches) == 1 else None


def entry(name: str) -> dict[str, Any]:
    """Return the record of a name that may lack its extension; the full name is added to it as `name`.

    Raises:
        InputError: there is no such record; the message lists the nearest names.
    """
    full = find(name)
    if full is None:
        raise InputError(f"{name!r} is not in pretrained/registry.json; {_nearest(name)}")
    return {"name": full, **registry()[full]}


def entry_for_path(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the record of a file that was shipped or downloaded, by its file name, or None for any other file."""
    name = Path(path).name
    by_url = (full for full, record in registry().items() if "url" in record and name == _url_name(record["url"]))
    full = name if name in registry() else next(by_url, None)
    return None if full is None else {"name": full, **registry()[full]}


def companion(path: str | os.PathLike, role: str, offline: bool = False) -> Path | None:
    """Return the file that, as the registry says, goes with another one.

    Args:
        path: a local file, as `resolve` returns it.
        role: 'teacher', 'detector' or 'statistics'.
        offline: take it only from this machine.

    Returns:
        A local file, or None when the registry knows no such thing for this file.

    Raises:
        InputError: as `resolve` does.
    """
    record = entry_for_path(path)
    name = record and record.get(role)
    return resolve(name, setting=role, offline=offline) if name else None


def resolve(
    source: str | os.PathLike,
    setting: str = "network",
    kind: str | tuple[str, ...] | None = None,
    offline: bool = False,
) -> Path:
    """Return the local file for a path, a name in the registry, or a URL; it is downloaded at most once.

    Args:
        source: the path, the name, which may lack its extension, the URL, or hf:organisation/name of a model of the
            Hugging Face hub; an existing path goes before a name.
        setting: the name of the setting that holds it, for messages.
        kind: what is needed, one or several of `KINDS`; a name of another kind is refused.
        offline: take it only from this machine.

    Raises:
        InputError: there is no such file or name, the name is of another kind, or the download fails; then the message
            says where to put the file by hand.
    """
    text = os.fspath(source)
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~name, and there is no such user
        path = Path(text)
    if os.path.exists(path):  # which, unlike Path, takes a name of any length for no file
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for, a device read for ever
            raise InputError(f"{setting}={text} is neither a file nor a folder")
        return path
    if text.startswith(hub.PREFIX):
        return hub.fetch(text, setting, offline)
    if re.match(r"https?://", text):
        return _fetch(text, _cached_path(text, None), None, f"{setting}={text}", offline)
    full = find(text)
    if full is None and len(path.parts) > 1:
        raise InputError(f"{setting}={text}: there is no such file")
    if full is None:
        raise InputError(f"{setting}={text} is neither a file nor a name in pretrained/registry.json; {_nearest(text)}")
    record = registry()[full]
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds and record["kind"] not in kinds:
        raise InputError(f"{setting}={text} is of kind {record['kind']}, but `{setting}` needs {' or '.join(kinds)}")
    if "file" in record:
        shipped = pretrained_folder() / record["file"]
        if not shipped.is_file():
            raise InputError(f"{setting}={text}: {shipped} belongs to this project but is missing; restore it")
        return shipped
    return _fetch(record["url"], _cached_path(record["url"], full), record.get("sha256"), f"{setting}={text}", offline)


def _url_name(url: str) -> str:
    return unquote(PurePosixPath(urlsplit(url).path).name)


def _cached_path(url: str, name: str | None) -> Path:
    """Return where the file of a URL is kept: under its name in the registry, or where it has none, with a hash."""
    name = name or next((full for full, record in registry().items() if record.get("url") == url), None)
    if name is None:
        base = re.sub(r"[^\w.-]", "_", _url_name(url), flags=re.ASCII)[-100:] or "download"
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{base}"
    return cache_folder() / name


def _nearest(name: str) -> str:
    known = list(registry())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"the nearest names are {', '.join(near)}" if near else f"known names are {', '.join(known)}"


def _fetch(url: str, path: Path, sha256: str | None, what: str, offline: bool) -> Path:
    """Download a file unless it is there, and check it in either case; messages begin with `what`."""
    by_hand = f"download {url} by other means and save it as {path}"
    if path.is_file():
        problem = download.fault(path, url, sha256)
        if problem:
            raise InputError(f"{what}: {path} is not what it was or should be: {problem}; delete it, or {by_hand}")
        return path
    if offline or download.offline():
        raise InputError(f"{what}: {path.name} is not in the cache and downloading is off; {by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download.fetch(url, path, sha256)
    except download.DownloadError as error:
        raise InputError(f"{what}: cannot download {url} ({error}); {by_hand}") from error
    return path


def state(name: str) -> str:
    """Say where the file of a name is: 'shipped', 'cached' or 'missing'."""
    record = registry()[name]
    if "file" in record:
        return "shipped" if (pretrained_folder() / record["file"]).is_file() else "missing"
    return "cached" if (cache_folder() / name).is_file() else "missing"
