"""Reads network pickles without executing anything from them, and writes them so that the official tools open them.

The layout is that of stylegan2-ada-pytorch, stylegan3 and EDM: a dictionary of networks, each stored as its class name,
its instance dictionary and the source text of the module that defines it. The official loader runs that text. Here it
is only kept, to be written back, and the class registered under the name is used instead.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from torch_utils import misc, safe_files
from torch_utils.persistence import builder, reader, writer
from torch_utils.persistence.builder import Blueprint, blueprint
from torch_utils.persistence.machine import NetworkFormatError, Opaque, Unknown, printable
from torch_utils.persistence.reader import TENSORFLOW_NETWORK, Record, check_shared, unknown_in

__all__ = [
    "Blueprint",
    "NetworkFormatError",
    "Opaque",
    "Record",
    "TENSORFLOW_NETWORK",
    "Unknown",
    "assemble",
    "blueprint",
    "check_shared",
    "explained",
    "from_records",
    "load",
    "load_records",
    "persistent_class",
    "printable",
    "refresh_source",
    "register_translator",
    "save",
    "to_records",
    "unknown_in",
]

Class = TypeVar("Class", bound=type)

# Modules that register classes or translators, imported by the first `load`. Those that do not exist are passed over.
_PROVIDERS = (
    "stylegan2_ada.networks",
    "stylegan2_ada.augment",
    "stylegan2_ada.flavours",
    "stylegan2_ada.tf_legacy",
    "di_refine.edm.networks",
    "di_refine.edm.checks",
    "di_refine.edm2.networks",
    "di_refine.ddpm.networks",
)
_AVERAGES = ("G_ema", "ema")
_NETWORK_KEYS = {"G", "D", "G_ema", "ema", "net", "Sg"}
_TENSORFLOW_KEYS = ("G", "D", "G_ema")
_MAX_NOTE = 200  # characters of what is wrong with a part that is not needed
_MAX_LEFT_OUT = 4  # parts that are not needed and that `save` could not write

_classes: dict[str, list[type]] = {}
_module_texts: dict[type, str | None] = {}
_translators: dict[str, Callable[[Record], Blueprint | None]] = {}


def persistent_class(cls: Class) -> Class:
    """Register a class for `load` and record the constructor arguments of its instances; for use as a decorator.

    Instances get the read-only properties `init_args` (tuple) and `init_kwargs` (dict), copies of what the outermost
    constructor call was given. The class itself is returned. A class of the same name may be registered again; `load`
    takes the first whose constructor and tensors fit.

    `load` runs the constructor with tensors that have no memory, then fills in parameters and buffers. So the
    constructor must not look into tensors it has made (unless from data or on an explicit device), and an instance has
    to be determined by arguments, parameters, buffers and plain attributes.
    """
    if cls in _module_texts:
        return cls
    changed: Any = cls  # type checkers do not let a class be given attributes
    construct = changed.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        if "_init_kwargs" not in self.__dict__:  # a subclass may have been here first: the outermost call counts
            self.__dict__.update(_init_args=copy.deepcopy(args), _init_kwargs=copy.deepcopy(kwargs))
        construct(self, *args, **kwargs)

    changed.__init__ = __init__
    changed.init_args = property(lambda self: copy.deepcopy(self._init_args))
    changed.init_kwargs = property(lambda self: copy.deepcopy(self._init_kwargs))
    _classes.setdefault(cls.__name__, []).append(cls)
    # Read now: by the time a network is saved the file may have been edited.
    here = inspect.currentframe()
    module = here.f_back if here is not None else None
    _module_texts[cls] = _read_text(module.f_globals.get("__file__") if module is not None else None)
    return cls


def _read_text(path: str | None) -> str | None:
    """Return the source text of a module, or None for code that was not read from a file."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (TypeError, OSError, UnicodeDecodeError):
        return None
    return next((known for known in _module_texts.values() if known == text), text)  # one object, pickled once


