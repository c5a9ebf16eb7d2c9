"""Makes a module from the record of a network, with every argument, tensor and layer accounted for, and back."""

import contextlib
import dataclasses
import inspect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from torch_utils.persistence.machine import NetworkFormatError, printable
from torch_utils.persistence.reader import Record
from torch_utils.persistence.writer import cpu_tensor

# What a constructor argument may be at most. Real ones stay far below; the point is that building cannot take long.
_MAX_INT = 2**17
_MAX_ITEMS = 1000
_MAX_LIST = 64  # a filter of so many taps has 4096 values, and layers have one each
_MAX_TEXT = 1000
_MAX_DEPTH = 16
_MAX_LISTED = 100

#: Attribute of a network that was read from a file: its record there, without tensors.
SOURCE_RECORD = "_source_record"

_ANNOTATED = {"int": (int,), "float": (bool, int, float), "bool": (bool, int), "str": (str,)}


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """All that is needed to rebuild a persistent object.

    Attributes:
        class_name: name of the registered class.
        args, kwargs: constructor arguments.
        tensors: parameters and buffers by their full names.
        layers: the records of all layers by their full names ('' is the object itself), to compare with what was built.
    """

    class_name: str
    args: tuple
    kwargs: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layers: dict[str, Record] = dataclasses.field(default_factory=dict)


def blueprint(record: Record) -> Blueprint:
    """Return the blueprint of a record that needs no translation.

    Raises:
        NetworkFormatError: the record is malformed.
    """
    layers = walk(record)
    tensors = _entries(layers, torch.Tensor)
    if len({id(tensor) for tensor in tensors.values()}) < len(tensors):
        raise NetworkFormatError("one tensor stands in two places")
    args, kwargs = record.init_args, record.init_kwargs
    if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
        raise NetworkFormatError("the constructor arguments are malformed")
    return Blueprint(record.class_name, args, kwargs, tensors, layers)


def walk(record: Record) -> dict[str, Record]:
    """Return a record and all records below it by their full names, like `torch.nn.Module.named_modules`."""
    layers: dict[str, Record] = {}
    pending = [("", record)]
    seen: set[int] = set()
    while pending:
        path, layer = pending.pop()
        if id(layer) in seen or path.count(".") > _MAX_DEPTH:
            raise NetworkFormatError(f"the layer '{path[:200]}' occurs twice or lies too deep")
        seen.add(id(layer))
        layers[path] = layer
        pending += [(_join(path, name), child) for name, child in _table(layer, "_modules", Record)]
    return layers


def _entries(layers: dict[str, Record], kind: type) -> dict[str, Any]:
    """Return all that stands in the places of parameters and buffers, by full name."""
    entries: dict[str, Any] = {}
    for path, layer in layers.items():
        for name, value in [*_table(layer, "_parameters", kind), *_table(layer, "_buffers", kind)]:
            if _join(path, name) in entries:
                raise NetworkFormatError(f"the tensor '{_join(path, name)}' occurs twice")
            entries[_join(path, name)] = value
    return entries


