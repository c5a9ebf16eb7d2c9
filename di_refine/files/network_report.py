"""What is in a network file, found out without building or executing any of it."""

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from di_refine.files import diffusers_folder, networks, registry, safetensors_pair, torch_file
from torch_utils import misc, persistence, safe_files
from torch_utils.persistence import TENSORFLOW_NETWORK, Opaque, Record, Unknown, printable

_KINDS = {
    "Generator": "stylegan2",
    "Discriminator": "stylegan2",
    TENSORFLOW_NETWORK: "stylegan2 (TensorFlow)",
    "AugmentPipe": "augmentation",
    **dict.fromkeys(("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"), "edm"),
    "Precond": "edm2",
    "ADMPrecond": "diffusion (ADM)",
    "DiffusersPrecond": "diffusion (diffusers)",
    **dict.fromkeys(("EDMLoss", "VPLoss", "VELoss", "EDM2Loss"), "loss"),
}
_MAX_TEXT = 300  # characters of a value that are shown
_OWN_MODULES = (
    "stylegan2_ada/networks.py",
    "stylegan2_ada/augment.py",
    "di_refine/edm/networks.py",
    "di_refine/edm2/networks.py",
    "di_refine/ddpm/networks.py",
)


def describe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Say what is in a network file.

    Returns:
        A report with `file`, `bytes`, `sha256`, `networks` and `objects` (per key of the file: kind, class, constructor
        arguments, counts) and `settings` (all that is plain data); and the embedded source texts by SHA-256.

    Raises:
        NetworkFormatError: not a network file.
    """
    is_pair = path.suffix in safetensors_pair.SUFFIXES
    files = [safetensors_pair.tensors_path(path) if is_pair else path]
    if path.is_dir() and diffusers_folder.is_folder(path) or torch_file.is_torch_file(path):
        # These hold tensors alone. Building the network checks the rest.
        files = diffusers_folder.files(path) if path.is_dir() else files
        content = persistence.to_records(networks.read(path), path)
    else:
        content = safetensors_pair.load_records(path) if is_pair else persistence.load_records(path)
    report: dict[str, Any] = {
        "file": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": networks.digest(files[0] if is_pair else path),
        "networks": {},
        "objects": {},
        "settings": {},
    }
    texts: dict[str, str] = {}
    for key, value in content.items():
        key = printable(key)
        if isinstance(value, (Opaque, Unknown)):
            value = Record(str(persistence.unknown_in(value)), {})
        if not isinstance(value, Record):
            report["settings"][key] = _plain(value)
            continue
        found = (layer.module_src for _, layer in _walk(value))
        texts |= {_hash(text): text for text in found if text is not None}
        entry = _describe(value)
        report["networks" if entry["parameters"] else "objects"][key] = entry
    return report, texts


def _describe(record: Record) -> dict[str, Any]:
    layers = list(_walk(record))
    tensors = [item for path, layer in layers for item in _tensors(path, layer)]
    is_tf = record.class_name == TENSORFLOW_NETWORK
    kwargs = record.state.get("static_kwargs") if is_tf else record.init_kwargs
    return {
        "kind": _KINDS.get(record.class_name, "other"),
        "class": printable(record.class_name),
        "init_args": _plain(record.init_args if isinstance(record.init_args, tuple) else ()),
        "init_kwargs": _plain(kwargs if isinstance(kwargs, dict) else {}),
        "parameters": sum(_size(item) for _, item in tensors if is_tf or isinstance(item, torch.nn.Parameter)),
        "tensors": len(tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors}),
        "layers": len(layers),
        "source": None if record.module_src is None else _hash(record.module_src),
        "tensor_list": {printable(name): list(tensor.shape) for name, tensor in tensors},
    }


def _size(tensor: Any) -> int:
    return tensor.numel() if isinstance(tensor, torch.Tensor) else tensor.size


def _walk(record: Record) -> Iterator[tuple[str, Record]]:
    """Give the record and all below it, with their full names and separators; each once, even in a circle."""
    seen: set[int] = set()
    pending = [("", record)]
    while pending:
        path, record = pending.pop()
        if id(record) in seen or len(path) > _MAX_TEXT:
            continue
        seen.add(id(record))
        yield path, record
        for table, separator in (("_modules", "."), ("components", "/")):
            children = [(name, item) for name, item in _entries(record, table) if isinstance(item, Record)]
            pending += [(f"{path}{name}{separator}", item) for name, item in reversed(children)]


def _tensors(path: str, record: Record) -> Iterator[tuple[str, Any]]:
    """Give the parameters, buffers and TensorFlow variables of one layer with their full names."""
    for table in ("_parameters", "_buffers"):
        for name, tensor in _entries(record, table):
            if isinstance(tensor, torch.Tensor):
                yield f"{path}{name}", tensor
    variables = record.state.get("variables")
    for item in variables if isinstance(variables, list) else ():
        if isinstance(item, tuple) and len(item) == 2:
            value = np.float32(item[1]) if isinstance(item[1], float) else getattr(item[1], "value", None)
            if isinstance(value, (np.ndarray, np.generic)):
                yield f"{path}{printable(item[0])}", value


def _entries(record: Record, table: str) -> list[tuple[Any, Any]]:
    entries = record.state.get(table)
    return list(entries.items()) if isinstance(entries, dict) else []


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any, budget: list[int] | None = None) -> Any:
    """Return a value for JSON, of limited length whatever the file says."""
    budget = [1000] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        return "..."
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return printable(value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "...")
    if isinstance(value, dict):
        return {printable(key): _plain(item, budget) for key, item in value.items() if budget[0] > 0}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item, budget) for item in value if budget[0] > 0]
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return printable(value)


# ---------------------------------------------------------------------------------------------------------------------
# Source texts.


def judge_sources(texts: dict[str, str], file_name: str) -> dict[str, dict[str, Any]]:
    """Say of each embedded source text where it was seen before, and remember it.

    Known are the texts of this project's own modules, and those of files inspected earlier, which the cache folder
    keeps in `sources.json`.

    Args:
        texts: source texts by SHA-256.
        file_name: the file that they are from.

    Returns:
        Per SHA-256: `new`, and `seen`, a sentence.
    """
    memory = registry.cache_folder() / "sources.json"
    try:
        remembered = safe_files.read_json(memory)
        remembered = remembered if isinstance(remembered, dict) else {}
    except (OSError, ValueError):
        remembered = {}
    own = {_module_hash(name): name for name in _OWN_MODULES}
    today = datetime.date.today().isoformat()
    result = {}
    for digest in texts:
        if digest in own:
            result[digest] = {"new": False, "seen": f"this project's own {own[digest]}"}
        elif digest in remembered:
            result[digest] = {"new": False, "seen": f"first seen in {printable(remembered[digest])}"}
        else:
            result[digest] = {"new": True, "seen": "not seen before"}
            remembered[digest] = f"{printable(file_name)} on {today}"
    if any(verdict["new"] for verdict in result.values()):
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            with misc.open_atomic(memory, "w") as file:
                json.dump(remembered, file, indent=1)
        except OSError:  # a read-only home: warn again next time
            pass
    return result


def _module_hash(name: str) -> str | None:
    path = Path(__file__).resolve().parents[2] / name
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