def register_translator(class_name: str, translate: Callable[[Record], Blueprint | None]) -> None:
    """Have `translate` turn foreign records of this class name into blueprints for a registered class.

    It returns None for records that need no translation and raises NetworkFormatError for those that are unusable.
    TensorFlow-era networks come as records named `TENSORFLOW_NETWORK`.
    """
    _translators[class_name] = translate


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def load(source: str | os.PathLike | bytes | IO[bytes], notes: list[str] | None = None) -> dict[str, Any]:
    """Read a network pickle of StyleGAN2-ADA (also TensorFlow-era, or from the StyleGAN3 repository), EDM, or `save`.

    Nothing in the file is executed or imported.

    Args:
        source: path, the bytes themselves, or a binary file, which is read from where it stands to its end.
        notes: a sentence is added for each part of the file that is of no use here.

    Returns:
        The dictionary in the file. Networks are modules of this project on the CPU, in eval mode, without gradients.
        Persistent objects without parameters that no class here fits (losses, some augmentation pipes) stay `Record`.
        Beside an averaged network (`G_ema`, `ema`) so does any network that is unusable, and an object of a class that
        is not known here is `Opaque`; `save` writes all of these back. What it could not write back is left out.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    name, data = _read_source(source)
    with explained(name):
        return _rebuild_all(_named(reader.read(data)), notes)


def load_records(source: str | os.PathLike | bytes | IO[bytes]) -> dict[str, Any]:
    """Return what stands in a network pickle, read just as safely as by `load`, without building a network from it.

    Returns:
        The dictionary in the file: `Record` for every persistent object, known here or not, with tensors in its state;
        plain data otherwise, with `Opaque` and `Unknown` for what is of a class that is not known here.

    Raises:
        NetworkFormatError: names the file and says why it is not a network pickle.
    """
    name, data = _read_source(source)
    with explained(name):
        return _named(reader.read(data))


def from_records(content: dict[str, Any], name: str, notes: list[str] | None = None) -> dict[str, Any]:
    """Return what `load` returns for a file with this content; it serves files of other formats.

    Args:
        content: as `load_records` or `to_records` returns it; taken over, not copied.
        name: of the file, for messages.
        notes: as for `load`.

    Raises:
        NetworkFormatError: names the file and says why it is not usable.
    """
    with explained(name):
        return _rebuild_all(_named(content), notes)


def assemble(plan: Blueprint, name: str) -> torch.nn.Module:
    """Return the network of a blueprint, checked as one from a pickle; it serves files that hold tensors alone.

    Args:
        plan: its class is a registered one.
        name: of the file, for messages.

    Raises:
        NetworkFormatError: names the file and what does not fit.
    """
    _import_providers()
    with explained(name):
        return builder.assemble(_classes[plan.class_name][0], plan)


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Put the name of the file into every error; a hostile one can make anything fail, also by recursion or memory.

    Raises:
        NetworkFormatError: in place of every exception; one that names the file already stays as it is.
    """
    name = os.fspath(path)
    try:
        yield
    except NetworkFormatError as error:
        named = str(error).startswith(name)
        raise NetworkFormatError(str(error) if named else f"{name}: {error}") from None
    except Exception as error:
        raise NetworkFormatError(f"{name}: damaged ({type(error).__name__}: {printable(error)})") from error


@functools.cache
def _import_providers() -> None:
    for name in _PROVIDERS:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or not f"{name}.".startswith(f"{error.name}."):
                raise


def _read_source(source: Any) -> tuple[str, bytes]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "network pickle", bytes(source)
    if hasattr(source, "read"):
        name, data = printable(getattr(source, "name", "network pickle")), source.read()
        if not isinstance(data, bytes):
            raise NetworkFormatError(f"{name}: open the file in binary mode")
        return name, data
    name = os.fspath(source)
    try:
        if not os.path.exists(name):
            raise NetworkFormatError(f"{name}: no such file")
        if not os.path.isfile(name):  # opening a pipe would wait for a writer
            raise NetworkFormatError(f"{name}: not a regular file")
        with open(name, "rb") as file:
            with explained(name):
                _check_outline(file)
            return name, file.read()
    except OSError as error:
        raise NetworkFormatError(f"{name}: {error.strerror}") from error


