"""The fixed list of globals that a network pickle may contain, what becomes of each, and torch's storage format.

Nothing here imports or calls what a file names. A global is looked up in `_GLOBALS`; everything else stays a name.
"""

import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torch_utils.persistence.machine import (
    Global,
    Machine,
    NetworkFormatError,
    Opaque,
    PersistentId,
    Unknown,
    need,
    printable,
)

#: Class name of a TensorFlow-era network's record; its state is the dictionary the network was pickled with.
TENSORFLOW_NETWORK = "dnnlib.tflib.network.Network"

#: Names of torch's storage classes. The two numbers after it begin every storage in torch's format from before 1.6.
STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

STORAGE_MAGIC = 0x1950A86A20F9469CFC6C
STORAGE_PROTOCOL = 1001

_NOT_PICKLES = (
    (b"PK\x03\x04", "a zip archive (a torch.save checkpoint, or .npz)"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"<", "a web page or XML; the download went wrong"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
)

_MAX_DIMS = 8


@dataclass(eq=False)
class Record:
    """A persistent object as it stands in a pickle, not rebuilt.

    Attributes:
        class_name: bare class name, such as 'Generator'.
        state: the object's instance dictionary; persistent objects within are records again.
        module_src: text of the module that defined the class, never executed; None for torch's own ModuleDict and for
            TensorFlow-era networks, which are not persistent objects.
    """

    class_name: str
    state: dict[str, Any]
    module_src: str | None = None
    version: int = 6

    @property
    def init_args(self) -> tuple:
        """The positional constructor arguments."""
        return self.state.get("_init_args", ())

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The keyword constructor arguments, only those that were passed."""
        return self.state.get("_init_kwargs", {})

    def __deepcopy__(self, memo: dict) -> "Record":
        return self  # records are never changed, and sharing them keeps copies of a network cheap


def read(data: bytes) -> Any:
    """Return the content of a network pickle.

    Returns:
        Plain Python data (EasyDict becomes dict, NumPy scalars become Python numbers), `Record` for persistent objects,
        `torch.Tensor` and `torch.nn.Parameter` (CPU, own memory, no gradient), `Array` for NumPy arrays;
        `Unknown` and `Opaque` for what is not known here and for what it would make.

    Raises:
        NetworkFormatError: the file is not usable; the message has the reason, but not the name of the file.
    """
    check_outline(data[:64], data[-1:])
    globals_ = {**_GLOBALS, ("_codecs", "encode"): Global("bytes", call=_bytes_of_text(len(data)), arity=(2, 2))}
    machine = Machine(memoryview(data), globals_, _build, keep_unknown=True)
    content = machine.run()
    if machine.position != len(data):
        raise NetworkFormatError(f"{len(data) - machine.position} bytes of unknown data follow the pickle")
    return content


def unknown_in(value: Any) -> Unknown | None:
    """Return something that is not known here and that stands anywhere in a value from a file, or None."""
    pending: list[Any] = [value]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if isinstance(item, (Unknown, Opaque)):
            return item if isinstance(item, Unknown) else item.root
        if not isinstance(item, (Record, torch.nn.ModuleDict, dict, list, tuple)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (Record, torch.nn.ModuleDict)):
            pending.append(item.state if isinstance(item, Record) else vars(item))
        else:
            pending += item.values() if isinstance(item, dict) else item
    return None


def check_shared(content: Any) -> None:
    """Raise NetworkFormatError where a part of a network belongs to two of them, or twice to one.

    A layer, a table of layers or tensors, and an array each have one place. A file in which they have many would take
    the product of the places in time, or in memory, wherever its networks are walked through.
    """
    seen: set[int] = set()

    def claim(part: Any, what: str) -> None:
        need(id(part) not in seen, f"{what} stands in two places")
        seen.add(id(part))

    pending = [value for value in content.values() if isinstance(value, Record)]
    pending = list({id(record): record for record in pending}.values())  # a network may have two names
    seen |= {id(record) for record in pending}
    while pending:
        record = pending.pop()
        claim(record.state, "the state of an object")
        for name in ("_parameters", "_buffers", "_modules", "components"):
            table = record.state.get(name)
            if not isinstance(table, dict) or not table:
                continue
            claim(table, f"the table {name}")
            for child in table.values():
                if isinstance(child, Record):
                    claim(child, f"a {printable(child.class_name)}")
                    pending.append(child)
        variables = record.state.get("variables")
        if isinstance(variables, list):
            claim(variables, "the list of variables")
            for item in variables:
                if isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Array):
                    claim(item[1], f"the array of '{printable(item[0])}'")


def check_outline(head: bytes, tail: bytes) -> None:
    """Raise NetworkFormatError where the first bytes or the last show that a file is no pickle, or not a whole one."""
    if not head:
        raise NetworkFormatError("the file is empty")
    for magic, meaning in _NOT_PICKLES:
        if head.startswith(magic):
            raise NetworkFormatError(f"not a pickle but {meaning}")
    need(head[:1] == pickle.PROTO, "it does not begin like a pickle")
    if tail != pickle.STOP:
        raise NetworkFormatError("the file is truncated, or something follows the pickle")


# ---------------------------------------------------------------------------------------------------------------------
# What the listed globals stand for.


@dataclass(eq=False)
class _Dtype:
    """A NumPy dtype under construction; BUILD sets the byte order."""

    code: str
    order: str = "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "") + self.code)


@dataclass(eq=False)
class Array:
    """A NumPy array; `value` is None until its content has been read."""

    value: np.ndarray | None = None


@dataclass(eq=False)
class _Elements:
    """A storage; `unclaimed` counts those not yet in a tensor, so that no file can multiply its own size."""

    values: torch.Tensor
    unclaimed: int


def _persistent_object(meta: Any) -> Record:
    fields = {"type": str, "version": int, "module_src": str, "class_name": str, "state": dict}
    need(isinstance(meta, dict), "a persistent object without a record")
    for field, kind in fields.items():
        value = meta.get(field)
        if isinstance(value, (Unknown, Opaque)):
            raise (value if isinstance(value, Unknown) else value.root).refusal()
        need(type(value) is kind, f"a persistent object whose '{field}' is no {kind.__name__}")
    if meta["type"] != "class" or meta["version"] != 6:
        raise NetworkFormatError(
            f"has a persistent object of type '{printable(meta['type'])}', version {meta['version']}; "
            "only classes of version 6 are known"
        )
    return Record(meta["class_name"], meta["state"], meta["module_src"])


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    need(isinstance(tensor, torch.Tensor) and type(requires_grad) is bool and hooks == {}, "a malformed parameter")
    return torch.nn.Parameter(tensor, requires_grad=False)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> torch.Tensor:
    need(isinstance(storage, _Elements) and type(requires_grad) is bool and hooks == {}, "a malformed tensor")
    need(type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= _MAX_DIMS, "a tensor's shape")
    need(all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)), "a tensor's shape, stride or offset")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else offset - 1
    need(last < len(storage.values), "a tensor reaches beyond its storage")
    storage.unclaimed -= count
    need(storage.unclaimed >= 0, "tensors overlap in their storage")
    return storage.values.as_strided(size, stride, offset)


def _storage(blob: Any) -> _Elements:
    """Read one storage in torch's format from before 1.6: five small pickles, an element count, the elements."""
    need(isinstance(blob, memoryview), "a storage without bytes")
    position = 0

    def part() -> Any:
        nonlocal position
        machine = Machine(blob, _STORAGE_GLOBALS, position=position, allow_persistent_id=True, max_operations=200)
        value = machine.run()
        position = machine.position
        return value

    need(part() == STORAGE_MAGIC and part() == STORAGE_PROTOCOL, "a storage with a wrong magic number or protocol")
    system = part()
    need(isinstance(system, dict) and system.get("little_endian") is True, "a storage that is not little-endian")
    handle = part()
    need(isinstance(handle, PersistentId) and type(handle.value) is tuple, "a storage without description")
    need(len(handle.value) == 6 and isinstance(handle.value[1], Global), "a storage with a malformed description")
    kind, storage_type, key, location, count, view = handle.value
    need((kind, view) == ("storage", None) and type(key) is str, "a storage with a malformed description")
    on_device = type(location) is str and re.fullmatch(r"cpu|(cuda|mps|xpu|npu)(:\d{1,3})?", location)
    need(bool(on_device), f"a storage on {printable(location)}, which is no device")
    need(part() == [key], "a storage whose keys disagree")
    dtype = storage_type.value
    need(len(blob) - position >= 8, "a storage is truncated")
    (stored,) = struct.unpack_from("<q", blob, position)
    payload = blob[position + 8 :]
    fits = type(count) is int and count == stored and len(payload) == count * dtype.itemsize
    need(fits, f"a storage of {len(payload)} bytes claims {printable(count)} (or {stored}) elements of {dtype}")
    elements = torch.empty(len(payload), dtype=torch.uint8)  # aligned, which the bytes in the file are not
    elements.numpy()[:] = np.frombuffer(payload, np.uint8)
    if dtype is torch.bool:
        need(not elements.numel() or bool(elements.max() <= 1), "a storage with truth values other than 0 and 1")
    blob.release()  # the same bytes again would be an error: nothing in a file may be multiplied
    return _Elements(elements.view(dtype), count)


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    need(isinstance(dtype, _Dtype) and isinstance(data, memoryview), "a malformed NumPy scalar")
    need(len(data) == dtype.numpy().itemsize, "a NumPy scalar of the wrong size")
    return np.frombuffer(data, dtype.numpy())[0].item()


def _dtype(code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    codes = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
    need(type(code) is str and code in codes, f"NumPy dtype '{printable(code)}'")
    return _Dtype(code)


def _array(kind: Any, shape: Any, code: Any) -> Array:
    need(isinstance(kind, Global) and kind.name == "numpy.ndarray" and shape == (0,), "a malformed NumPy array")
    return Array()


def _build_array(array: Array, version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
    need(version == 1 and type(shape) is tuple and len(shape) <= _MAX_DIMS, "a malformed NumPy array")
    need(all(type(n) is int and 0 <= n < 2**63 for n in shape) and type(fortran) is bool, "a NumPy array's shape")
    need(isinstance(dtype, _Dtype) and isinstance(data, memoryview), "a NumPy array's content")
    need(len(data) == math.prod(shape) * dtype.numpy().itemsize, "a NumPy array of the wrong size")
    array.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran else "C").copy()
    if len(data) > 8:  # Python may share short ones
        data.release()  # as above


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Return an array that was pickled by protocol 5."""
    need(type(order) is str and order in ("C", "F"), "a NumPy array's order")
    array = Array()
    _build_array(array, 1, shape, dtype, order == "F", data)
    return array


def _build(target: Any, state: Any) -> None:
    """Set the state of an object for the opcode BUILD: only of one under construction, and only once."""
    if isinstance(target, _Dtype):
        need(type(state) is tuple and len(state) == 8 and state[1] in ("<", ">", "|", "="), "a NumPy dtype")
        target.order = state[1]
    elif isinstance(target, Array) and target.value is None:
        need(type(state) is tuple and len(state) == 5, "a malformed NumPy array")
        _build_array(target, *state)
    elif isinstance(target, Record) and target.module_src is None and not target.state:
        need(type(state) is dict and all(type(key) is str for key in state), f"a {target.class_name} without state")
        target.state = state
    else:
        raise NetworkFormatError(f"the file sets the state of a {type(target).__name__}, which is not allowed")


def _bytes_of_text(budget: int) -> Callable[[Any, Any], memoryview]:
    """Return what stands for `_codecs.encode`, as which pickle protocols 1 and 2 write bytes; for one file.

    Args:
        budget: how many bytes there may be altogether: those that the file has. No text in it needs to be used twice.
    """

    def encode(text: Any, encoding: Any) -> memoryview:
        nonlocal budget
        need(type(text) is str and encoding == "latin1", f"bytes made of text by {printable(encoding)}")
        budget -= len(text)
        need(budget >= 0, "the same text is used for bytes again and again")
        return memoryview(text.encode("latin1"))

    return encode


def _set(items: Any = None) -> set:
    items = [] if items is None else items
    need(type(items) is list and all(type(item) is str for item in items), "a malformed set")
    result = set(items)
    items.clear()  # as above
    return result


_GLOBALS: dict[tuple[str, str], Global] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Global(
        "persistent object", call=_persistent_object, arity=(1, 1)
    ),
    ("dnnlib.util", "EasyDict"): Global("EasyDict", new=dict),
    ("dnnlib.tflib.network", "Network"): Global("Network", new=lambda: Record(TENSORFLOW_NETWORK, {})),
    ("torch.nn.modules.container", "ModuleDict"): Global("ModuleDict", new=lambda: Record("ModuleDict", {})),
    ("torch._utils", "_rebuild_parameter"): Global("parameter", call=_parameter, arity=(3, 3)),
    ("torch._utils", "_rebuild_tensor_v2"): Global("tensor", call=_tensor, arity=(6, 6)),
    ("torch.storage", "_load_from_bytes"): Global("storage", call=_storage, arity=(1, 1)),
    ("collections", "OrderedDict"): Global("OrderedDict", call=OrderedDict),
    ("builtins", "set"): Global("set", call=_set, arity=(0, 1)),
    ("__builtin__", "set"): Global("set", call=_set, arity=(0, 1)),  # Python 2, or protocol 2
    ("__builtin__", "bytes"): Global("bytes", call=lambda: memoryview(b"")),  # protocol 2, where there are none
    ("numpy", "dtype"): Global("numpy.dtype", call=_dtype, arity=(1, 3)),
    ("numpy", "ndarray"): Global("numpy.ndarray"),
}
for _numpy in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
    _GLOBALS[_numpy + ".multiarray", "scalar"] = Global("numpy scalar", call=_scalar, arity=(2, 2))
    _GLOBALS[_numpy + ".multiarray", "_reconstruct"] = Global("numpy array", call=_array, arity=(3, 3))
    _GLOBALS[_numpy + ".numeric", "_frombuffer"] = Global("numpy array", call=_array_from_buffer, arity=(4, 4))
_STORAGE_GLOBALS = {("torch", name): Global(name, value=dtype) for name, dtype in STORAGE_DTYPES.items()}