def _table(layer: Record, table: str, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the entries of `_parameters`, `_buffers` or `_modules` that are not None, each checked."""
    entries = layer.state.get(table, {})
    if not isinstance(entries, dict):
        raise NetworkFormatError(f"{table} of a {printable(layer.class_name)} is no dictionary")
    for name, value in entries.items():
        if type(name) is not str or not name or "." in name or not name.isprintable() or len(name) > 100:
            raise NetworkFormatError(f"{table} of a {printable(layer.class_name)} has the name '{printable(name)}'")
        if value is not None and not isinstance(value, kind):
            raise NetworkFormatError(f"'{name}' in {table} is a {type(value).__name__}")
        if value is not None:
            yield name, value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---------------------------------------------------------------------------------------------------------------------
# From blueprint to module.


def assemble(cls: type, plan: Blueprint) -> Any:
    """Return an instance of `cls` as `plan` describes it, in eval mode and without gradients.

    Every tensor of the plan has to find its place with the right shape and dtype, and every place has to be filled.
    What is stored in float16 in place of float32 becomes float32.

    Raises:
        NetworkFormatError: something does not fit; the message names all of it.
    """
    network = build_empty(cls, plan.args, plan.kwargs, budget=100 + 4 * (len(plan.tensors) + len(plan.layers)))
    if not isinstance(network, torch.nn.Module):
        if plan.tensors:
            raise NetworkFormatError(f"{cls.__name__} has no place for tensors")
        _adopt_attributes(network, plan.layers.get(""), "")
        return network
    places = named_tensors(network)
    check_fit(cls, {name: (tensor.shape, _widened(tensor.dtype)) for name, tensor in plan.tensors.items()}, places)
    modules = dict(network.named_modules())
    for name, tensor in plan.tensors.items():
        check_finite(name, tensor)
        path, _, leaf = name.rpartition(".")
        tensor = tensor.detach().to(places[name].dtype)
        if isinstance(places[name], torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        setattr(modules[path], leaf, tensor)
    if plan.layers:
        _compare_layers(modules, plan.layers)
    return network.eval().requires_grad_(False)


def build_empty(cls: type, args: tuple, kwargs: dict[str, Any], budget: int) -> Any:
    """Return an instance of `cls` whose tensors have no memory.

    This is quick for any arguments, and the random state stays as it is.

    Args:
        budget: how many layers, parameters and buffers the constructor may make altogether.

    Raises:
        NetworkFormatError: the arguments are not acceptable, or the constructor fails.
    """
    args, kwargs = _checked_argument([args, kwargs], [_MAX_ITEMS])
    try:
        bound = inspect.signature(cls).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            annotation = inspect.signature(cls).parameters[name].annotation
            kinds = _ANNOTATED.get(getattr(annotation, "__name__", annotation))
            if kinds and type(value) not in kinds:
                raise TypeError(f"{name} is {printable(value)!r}, a {type(value).__name__}")
        with torch.random.fork_rng(devices=[]), _WithoutMemory(), _limited_registrations(budget):
            return cls(*args, **kwargs)
    except Exception as error:  # whatever a constructor does with arguments that make no sense
        raise NetworkFormatError(
            f"{cls.__name__} does not accept the constructor arguments: {printable(error)}"
        ) from error


def _checked_argument(value: Any, budget: list[int]) -> Any:
    """Return a copy of constructor arguments, all of which must be plain data of a size that makes sense."""
    budget[0] -= 1
    if budget[0] < 0:
        raise NetworkFormatError("the constructor arguments are too many")
    kind = type(value)
    if (
        kind is int
        and abs(value) > _MAX_INT
        or kind is float
        and math.isnan(value)
        or kind is str
        and len(value) > _MAX_TEXT
    ):
        raise NetworkFormatError(f"the constructor argument {printable(value)} is out of range")
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple) and len(value) > _MAX_LIST:
        raise NetworkFormatError(f"a constructor argument has {len(value)} items")
    if kind in (list, tuple):
        return kind(_checked_argument(item, budget) for item in value)
    if kind is dict and all(type(key) is str for key in value):
        return {key: _checked_argument(item, budget) for key, item in value.items()}
    raise NetworkFormatError(f"a constructor argument is a {kind.__name__}")


class _WithoutMemory(TorchFunctionMode):
    """A context in which new tensors have a shape but no memory, except those made from data (filters, tables).

    `torch.device("meta")` does the same, but arithmetic on such tensors makes torch import its compiler, which takes
    longer than all else here. Hence what constructors do with fresh weights, drawing and scaling them, is skipped.
    """

    _ALLOCATE = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
    _SCALE = {
        f"{prefix}{name}{suffix}"
        for name in ("add", "sub", "mul", "truediv")
        for prefix, suffix in (("__", "__"), ("__r", "__"))
    }
    _SCALE |= {"add", "sub", "rsub", "mul", "div", "normal_", "uniform_", "zero_", "fill_"}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            return func(*args, **kwargs)  # the constructor wants to calculate with it
        if func in self._ALLOCATE:
            kwargs = {key: value for key, value in kwargs.items() if key in ("size", "dtype", "requires_grad")}
            return torch.empty(*args, **kwargs, device="meta")
        if func is torch.full:
            return func(*args, **{**kwargs, "device": "meta"})
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if len(tensors) == 1 and tensors[0].is_meta and tensors[0].is_floating_point() and func.__name__ in self._SCALE:
            return tensors[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def _limited_registrations(budget: int) -> Iterator[None]:
    """Stop a constructor of this thread that makes more than `budget` layers, parameters and buffers."""
    thread = threading.get_ident()

    def count(module: torch.nn.Module, name: str, value: Any) -> None:
        nonlocal budget
        if threading.get_ident() == thread:
            budget -= 1
            if budget < 0:
                raise ValueError("they ask for far more layers than the file has")

    with contextlib.ExitStack() as stack:
        for kind in ("parameter", "buffer", "module"):
            register = getattr(torch_module, f"register_module_{kind}_registration_hook")
            stack.callback(register(count).remove)
        yield


def named_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by their full names, also buffers that a state dictionary leaves out."""
    named = dict(network.named_parameters(remove_duplicate=False))
    return {**named, **dict(network.named_buffers(remove_duplicate=False))}


def check_fit(cls: type, given: dict[str, tuple[torch.Size, torch.dtype]], places: dict[str, torch.Tensor]) -> None:
    """Raise NetworkFormatError with all tensors that are missing, unexpected, or of another shape or dtype."""
    complaints = {
        "missing": [name for name in places if name not in given],
        "unexpected": [name for name in given if name not in places],
        "wrong shape": [],
        "wrong dtype": [],
    }
    for name, (shape, dtype) in given.items():
        if name in places and shape != places[name].shape:
            complaints["wrong shape"].append(f"{name} {list(shape)} for {list(places[name].shape)}")
        elif name in places and dtype != places[name].dtype:
            complaints["wrong dtype"].append(f"{name} {dtype} for {places[name].dtype}")
    found = []
    for complaint, names in complaints.items():
        if names:
            more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
            found.append(f"{complaint}: {', '.join(names[:_MAX_LISTED])}{more}")
    if found:
        raise NetworkFormatError(f"the tensors do not fit {cls.__name__}; {'; '.join(found)}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise NetworkFormatError when a tensor has an infinite or undefined value."""
    if tensor.is_floating_point() and tensor.numel() and not math.isfinite(sum(map(float, tensor.aminmax()))):
        raise NetworkFormatError(f"'{name}' contains non-finite values")


def _compare_layers(modules: dict[str, torch.nn.Module], layers: dict[str, Record]) -> None:
    """Check that the file has the same layers, and take over what their attributes say."""
    for path, module in modules.items():
        if path not in layers and hasattr(type(module), "init_kwargs"):
            raise NetworkFormatError(f"the layer '{path}' ({type(module).__name__}) is missing")
    for path, layer in layers.items():
        name = type(modules[path]).__name__ if path in modules else "nothing"
        if layer.class_name == "ModuleDict" and path in modules and not hasattr(type(modules[path]), "init_kwargs"):
            continue  # the tensors alone of a layer that `describe` calls plain
        if path and layer.class_name != name:
            raise NetworkFormatError(f"the layer '{path}' is a {printable(layer.class_name)}; expected {name}")
        _adopt_attributes(modules[path], layer, path)


def _adopt_attributes(target: Any, layer: Record | None, path: str) -> None:
    """Give `target` the public attributes that the file has for it.

    The official loader restores attributes and never calls the constructor, so where the two disagree the attribute
    counts: a clamp or a dropout that was changed after construction. Integers, texts and lists describe structure and
    have to agree. Attributes that only one side knows are left alone.
    """
    for name, recorded in layer.state.items() if layer is not None else ():
        if name.startswith("_") or name == "training" or name not in vars(target):
            continue
        built = vars(target)[name]
        if isinstance(built, tuple) and isinstance(recorded, list):
            recorded = tuple(recorded)
        plain = (type(None), bool, int, float, str, list, tuple)
        if type(recorded) not in plain or type(built) not in plain or recorded == built:
            continue
        if not _may_replace(type(target), name, built, recorded):
            raise NetworkFormatError(
                f"the attribute '{_join(path, name)}' is {printable(recorded)}; the constructor arguments give {built}"
            )
        setattr(target, name, recorded)


def _may_replace(cls: type, name: str, built: Any, recorded: Any) -> bool:
    """Say whether an attribute may have another value than the constructor gave it.

    Switches may be turned. A real number may be another one that is finite and has no other sign; None may stand in its
    place where the constructor takes None, and a number in the place of None.
    """
    if type(built) is bool or type(recorded) is bool:
        return type(built) is type(recorded)
    if not isinstance(built, (float, type(None))):
        return False
    if recorded is None:
        parameter = inspect.signature(cls).parameters.get(name)
        return parameter is not None and parameter.default is None
    if type(recorded) not in (int, float) or not math.isfinite(recorded):
        return False
    return recorded >= 0 or (built is not None and built < 0)


# ---------------------------------------------------------------------------------------------------------------------
# From module to record.


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The shape, dtype, layout and kind of a tensor in a record, in place of the tensor."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]
    is_parameter: bool


def _slot(tensor: torch.Tensor) -> _Slot:
    return _Slot(tensor.shape, tensor.dtype, tensor.stride(), isinstance(tensor, torch.nn.Parameter))


def _widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a network for the dtype in a file: float16 is for small files, not for arithmetic."""
    return torch.float32 if dtype == torch.float16 else dtype


def without_tensors(record: Record) -> Record:
    """Return a copy of the record with shape, dtype and layout of its parameters and buffers, but not their values."""
    return _map_entries(record, lambda name, tensor: dataclasses.replace(_slot(tensor), dtype=_widened(tensor.dtype)))


def narrowed(record: Record) -> Record:
    """Return a copy of the record of a network with its float32 parameters and buffers in float16.

    Raises:
        NetworkFormatError: one has values beyond the range of float16.
    """

    def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.detach().half() if tensor.dtype == torch.float32 else tensor.detach()
        check_finite(name, half)
        return torch.nn.Parameter(half, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else half

    return _map_entries(record, convert)


def _map_entries(record: Record, function: Callable[[str, Any], Any], path: str = "") -> Record:
    """Return a copy of the record, in eval mode, with `function(full name, entry)` for every parameter and buffer."""
    state = {**record.state, "training": False}

    def convert(table: str, convert_entry: Callable[[str, Any], Any]) -> None:
        entries = record.state.get(table, {})
        converted = [
            (name, None if entry is None else convert_entry(_join(path, name), entry))
            for name, entry in entries.items()
        ]
        state[table] = type(entries)(converted)

    convert("_parameters", function)
    convert("_buffers", function)
    convert("_modules", lambda child_path, child: _map_entries(child, function, child_path))
    return dataclasses.replace(record, state=state)


def describe(network: Any, module_texts: dict[type, str | None], plain: bool = False) -> Record:
    """Return the record, without tensors, of a persistent object that was built here.

    Args:
        network: instance of a persistent class, a `torch.nn.Module` or not.
        module_texts: source texts of the modules of persistent classes.
        plain: the network is a layer of a class whose `plain_layers` says that its constructor makes all layers anew.
            Such layers may be of any class, and only their tensors are described, as those of torch's ModuleDict.

    Raises:
        NetworkFormatError: the object could not be loaded again.
    """
    cls = type(network)
    plain = plain and cls not in module_texts
    if plain or cls is torch.nn.ModuleDict:
        text = None
    elif module_texts.get(cls) is None:
        reason = "has no source file" if cls in module_texts else "is not a persistent class"
        raise NetworkFormatError(f"{cls.__module__}.{cls.__qualname__} {reason}, so it cannot be written")
    else:
        text = module_texts[cls]
    state: dict[str, Any] = dict(vars(torch.nn.ModuleDict() if plain else network))
    state.pop(SOURCE_RECORD, None)
    below = plain or getattr(cls, "plain_layers", False)
    if isinstance(network, torch.nn.Module):
        for name in list(state):
            value = vars(network)[name]
            if name in ("_parameters", "_buffers"):
                state[name] = {leaf: None if tensor is None else _slot(tensor) for leaf, tensor in value.items()}
            elif name == "_modules":
                state[name] = {
                    leaf: None if child is None else describe(child, module_texts, below)
                    for leaf, child in value.items()
                }
            elif name.startswith("_") and "hook" in name:
                state[name] = OrderedDict() if isinstance(value, dict) else None
    constructor: dict[str, Any] = {name: state.pop(name) for name in ("_init_args", "_init_kwargs") if name in state}
    class_name = "ModuleDict" if plain else cls.__name__
    return Record(class_name, {**state, **constructor}, text)  # in the order of the official files


def as_constructed(record: Record, network: torch.nn.Module) -> Record:
    """Return the record that `describe` made, with dtypes and layouts as the constructor makes them.

    Only such a record can be loaded.

    Raises:
        NetworkFormatError: the network no longer has the tensors that its constructor arguments give.
    """
    tensors = named_tensors(network)
    budget = 100 + 4 * (len(tensors) + sum(1 for _ in network.modules()))
    twin = named_tensors(build_empty(type(network), record.init_args, record.init_kwargs, budget))
    given = {name: (tensor.shape, twin.get(name, tensor).dtype) for name, tensor in tensors.items()}
    check_fit(type(network), given, twin)
    return _map_entries(record, lambda name, slot: _slot(twin[name]))


def fill(record: Record, network: torch.nn.Module) -> Record:
    """Return a record with the tensors that `network` has now, in the dtypes and layouts that the record says.

    Raises:
        NetworkFormatError: the network does not have the same tensors, or some are not finite.
    """
    tensors = named_tensors(network)
    slots = _entries(walk(record), _Slot)
    check_fit(
        type(network), {name: (slot.shape, tensors.get(name, slot).dtype) for name, slot in slots.items()}, tensors
    )

    def stored(name: str, slot: _Slot) -> torch.Tensor:
        tensor = cpu_tensor(tensors[name], slot.dtype, slot.stride)
        check_finite(name, tensor)
        return torch.nn.Parameter(tensor, requires_grad=False) if slot.is_parameter else tensor

    return _map_entries(record, stored)