def _check_outline(file: IO[bytes]) -> None:
    """Refuse a file by its first and last bytes, before gigabytes, or the holes of a sparse file, are read."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    file.seek(max(size - 1, 0))
    reader.check_outline(head, file.read(1))
    file.seek(0)
    if size > safe_files.NETWORK_BYTES:
        raise NetworkFormatError(f"{size / 1e9:.0f} GB, far more than any network of a supported kind has")


def _named(content: Any) -> dict[str, Any]:
    """Return `content` if it is a dictionary with names for keys; a tuple of the TensorFlow era is made into one."""
    if (
        isinstance(content, tuple)
        and [getattr(item, "class_name", None) for item in content] == [TENSORFLOW_NETWORK] * 3
    ):
        content = dict(zip(_TENSORFLOW_KEYS, content))
    if isinstance(content, (Opaque, Unknown)) and (unknown := unknown_in(content)) is not None:
        raise unknown.refusal()
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise NetworkFormatError(f"holds a {type(content).__name__} instead of a dictionary of networks")
    check_shared(content)
    return content


def _rebuild_all(content: dict[str, Any], notes: list[str] | None) -> dict[str, Any]:
    _import_providers()
    rebuilt: dict[int, Any] = {}
    memo: dict[Any, Any] = {}
    result: dict[str, Any] = {}
    problems: list[NetworkFormatError] = []
    found: list[str] = []
    left_out = 0
    for key, value in content.items():
        try:
            if isinstance(value, Record):
                if id(value) not in rebuilt:
                    rebuilt[id(value)] = _rebuild(printable(key), value)
                result[key] = rebuilt[id(value)]
                continue
            unknown = unknown_in(value) if isinstance(value, (Unknown, Opaque)) else None
            if unknown is not None:
                found.append(f"'{printable(key)}' is a {unknown}, which is not known here; it is kept unopened")
                raise NetworkFormatError(f"'{printable(key)}' {unknown.refusal()}")
            if key in _NETWORK_KEYS and value is not None:
                raise NetworkFormatError(f"'{key}' is a {type(value).__name__}, not a network")
        except NetworkFormatError as error:
            if key in _AVERAGES or all(content.get(name) is None for name in _AVERAGES):
                raise
            if len(found) == len(problems):
                found.append(f"{str(error)[:_MAX_NOTE]}; it is not needed and kept as it is")
            problems.append(error)
        try:
            result[key] = writer.plain(value, memo)
        except TypeError as error:
            found.append(f"'{printable(key)}' could not be written back and is left out: {error}")
            problems.append(NetworkFormatError(f"'{printable(key)}': {error}"))
            left_out += 1
            if left_out > _MAX_LEFT_OUT:  # finding that out may cost as much as reading the file, each time
                raise problems[-1] from None
    if problems and not any(isinstance(result.get(key), torch.nn.Module) for key in _AVERAGES):
        raise problems[0]
    if notes is not None:
        notes += found
    return result


def _rebuild(key: str, record: Record) -> Any:
    """Return the object of a record, or the record itself where no class fits and none is needed."""
    label = f"'{key}' ({printable(record.class_name)})"
    try:
        unknown = unknown_in(record) if key in _NETWORK_KEYS else None
        if unknown is not None:
            raise unknown.refusal()
        if record.class_name not in {*_classes, *_translators}:
            raise NetworkFormatError("the class is not known")
        plan = _translators.get(record.class_name, blueprint)(record) or blueprint(record)
        classes = _classes.get(plan.class_name, [])
        if not classes:
            raise NetworkFormatError("the class is not known")
        network, problems = None, []
        for cls in classes:
            try:
                network = builder.assemble(cls, plan)
                break
            except NetworkFormatError as error:
                problems.append(str(error))
        if network is None:
            raise NetworkFormatError("; or ".join(dict.fromkeys(problems)))
    except NetworkFormatError as error:
        if key in _NETWORK_KEYS or _has_parameters(record):
            raise NetworkFormatError(f"{label}: {error}") from None
        return writer.plain(record)
    if record.module_src is not None:
        network.__dict__[builder.SOURCE_RECORD] = builder.without_tensors(record)
    return network


def _has_parameters(record: Record) -> bool:
    try:
        return any(layer.state.get("_parameters") for layer in builder.walk(record).values())
    except NetworkFormatError:  # what has layers that are no records may well have some
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def save(networks: dict[str, Any], path: str | os.PathLike, half: bool = False) -> None:
    """Write a network pickle that `load` and the official StyleGAN2-ADA, StyleGAN3 and EDM code read.

    The file holds the networks' present weights, on the CPU, in eval mode, without gradients; the networks themselves
    stay as they are. A network that came from a file keeps that file's source text, attributes and constructor
    arguments, so that it opens wherever the original did. The file appears complete or not at all.

    Args:
        networks: networks (instances of persistent classes), records, plain data and tensors under their names.
        path: file to write; its folder must exist.
        half: store float32 weights as float16, in half the bytes and with three of their seven digits. `load` makes
            float32 of them again; the official code computes in what it finds.

    Raises:
        NetworkFormatError: something in `networks`, which the message names, could not be loaded again.
    """
    records: dict[int, Any] = {}  # a network under two names is one network
    memo: dict[Any, Any] = {}

    def convert(value: Any) -> Any:
        record = _record(value, records)
        narrow = half and isinstance(value, torch.nn.Module)
        return writer.plain(builder.narrowed(record) if narrow else record, memo)

    content = _for_each(networks, path, convert)
    try:
        with misc.open_atomic(path) as file:
            writer.write(content, file, _reconstruct_persistent_obj)
    except RecursionError as error:
        raise NetworkFormatError(f"{os.fspath(path)}: not written: {error}") from error


def refresh_source(network: torch.nn.Module) -> bool:
    """Have `save` write the present source text of a network's class instead of the one of the file it came from.

    Weights stay as they are. Attributes that only the other text had are not written any more.

    Returns:
        Whether the network came from a file, so that anything can change.
    """
    return vars(network).pop(builder.SOURCE_RECORD, None) is not None


def to_records(networks: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Return what `save` would write: a `Record` with present weights for every network, other values as they are.

    Args:
        networks: as for `save`.
        path: the file that they are for, for messages.

    Raises:
        NetworkFormatError: as `save`, for networks.
    """
    records: dict[int, Any] = {}
    return _for_each(networks, path, lambda value: _record(value, records))


