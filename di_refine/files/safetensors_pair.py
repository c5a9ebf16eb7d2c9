"""Network files as `safetensors` and JSON: any tool can read this form, and it turns back into the same pickle.

`NAME.safetensors` has every tensor under the name of its network and its own, as in `G_ema.mapping.w_avg`. `NAME.json`
has all the rest:

    format, version     "di-refine-networks", 1
    tensors             {"file": "NAME.safetensors", "sha256": ...}: the tensors that belong to it
    sources             {sha256: text}: the source texts embedded in the pickle, kept to be written back, never executed
    shared              values that stand in several places, which refer to them as {"$shared": index}
    content             the pickle's dictionary; networks are
                        {"$record": class name, "source": sha256, "version": 6, "state": {attribute: value, ...}}
                        with the constructor arguments in state._init_args and state._init_kwargs

Values that JSON does not have are objects with one key that begins with a dollar sign:

    {"$tensor": name}, {"$parameter": name}     with "stride" where the tensor is not stored row by row
    {"$tuple": [...]}, {"$set": [...]}, {"$dict": [[key, value], ...]}, {"$ordered": [[key, value], ...]}
    {"$float": "inf" | "-inf" | "nan"}, {"$bytes": base64}
"""

import base64
import binascii
import hashlib
import json
import math
import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from di_refine.files.download import sha256_of
from torch_utils import misc, persistence, safe_files
from torch_utils.persistence import NetworkFormatError, Record, printable

FORMAT, VERSION = "di-refine-networks", 1
SUFFIXES = (".safetensors", ".json")
_TABLES = ("_parameters", "_buffers", "_modules")  # whose entries are named without them, as in a state dictionary


def config_path(path: str | os.PathLike) -> Path:
    """Return the `.json` of the pair that `path` belongs to."""
    return Path(path).with_suffix(".json")


def tensors_path(path: str | os.PathLike) -> Path:
    """Return the `.safetensors` of the pair that `path` belongs to."""
    return Path(path).with_suffix(".safetensors")


def save(networks: dict[str, Any], path: str | os.PathLike) -> list[str]:
    """Write networks as `NAME.safetensors` and `NAME.json`.

    Args:
        networks: as `torch_utils.persistence.load` returns them.
        path: either of the two files.

    Returns:
        The keys of what is left out, because it is of a class that is not known here.

    Raises:
        NetworkFormatError: something in `networks` cannot be written into such files.
    """
    left_out = [key for key, value in networks.items() if persistence.unknown_in(value) is not None]
    networks = {key: value for key, value in networks.items() if key not in left_out}
    content = persistence.to_records(networks, path)
    encoder = _Encoder()
    try:
        encoder.count(content)
        encoded = {key: encoder.encode(value, key) for key, value in content.items()}
    except (TypeError, RecursionError) as error:
        raise NetworkFormatError(f"{os.fspath(path)}: not written: {error}") from error
    blob = safetensors.torch.save(encoder.tensors, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {"file": tensors_path(path).name, "sha256": hashlib.sha256(blob).hexdigest()},
        "sources": encoder.sources,
        "shared": encoder.shared,
        "content": encoded,
    }
    with misc.open_atomic(tensors_path(path)) as file:
        file.write(blob)
    with misc.open_atomic(config_path(path), "w") as file:
        json.dump(config, file, indent=1, allow_nan=False)
    return left_out


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read such a pair, with the same result and the same checks as `torch_utils.persistence.load` on the pickle.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    return persistence.from_records(load_records(path), os.fspath(path))


