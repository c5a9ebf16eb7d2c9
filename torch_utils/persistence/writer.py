"""Writes records in the layout of the official persistence code, through Python's own picklers."""

import dataclasses
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

from torch_utils.persistence.machine import Opaque, Unknown
from torch_utils.persistence.reader import (
    STORAGE_DTYPES,
    STORAGE_MAGIC,
    STORAGE_PROTOCOL,
    Array,
    Record,
    unknown_in,
)

PROTOCOL = 4


def write(content: dict[str, Any], file: IO[bytes], reconstruct: Callable) -> None:
    """Pickle `content`: plain data (see `plain`), CPU tensors, and records, which become calls of `reconstruct`."""
    kind = _Pickler if unknown_in(content) is None else _InertPickler
    kind(file, reconstruct).dump(content)


def plain(value: Any, memo: dict[Any, Any] | None = None) -> Any:
    """Return a copy of `value` made of nothing but Python's own data types, numeric arrays, CPU tensors, records, and
    what is unknown and inert; sharing is kept.

    NumPy scalars become Python numbers and dictionaries of other kinds plain ones (except ordered ones). Records of
    torch's ModuleDict become one that holds records.

    Raises:
        TypeError: there is anything else in it; the message has its type.
    """
    memo = {} if memo is None else memo
    if type(value) is str:
        return memo.setdefault(value, value)  # one object each, so that a pickle does not depend on where they are from
    if value is None or type(value) in (bool, int, float, bytes):
        return value
    if id(value) in memo:
        return memo[id(value)][1]
    if isinstance(value, np.generic):
        copy = value.item()
    elif isinstance(value, memoryview):
        copy = bytes(value)
    elif isinstance(value, torch.nn.Parameter):
        copy = torch.nn.Parameter(cpu_tensor(value), requires_grad=False)
    elif isinstance(value, torch.Tensor):
        copy = cpu_tensor(value)
    elif isinstance(value, Record):
        name, text = plain(value.class_name, memo), plain(value.module_src, memo)
        copy = dataclasses.replace(value, class_name=name, module_src=text, state=plain(value.state, memo))
        copy = _module_dict(copy) if value.module_src is None else copy
    elif type(value) is torch.nn.ModuleDict:
        copy = _module_dict(Record("ModuleDict", plain(vars(value), memo)))
    elif isinstance(value, Opaque):
        copy = Opaque(value.root, plain(value.maker, memo), plain(value.args, memo), value.new)
        memo[id(value)] = (value, copy)  # before the rest of it, in which it may stand itself
        copy.state, copy.items, copy.pairs = (plain(item, memo) for item in (value.state, value.items, value.pairs))
    elif isinstance(value, Unknown):
        copy = value
    elif isinstance(value, Array) and value.value is not None:
        copy = value.value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        copy = value
    elif isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        copy = kind((plain(key, memo), plain(item, memo)) for key, item in value.items())
    elif isinstance(value, (list, set)):
        copy = type(value)(plain(item, memo) for item in value)
    elif isinstance(value, tuple):
        copy = tuple(plain(item, memo) for item in value)
    else:
        raise TypeError(f"a {type(value).__name__} cannot be written into a network pickle")
    memo[id(value)] = (value, copy)  # the value itself too, so that its id stays its own
    return copy


def _module_dict(record: Record) -> torch.nn.ModuleDict:
    """Return torch's own container with records where its modules would be, which only serves pickling."""
    if record.class_name != "ModuleDict":
        raise TypeError(f"a {record.class_name} cannot be written into a network pickle")
    container = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
    container.__dict__.update(record.state)
    return container