def _for_each(networks: dict[str, Any], path: str | os.PathLike, convert: Callable[[Any], Any]) -> dict[str, Any]:
    content = {}
    for key, value in networks.items():
        try:
            if not isinstance(key, str):
                raise TypeError("names have to be strings")
            content[key] = convert(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise NetworkFormatError(f"{os.fspath(path)}: not written, '{key}': {error}") from error
    return content


def _record(value: Any, records: dict[int, Any]) -> Any:
    """Return the record of a persistent object, one for each of them, and anything else as it is."""
    if not isinstance(value, torch.nn.Module) and type(value) not in _module_texts:
        return value
    if id(value) not in records:
        records[id(value)] = _new_record(value)
    return records[id(value)]


def _new_record(value: Any) -> Record:
    is_module = isinstance(value, torch.nn.Module)
    record = vars(value).get(builder.SOURCE_RECORD)
    if record is None:
        record = builder.describe(value, _module_texts)
        if is_module:
            record = builder.as_constructed(record, value)
    return builder.fill(record, value) if is_module else record


def _reconstruct_persistent_obj(meta: Any) -> Any:
    """Refuse to be called; network pickles name this function, which in the official code runs the text in them."""
    raise NetworkFormatError("a network pickle is opened with torch_utils.persistence.load, not with pickle.load")