def load_either(path: str | os.PathLike, notes: list[str] | None = None) -> dict[str, Any]:
    """Read a pair, or where `path` has another ending than those of a pair, a pickle.

    Args:
        path: either file of a pair, or the pickle.
        notes: a sentence is added for each part of the file that is of no use here.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    if Path(path).suffix in SUFFIXES:
        return persistence.from_records(load_records(path), os.fspath(path), notes)
    return persistence.load(path, notes)


def load_records(path: str | os.PathLike) -> dict[str, Any]:
    """Read a pair as `torch_utils.persistence.load_records` reads a pickle: before any network is built.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    config_file, tensors_file = config_path(path), tensors_path(path)
    config = _read_config(config_file)
    try:
        safe_files.check_safetensors(tensors_file)
        digest = sha256_of(tensors_file)
        _need(digest == config["tensors"].get("sha256"), f"{tensors_file.name} is not the file it was written with")
        tensors = safetensors.torch.load_file(tensors_file)
        decoder = _Decoder(config, tensors)
        content = {key: decoder.decode(value) for key, value in config["content"].items()}
        persistence.check_shared(content)
        _need(not tensors, f"nothing refers to the tensor '{printable(next(iter(tensors), ''))}'")
    except NetworkFormatError as error:
        raise NetworkFormatError(f"{config_file}: {error}") from None
    except OSError as error:
        raise NetworkFormatError(f"{tensors_file}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise NetworkFormatError(f"{tensors_file}: {printable(error)}") from error
    except (RecursionError, MemoryError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise NetworkFormatError(f"{config_file}: damaged ({type(error).__name__}: {printable(error)})") from error
    return content


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise NetworkFormatError(what)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with safe_files.open_regular(path, safe_files.JSON_BYTES) as file:
            config = safe_files.parse_json(file.read(), object_pairs_hook=_object, parse_constant=_no_constant)
        _need(isinstance(config, dict) and config.get("format") == FORMAT, f"its format is not '{FORMAT}'")
        _need(config.get("version") == VERSION, f"version {printable(config['version'])}; only {VERSION} is known")
        for key, kind in {"tensors": dict, "sources": dict, "shared": list, "content": dict}.items():
            _need(isinstance(config.get(key), kind), f"'{key}' is missing or malformed")
    except NetworkFormatError as error:
        raise NetworkFormatError(f"{path}: {error}") from None
    except OSError as error:
        raise NetworkFormatError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, RecursionError) as error:  # also what is not UTF-8 or not JSON
        raise NetworkFormatError(f"{path}: no JSON that can be read ({printable(error)})") from error
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _Encoder:
    """Turns content into JSON's types; `tensors`, `sources` and `shared` collect what is not written in place."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.sources: dict[str, str] = {}
        self.shared: list[Any] = []
        self._uses: Counter[int] = Counter()
        self._index: dict[int, int] = {}
        self._hashes: dict[int, str] = {}

    def count(self, value: Any) -> None:
        """Find out what stands in several places; call this first, with everything."""
        if not isinstance(value, (Record, torch.Tensor, dict, list, tuple, set)) or (
            type(value) is tuple and not value
        ):
            return  # no identity to keep; all empty tuples are one in Python
        self._uses[id(value)] += 1
        if self._uses[id(value)] > 1:
            return
        if isinstance(value, Record):
            self.count(value.state)
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                self.count(item)

    def encode(self, value: Any, path: str) -> Any:
        """Return the JSON form of `value`; tensors in it get names that begin with `path`."""
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if self._uses[id(value)] < 2:
            return self._encode(value, path)
        if id(value) not in self._index:
            self._index[id(value)] = len(self.shared)
            self.shared.append(None)
            self.shared[self._index[id(value)]] = self._encode(value, path)
        return {"$shared": self._index[id(value)]}

    def _encode(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._encode_tensor(value, path)
        if isinstance(value, Record):
            return self._encode_record(value, path)
        if isinstance(value, (bytes, memoryview)):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, dict):
            return self._encode_dict(value, path)
        if isinstance(value, set):
            return {"$set": sorted(value)}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{path}.{index}") for index, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise TypeError(f"a {type(value).__name__} has no place in such a file")

    def _encode_tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        name, number = path, 1
        while name in self.tensors:
            name, number = f"{path}#{number}", number + 1
        self.tensors[name] = tensor.detach().contiguous()
        encoded = {"$parameter" if isinstance(tensor, torch.nn.Parameter) else "$tensor": name}
        return encoded if tensor.is_contiguous() else {**encoded, "stride": list(tensor.stride())}

    def _encode_record(self, record: Record, path: str) -> dict[str, Any]:
        text = record.module_src
        if text is not None and id(text) not in self._hashes:
            self._hashes[id(text)] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            self.sources[self._hashes[id(text)]] = text
        state = {}
        for name, value in record.state.items():
            if name in _TABLES and isinstance(value, dict) and self._uses[id(value)] < 2:
                state[name] = self._encode_dict(value, path)
            else:
                state[name] = self.encode(value, f"{path}.{name}")
        source = None if text is None else self._hashes[id(text)]
        return {"$record": record.class_name, "source": source, "version": record.version, "state": state}

    def _encode_dict(self, value: dict, path: str) -> dict[str, Any]:
        items = [(key, self.encode(item, f"{path}.{key}")) for key, item in value.items()]
        if isinstance(value, OrderedDict):
            return {"$ordered": [list(item) for item in items]}
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$dict": [list(item) for item in items]}


class _Decoder:
    """Turns JSON's types back into content; every tensor that it uses is taken out of `tensors`."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]):
        self.sources, self.shared, self.tensors = config["sources"], config["shared"], tensors
        self._finished: dict[int, Any] = {}
        self._kinds = {
            "$tensor": self._tensor,
            "$parameter": lambda v: torch.nn.Parameter(self._tensor({"$tensor": v.pop("$parameter"), **v}), False),
            "$record": self._record,
            "$shared": lambda v: self._shared(v["$shared"]),
            "$tuple": lambda v: tuple(self.decode(item) for item in v["$tuple"]),
            "$set": lambda v: self._set(v["$set"]),
            "$dict": lambda v: {self._key(key): self.decode(item) for key, item in v["$dict"]},
            "$ordered": lambda v: OrderedDict((self._key(key), self.decode(item)) for key, item in v["$ordered"]),
            "$float": lambda v: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[v["$float"]],
            "$bytes": lambda v: self._bytes(v["$bytes"]),
        }

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        mark = next(iter(value), "")
        if mark.startswith("$"):
            _need(mark in self._kinds, f"'{printable(mark)}' is not known")
            return self._kinds[mark](value)
        _need(not any(key.startswith("$") for key in value), "an object with a marked and other keys")
        return {key: self.decode(item) for key, item in value.items()}

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        name, stride = value["$tensor"], value.get("stride")
        _need(name in self.tensors, f"the tensor '{printable(name)}' is missing, or used twice")
        tensor = self.tensors.pop(name)
        if stride is None:
            return tensor
        sizes = [size for _, size in sorted(zip(stride, tensor.shape)) if size > 1]
        steps = [step for step, size in sorted(zip(stride, tensor.shape)) if size > 1]
        dense = len(stride) == tensor.ndim and all(step == math.prod(sizes[:i]) for i, step in enumerate(steps))
        _need(dense, f"the strides of '{printable(name)}' leave gaps or overlap")
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)

    def _record(self, value: dict[str, Any]) -> Record:
        source, state = value.get("source"), value.get("state")
        _need(type(value["$record"]) is str and isinstance(state, dict), "a malformed record")
        _need(source is None or source in self.sources, f"the source {printable(source)} is missing")
        _need(value.get("version") == 6, f"a record of version {printable(value.get('version'))}; only 6 is known")
        text = None if source is None else self.sources[source]
        _need(text is None or isinstance(text, str), "a source that is no text")
        return Record(value["$record"], self.decode(state), text)

    def _shared(self, index: Any) -> Any:
        _need(type(index) is int and 0 <= index < len(self.shared), "a reference to nothing")
        if index not in self._finished:
            definition, self.shared[index] = self.shared[index], {"$circular": None}
            self._finished[index] = self.decode(definition)
        return self._finished[index]

    @staticmethod
    def _key(key: Any) -> Any:
        _need(type(key) in (str, int), "a key that is neither text nor a whole number")
        return key

    @staticmethod
    def _set(items: Any) -> set[str]:
        _need(isinstance(items, list) and all(type(item) is str for item in items), "a malformed set")
        return set(items)

    @staticmethod
    def _bytes(text: Any) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            raise NetworkFormatError("malformed bytes") from None