def cpu_tensor(
    tensor: torch.Tensor, dtype: torch.dtype | None = None, stride: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return `tensor` on the CPU without history, dense, alone in its storage, and by default with its own strides."""
    result = tensor.detach().to("cpu", dtype or tensor.dtype)
    stride = stride or result.stride()
    if not _is_dense(result.shape, stride):
        result = result.contiguous()
    elif result.stride() != stride:
        result = torch.empty_strided(result.shape, stride, dtype=result.dtype).copy_(result)
    alone = result.untyped_storage().nbytes() == result.numel() * result.element_size()
    return result if alone else result.clone()


def _is_dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape and stride fills its storage exactly once."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True


class _Storage:
    """The storage of a dense tensor that is alone in it; every storage of a file has another `key`."""

    def __init__(self, tensor: torch.Tensor, key: str):
        self.tensor = tensor
        self.key = key

    def blob(self) -> bytes:
        """Return the storage in torch's format from before 1.6, which the reader describes."""
        count = self.tensor.numel()
        info = {
            "protocol_version": STORAGE_PROTOCOL,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4},
        }
        content = self.tensor.as_strided([count], [1]).view(torch.uint8).numpy()
        header = (STORAGE_MAGIC, STORAGE_PROTOCOL, info)
        parts: list[bytes | memoryview] = [pickle.dumps(value, 2) for value in header]
        parts += [self._description(count), pickle.dumps([self.key], 2), struct.pack("<q", count), content.data]
        return b"".join(parts)

    def _description(self, count: int) -> bytes:
        storage_type = getattr(torch, _STORAGE_TYPES[self.tensor.dtype])
        description = ("storage", storage_type, self.key, "cpu", count, None)
        buffer = io.BytesIO()
        _DescriptionPickler(buffer, self, description).dump(self)
        return buffer.getvalue()


class _DescriptionPickler(pickle.Pickler):
    """A pickler that writes a storage as its description; from Python 3.13 on only a method of the class can say so."""

    def __init__(self, file: IO[bytes], storage: _Storage, description: tuple):
        super().__init__(file, protocol=2)
        self.storage = storage
        self.description = description

    def persistent_id(self, value: Any) -> Any:
        return self.description if value is self.storage else None


class _Reducing:
    """Mixed into a pickler: it writes tensors as torch does, but with storage keys that are the same each time."""

    def __init__(self, file: IO[bytes], reconstruct: Callable):
        super().__init__(file, protocol=PROTOCOL)  # type: ignore[call-arg]
        self.reconstruct = reconstruct
        self.storages = 0

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Record):
            meta = {"type": "class", "version": value.version, "module_src": value.module_src}
            return self.reconstruct, ({**meta, "class_name": value.class_name, "state": value.state},)
        if isinstance(value, torch.nn.Parameter):
            return _REBUILD_PARAMETER, (value.data, False, OrderedDict())
        if isinstance(value, torch.Tensor):
            self.storages += 1
            storage = _Storage(value, str(self.storages))
            return _REBUILD_TENSOR, (storage, 0, tuple(value.shape), value.stride(), False, OrderedDict())
        if isinstance(value, _Storage):
            return _LOAD_STORAGE, (value.blob(),)
        return NotImplemented


class _Pickler(_Reducing, pickle.Pickler):
    """The pickler for content in which all is known."""


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _InertPickler(_Reducing, _PythonPickler):
    """A pickler that can also write `Unknown` and `Opaque` as the file had them.

    Python's quick pickler would import what it names, to see whether it is there. The one that is written in Python
    lets every type have its own way.
    """

    dispatch = dict(_PythonPickler.dispatch)

    def _save_unknown(self, value: Unknown) -> None:
        for name in (_RENAMED.get(value.module, value.module), value.name):
            self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(value)

    def _save_opaque(self, value: Opaque) -> None:
        self.save(value.maker)
        self.save(value.args)
        if id(value) in self.memo:  # it stands in its own arguments
            raise RecursionError("an object that is its own argument")
        self.write(pickle.NEWOBJ if value.new else pickle.REDUCE)
        self.memoize(value)
        for items, opcode in ((value.items, pickle.APPENDS), (value.pairs, pickle.SETITEMS)):
            if items:
                self.write(pickle.MARK)
                for item in items:
                    self.save(item)
                self.write(opcode)
        if value.state is not None:
            self.save(value.state)
            self.write(pickle.BUILD)

    dispatch[Unknown], dispatch[Opaque] = _save_unknown, _save_opaque


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as Python 3 calls what protocol 2 names as Python 2 did


# The functions that torch names when it pickles a parameter, its tensor and its storage.
_REBUILD_PARAMETER, (_tensor, *_) = torch.nn.Parameter(torch.zeros(1), requires_grad=False).__reduce_ex__(PROTOCOL)
_REBUILD_TENSOR, (_storage, *_) = _tensor.__reduce_ex__(PROTOCOL)
_LOAD_STORAGE, _ = _storage.__reduce__()
_STORAGE_TYPES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
