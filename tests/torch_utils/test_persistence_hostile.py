"""Files that are damaged, foreign or made to do harm: one clear error each, quickly, and nothing in them ever runs."""

import builtins
import io
import os
import pickle
import random
import struct
import types

import pytest
import torch
from golden_io import GOLDEN

from torch_utils import persistence
from torch_utils.persistence import NetworkFormatError

# An assembler for pickles, independent of the project's reader and writer.


class Raw(bytes):
    """Opcodes that leave one value on the stack."""


def glob(module, name):
    return Raw(f"c{module}\n{name}\n".encode())


def code(value):
    """Return the opcodes that make a value."""
    if isinstance(value, Raw):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(code, value)) + b"e"
    if isinstance(value, set):
        return b"\x8f(" + b"".join(map(code, value)) + b"\x90"
    if isinstance(value, dict):
        return b"}(" + b"".join(code(key) + code(item) for key, item in value.items()) + b"u"
    raise TypeError(value)


def call(module, name, *args):
    return Raw(glob(module, name) + code(args) + b"R")


def new(module, name, *args):
    return Raw(glob(module, name) + code(args) + b"\x81")


def build(target, state):
    return Raw(code(target) + code(state) + b"b")


def dump(value):
    return b"\x80\x04" + code(value) + b"."


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def blob(data=None, count=6, kind="FloatStorage", stored=None, key="1", location="cpu", **parts):
    """Return a storage in torch's old format, of which every part can be replaced."""
    data = struct.pack(f"<{count}f", *range(count)) if data is None else data
    handle = Raw(code(("storage", glob("torch", kind), key, location, count, None)) + b"Q")
    pieces = {"magic": MAGIC, "protocol": PROTOCOL, "system": {"little_endian": True}, "handle": handle, "keys": [key]}
    head = b"".join(b"\x80\x02" + code(value) + b"." for value in {**pieces, **parts}.values())
    return head + struct.pack("<q", count if stored is None else stored) + data


def storage(*args, **kwargs):
    return call("torch.storage", "_load_from_bytes", blob(*args, **kwargs))


def hooks():
    return call("collections", "OrderedDict")


def tensor(size=(2, 3), stride=(3, 1), offset=0, source=None):
    source = storage() if source is None else source
    return call("torch._utils", "_rebuild_tensor_v2", source, offset, size, stride, False, hooks())


def parameter(*args, **kwargs):
    return call("torch._utils", "_rebuild_parameter", tensor(*args, **kwargs), False, hooks())


def record(class_name="HostileTiny", state=None, **fields):
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state or {}}
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", {**meta, **fields})


def tiny(**changes):
    """Return the state of a `HostileTiny`; None removes an entry."""
    state = {
        "training": False,
        "_parameters": {"weight": parameter()},
        "_buffers": {"scale": tensor((1,), (1,), source=storage(count=1))},
        "_non_persistent_buffers_set": set(),
        "_modules": {"child": record("HostileChild", {"_parameters": {}, "_buffers": {}, "_modules": {}, "size": 4})},
        "rows": 2,
        "_init_args": (),
        "_init_kwargs": {"rows": 2, "columns": 3},
    }
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


def network(**changes):
    return dump({"G": record(state=tiny(**changes))})


def arguments(**kwargs):
    return network(_init_kwargs={"rows": 2, "columns": 3, **kwargs})


CANARY = []
SOURCE = "import builtins; builtins.hostile_canary.append('embedded source')"


def poke(*args, **kwargs):
    """Note that this was called, which hostile files try."""
    CANARY.append("called")


class Trap:
    """A class that hostile files try to have instantiated."""

    def __init__(self, *args):
        CANARY.append("instantiated")

    def __setstate__(self, state):
        CANARY.append("state set")


@persistence.persistent_class
class HostileChild(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.size = size


@persistence.persistent_class
class HostileTiny(torch.nn.Module):
    """The network that these files pretend to hold."""

    def __init__(self, rows: int, columns, layers=0, table=(), gain=1.0, options=None):
        super().__init__()
        self.rows = rows
        self.gain = gain
        self.weight = torch.nn.Parameter(torch.randn(rows, columns))
        self.register_buffer("scale", torch.ones(1))
        self.child = HostileChild()
        features = [8] * layers
        for index, size in enumerate(features):
            setattr(self, f"fc{index}", torch.nn.Parameter(torch.randn(size)))


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch):
    """Check after a test that nothing in the files it read has run."""
    CANARY.clear()
    monkeypatch.setattr(builtins, "hostile_canary", CANARY, raising=False)
    module = types.ModuleType("hostile_module")
    module.poke, module.Trap = poke, Trap
    monkeypatch.setitem(__import__("sys").modules, "hostile_module", module)
    yield
    assert CANARY == []


def laughs(depth=60):
    """A list of ten lists of ten lists ...: a few hundred bytes, 10**60 elements when written out."""
    data = b"]q\x00"
    for level in range(depth):
        data += b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
    return Raw(b"(" + data + b"t")


def nested(depth, begin=b"(", end=b"t"):
    return Raw(begin * depth + b"N" + end * depth)


def chain(depth, table=None):
    """Records within records, as attributes or as layers."""
    begin = glob("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(}("
    fields = {"type": "class", "version": 6, "module_src": "", "class_name": "HostileChild"}
    begin += b"".join(code(key) + code(value) for key, value in fields.items()) + code("state")
    begin += b"}(" + (code("_modules") + b"}(" + code(table) if table else code("x"))
    return Raw(begin * depth + (record() if table else b"N") + (b"uutR" if table is None else b"uuutR") * depth)


def many_paths(levels=40):
    """Layers that stand in two places each: 2**40 ways down."""
    data = record("HostileChild") + b"q\x00"
    for level in range(levels):
        names = {"a": Raw(b"h" + bytes([level])), "b": Raw(b"h" + bytes([level]))}
        data += b"0" + record("HostileChild", {"_modules": names}) + b"q" + bytes([level + 1])
    return Raw(data)


def one_table():
    """Two layers that share a table: with a thousand of each, a million entries."""
    first = record("HostileChild", {"_buffers": Raw(code({"a": None}) + b"q\x63")})
    second = record("HostileChild", {"_buffers": Raw(b"h\x63")})
    return record(state={"_modules": {"a": first, "b": second}})


def checkpoint_with_code():
    """What `torch.save` writes today, with a call of `poke` in it."""

    class Call:
        def __reduce__(self):
            return poke, ()

    buffer = io.BytesIO()
    torch.save(Call(), buffer)
    return buffer.getvalue()


def repeated_storage():
    """One blob of 1 MB, a thousand storages."""
    big = blob(count=2**18)
    make = b"c" + b"torch.storage\n_load_from_bytes\n"
    return b"\x80\x04" + code(big) + b"q\x000](" + (make + b"h\x00\x85R") * 1000 + b"e."


def repeated_text():
    """One text of 1 MB, made into bytes a thousand times."""
    make = b"c_codecs\nencode\nh\x00h\x01\x86R"
    return b"\x80\x02" + code("x" * 2**20) + b"q\x00" + code("latin1") + b"q\x0100](" + make * 1000 + b"e."


def opaque_chain(depth):
    """What an unknown function would return, called, and what that would return, called ..."""
    return Raw(glob("os", "system") + b")R" * depth)


def opaque_ways(count, name="G"):
    """As many names for a long chain, beside a network."""
    names = b"".join(code(f"{index}") + b"h\x00)R" for index in range(count))
    return b"\x80\x04" + opaque_chain(count) + b"q\x000}(" + names + code(name) + record(state=tiny()) + b"u."


def test_pythons_own_unpickler_runs_what_these_files_name():
    """Python's own unpickler does run what these files name."""
    pickle.loads(dump({"x": FORBIDDEN["hostile_module.poke"], "y": FORBIDDEN["builtins.eval"]}))
    assert CANARY == ["called", 1]
    CANARY.clear()


def test_the_harmless_form_loads():
    content = persistence.load(network())
    assert type(content["G"]) is HostileTiny
    assert torch.equal(content["G"].weight, torch.arange(6.0).reshape(2, 3))
    assert persistence.load(arguments(gain=2.0))["G"].gain == 2.0
    permuted = network(_parameters={"weight": parameter(stride=(1, 2))})
    assert torch.equal(persistence.load(permuted)["G"].weight, torch.arange(6.0).reshape(3, 2).T)


GOOD = network()
FORBIDDEN = {
    "os.system": call("os", "system", "touch /tmp/hostile"),
    "builtins.exec": call("builtins", "exec", "hostile_canary.append(1)"),
    "builtins.eval": call("builtins", "eval", "hostile_canary.append(1)"),
    "builtins.getattr": call("builtins", "getattr", glob("hostile_module", "poke"), "__call__"),
    "builtins.__import__": call("builtins", "__import__", "os"),
    "posix.system": call("posix", "system", "touch /tmp/hostile"),
    "subprocess.Popen": new("subprocess", "Popen", ("touch", "/tmp/hostile")),
    "copyreg._reconstructor": call("copyreg", "_reconstructor", glob("builtins", "object"), None, None),
    "functools.partial": call("functools", "partial", glob("os", "system")),
    "operator.attrgetter": call("operator", "attrgetter", "system"),
    "hostile_module.poke": call("hostile_module", "poke", 1),
    "hostile_module.Trap": build(new("hostile_module", "Trap"), {"x": 1}),
    "torch.load": call("torch", "load", "x.pt"),
    "torch.FloatStorage": glob("torch", "FloatStorage"),
    "torch.storage._load_from_bytes.__globals__": glob("torch.storage", "_load_from_bytes.__globals__"),
    "torch_utils.persistence._reconstruct_persistent_obj.__globals__": glob(
        "torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"
    ),
    "torch_utils.persistence.load": call("torch_utils.persistence", "load", "/etc/passwd"),
    "torch.hub.load": call("torch.hub", "load", "a/b", "c"),
    "torch.nn.modules.container.Sequential": new("torch.nn.modules.container", "Sequential"),
    "dnnlib.util.EasyDict.update": glob("dnnlib.util", "EasyDict.update"),
    "numpy.load": call("numpy", "load", "x.npy"),
    "_codecs.decode": call("_codecs", "decode", b"x", "zip"),
    "webbrowser.open": call("webbrowser", "open", "http://example.org"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
@pytest.mark.parametrize("place", ["top", "state", "arguments", "source"])
def test_forbidden_globals_are_named(name, place):
    value = FORBIDDEN[name]
    data = {
        "top": lambda: dump({"x": value}),
        "state": lambda: network(extra=value),
        "arguments": lambda: arguments(options=value),
        "source": lambda: dump({"G": record(module_src=value)}),
    }[place]()
    with pytest.raises(NetworkFormatError) as caught:
        persistence.load(data)
    assert f"{name}, which is not allowed" in str(caught.value) or name in ("functools.partial", "builtins.getattr")
    assert "not allowed" in str(caught.value)


OBJECT = b"(i" + b"hostile_module\nTrap\n"
HOSTILE = {
    # Not a network pickle at all.
    "empty": (b"", "empty"),
    "text": (b"hello", "does not begin like a pickle"),
    "web page": (b"<!doctype html>", "web page"),
    "zip": (b"PK\x03\x04....", "zip archive"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "gzip": (b"\x1f\x8b\x08", "gzip"),
    "protocol 0": (pickle.dumps({"G": 1}, 0), "does not begin like a pickle"),
    "a list": (dump([1, 2]), "holds a list"),
    "a number": (dump(5), "holds a int"),
    "a network alone": (dump(record(state=tiny())), "holds a Record"),
    "number keys": (dump({1: 2}), "holds a dict"),
    "no network": (dump({"G": 5}), "'G' is a int, not a network"),
    "two pickles": (GOOD + GOOD, "follow the pickle"),
    # Damaged.
    "truncated": (GOOD[:-1], "truncated"),
    "truncated early": (GOOD[:200], "truncated"),
    "only a header": (b"\x80\x04", "truncated"),
    "nothing on the stack": (b"\x80\x04.", "ends too early"),
    "two things on the stack": (b"\x80\x04NN.", "ends too early"),
    "an open mark": (b"\x80\x04(N.", "ends too early"),
    "a missing mark": (b"\x80\x04t.", "mark is missing"),
    "a wrong reference": (b"\x80\x04h\x07.", "reference to nothing"),
    "half an item": (b"\x80\x04}(X\x01\x00\x00\x00au.", "half an item"),
    "not UTF-8": (b"\x80\x04X\x01\x00\x00\x00\xff.", "damaged"),
    "an item for nothing": (b"\x80\x04Na.", "damaged"),
    "future protocol": (b"\x80\x63N.", "does not begin like a pickle"),
    # Opcodes with no place here.
    "extension code 1": (b"\x80\x04\x82\x01.", "EXT1"),
    "extension code 2": (b"\x80\x04\x83\x01\x00.", "EXT2"),
    "extension code 4": (b"\x80\x04\x84\x01\x00\x00\x00.", "EXT4"),
    "INST": (b"\x80\x04" + OBJECT + b".", "INST"),
    "OBJ": (b"\x80\x04(" + glob("hostile_module", "Trap") + b"o.", "OBJ"),
    "OBJ without global": (b"\x80\x04(No.", "OBJ"),
    "persistent id": (b"\x80\x04Pabc\n.", "PERSID"),
    "binary persistent id": (b"\x80\x04NQ.", "persistent id"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "number as text": (b"\x80\x04I" + b"9" * 100 + b"\n.", "the pickle opcode INT"),
    "NEWOBJ_EX": (b"\x80\x04" + glob("dnnlib.util", "EasyDict") + b")}\x92.", "NEWOBJ_EX"),
    "unknown opcode": (b"\x80\x04\xff.", "byte 255"),
    # Calls of things that are not for calling, states for things that have none.
    "call a dictionary": (dump({"x": Raw(b"})R")}), "calls a dict"),
    "call a dtype": (dump({"x": call("numpy", "ndarray", 1)}), "calls numpy.ndarray"),
    "call EasyDict": (dump({"x": call("dnnlib.util", "EasyDict")}), "calls EasyDict"),
    "instantiate a function": (dump({"x": new("torch._utils", "_rebuild_parameter")}), "instantiates parameter"),
    "EasyDict with arguments": (dump({"x": new("dnnlib.util", "EasyDict", {})}), "instantiates EasyDict"),
    "state of a dictionary": (dump({"x": build({}, {"a": 1})}), "sets the state of a dict"),
    "state of a global": (dump({"x": build(glob("collections", "OrderedDict"), {"a": 1})}), "sets the state"),
    "state of a network": (dump({"G": build(record(state=tiny()), {"a": 1})}), "sets the state of a Record"),
    "state of a tensor": (dump({"x": build(tensor(), {"a": 1})}), "sets the state of a Tensor"),
    "global as a value": (dump({"x": glob("collections", "OrderedDict")}), "Global cannot be"),
    # Bombs.
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "truncated"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "truncated"),
    "long byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "truncated"),
    "a terabyte of text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "truncated"),
    "long frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "truncated"),
    "far memo entry": (b"\x80\x04Nr\xff\xff\xff\xff0.", "ends too early"),
    "nested tuples": (dump({"x": nested(100_000)}), "RecursionError"),
    "nested lists": (dump({"x": nested(100_000, b"](", b"e")}), "RecursionError"),
    "nested tuple as key": (b"\x80\x04}" + nested(100_000) + b"Ns.", "key that is no string"),
    "nested in arguments": (arguments(options=nested(100_000)), "RecursionError|too many"),
    "laughs in arguments": (arguments(options=laughs()), "too many"),
    "laughs as attribute": (network(rows=laughs()), "'rows' is a tuple"),
    "laughs as a global's name": (b"\x80\x04" + code("os") + laughs() + b"\x93.", "os.a tuple"),
    "itself in arguments": (arguments(options=Raw(b"]q\x05h\x05a")), "RecursionError|too many"),
    "one blob a thousand times": (repeated_storage(), "released memoryview"),
    "three million empty sets": (b"\x80\x04(" + b"\x8f" * 3_000_000 + b"t.", "more than 1000000"),
    "one text a thousand times as bytes": (repeated_text(), "again and again"),
    "bytes of another encoding": (dump({"x": call("_codecs", "encode", "eJwDAAAAAAE=", "zip")}), "made of text by zip"),
    "a million unknown names": (b"\x80\x04](" + glob("os", "x") * 1_000_000 + b"e.", "more than 1000000"),
    "unknown within unknown": (dump({"x": opaque_chain(100_000)}), "os.system, which is not allowed"),
    "many ways to one unknown": (opaque_ways(100_000), "os.system, which is not allowed"),
    "many ways beside a network": (opaque_ways(100_000, "G_ema"), "RecursionError"),
    "many things that cannot be written": (
        dump({"G_ema": record(state=tiny()), **{f"x{index}": glob("numpy", "ndarray") for index in range(9)}}),
        "'x4': a Global cannot be written",
    ),
    "laughs for something unknown": (
        dump({"x": build(call("os", "system", laughs()), {"a": laughs()})}),
        "os.system, which is not allowed",
    ),
    "two states of something unknown": (
        dump({"x": build(build(new("os", "system"), {"a": 1}), {"a": 2})}),
        "sets the state of a Opaque",
    ),
    "unknown within a needed network": (
        dump({"G_ema": record(state=tiny(extra=[call("os", "system")])), "G": record(state=tiny())}),
        "'G_ema' .HostileTiny.: refers to os.system",
    ),
    # Records.
    "record of a wrong type": (dump({"G": record(type="function")}), "only classes of version 6"),
    "record of a wrong version": (dump({"G": record(version=7)}), "version 7"),
    "record without source": (dump({"G": record(module_src=None)}), "module_src"),
    "record without state": (dump({"G": record(state=[1])}), "'state' is no dict"),
    "record that is a list": (
        dump({"G": call("torch_utils.persistence", "_reconstruct_persistent_obj", [1])}),
        "without a record",
    ),
    "unknown class": (dump({"G": record("Unheard", tiny())}), "'G' .Unheard.: the class is not known"),
    "unknown class with weights elsewhere": (dump({"x": record("Unheard", tiny())}), "the class is not known"),
    "no name with control characters": (dump({"G": record("\x1b[31mred", {})}), r"\\x1b"),
    "a class of Python": (dump({"G": record("int", {})}), "the class is not known"),
    "missing parameter": (network(_parameters={}), "missing: weight"),
    "missing buffer": (network(_buffers={"scale": None}), "missing: scale"),
    "surplus tensor": (network(_buffers={"scale": tensor((1,), (1,)), "more": tensor()}), "unexpected: more"),
    "parameter and buffer of one name": (network(_buffers={"weight": tensor()}), "'weight' occurs twice"),
    "duplicate key": (
        dump({"G": record(state=Raw(code(tiny())[:-1] + code("rows") + code(2) + b"u"))}),
        "rows. appears",
    ),
    "dotted name": (network(_parameters={"child.weight": parameter()}), "has the name 'child.weight'"),
    "endless name": (network(_parameters={"w" * 5000: parameter()}), "has the name"),
    "parameter that is a number": (network(_parameters={"weight": 3}), "'weight' in _parameters is a int"),
    "layers that are a list": (network(_modules=[1]), "no dictionary"),
    "layer that is a list": (network(_modules={"child": [1]}), "'child' in _modules is a list"),
    "missing layer": (network(_modules={}), "layer 'child' .HostileChild. is missing"),
    "layer of another class": (
        network(_modules={"child": record("Other")}),
        "'child' is a Other; expected HostileChild",
    ),
    "surplus layer": (
        network(_modules={"child": record("HostileChild"), "more": record("HostileChild")}),
        "'more' is a HostileChild; expected nothing",
    ),
    "attribute that disagrees": (network(rows=7), "'rows' is 7; the constructor arguments give 2"),
    "attribute of a layer": (
        network(_modules={"child": record("HostileChild", {"size": 5})}),
        "'child.size' is 5; the constructor arguments give 4",
    ),
    "attribute not a number": (network(gain=float("nan")), "'gain' is nan"),
    "layers within layers": (dump({"G": chain(20_000, "child")}), "too deep"),
    "one table in two layers": (dump({"G": one_table()}), "table _buffers stands in two places"),
    "one table in two layers, not needed": (dump({"x": one_table()}), "table _buffers stands in two places"),
    "the same layers again and again": (dump({"G": many_paths()}), "stands in two places"),
    # Constructor arguments.
    "no arguments": (network(_init_kwargs={}), "missing a required argument"),
    "unknown argument": (arguments(evil=1), "unexpected keyword argument 'evil'"),
    "arguments that are a list": (network(_init_kwargs=[1]), "constructor arguments are malformed"),
    "positional arguments that are a list": (network(_init_args=[1]), "constructor arguments are malformed"),
    "text for a number": (arguments(rows="2"), "rows is '2', a str"),
    "truth for a number": (arguments(rows=True), "rows is 'True', a bool"),
    "huge number": (arguments(rows=2**40), "1099511627776 is out of range"),
    "huge float": (arguments(columns=1e30), "does not accept"),
    "not a number": (arguments(gain=float("nan")), "nan is out of range"),
    "negative": (arguments(columns=-3), "does not accept"),
    "too wide": (arguments(columns=100_000), "wrong shape: weight"),
    "too many layers": (arguments(layers=100_000), "far more layers than the file has"),
    "endless argument": (arguments(table=[0] * 5000), "has 5000 items"),
    "endless text": (arguments(options="x" * 5000), "out of range"),
    "tensor as argument": (arguments(options=tensor()), "argument is a Tensor"),
    "record as argument": (arguments(options=record()), "argument is a Record"),
    # Tensors.
    "wrong shape": (network(_parameters={"weight": parameter((3, 2), (2, 1))}), r"weight \[3, 2\] for \[2, 3\]"),
    "wrong dtype": (
        network(_parameters={"weight": parameter(source=storage(bytes(24), kind="IntStorage"))}),
        "weight torch.int32 for torch.float32",
    ),
    "stride beyond the storage": (network(_parameters={"weight": parameter(stride=(30, 1))}), "beyond its storage"),
    "offset beyond the storage": (network(_parameters={"weight": parameter(offset=1)}), "beyond its storage"),
    "negative offset": (network(_parameters={"weight": parameter(offset=-1)}), "offset"),
    "negative stride": (network(_parameters={"weight": parameter(stride=(3, -1))}), "stride"),
    "huge stride": (network(_parameters={"weight": parameter(stride=(2**70, 1))}), "stride"),
    "stride zero": (network(_parameters={"weight": parameter((2**40, 3), (0, 1))}), "overlap"),
    "float size": (network(_parameters={"weight": parameter((2.0, 3), (3, 1))}), "shape"),
    "many axes": (network(_parameters={"weight": parameter((1,) * 100, (1,) * 100)}), "shape"),
    "strides missing": (network(_parameters={"weight": parameter((2, 3), (1,))}), "shape"),
    "hooks": (
        network(
            _parameters={
                "weight": call("torch._utils", "_rebuild_parameter", tensor(), False, {"hook": 1}),
            }
        ),
        "malformed parameter",
    ),
    "parameter of a number": (dump({"x": call("torch._utils", "_rebuild_parameter", 1, False, hooks())}), "malformed"),
    "one tensor in two places": (
        dump(
            {
                "G": record(
                    state=tiny(_parameters=Raw(b"}(" + code("weight") + parameter() + b"q\x01" + code("b") + b"h\x01u"))
                )
            }
        ),
        "two places",
    ),
    "infinite weight": (
        network(_parameters={"weight": parameter(source=storage(struct.pack("<6f", 1, 2, float("inf"), 4, 5, 6)))}),
        "'weight' contains non-finite",
    ),
    "undefined weight": (
        network(_buffers={"scale": tensor((1,), (1,), source=storage(struct.pack("<f", float("nan")), count=1))}),
        "'scale' contains non-finite",
    ),
    # Storages.
    "storage of nothing": (dump({"x": call("torch.storage", "_load_from_bytes", 5)}), "without bytes"),
    "checkpoint with code as a storage": (
        dump({"x": call("torch.storage", "_load_from_bytes", checkpoint_with_code())}),
        "does not begin like a pickle",
    ),
    "storage without content": (dump({"x": call("torch.storage", "_load_from_bytes", b"")}), "truncated"),
    "wrong magic number": (dump({"x": storage(magic=5)}), "magic number"),
    "wrong storage protocol": (dump({"x": storage(protocol=1002)}), "magic number or protocol"),
    "big-endian": (dump({"x": storage(system={"little_endian": False})}), "little-endian"),
    "storage on no device": (dump({"x": storage(location="meta:0")}), "meta:0, which is no device"),
    "storage keys disagree": (dump({"x": storage(keys=["2"])}), "keys disagree"),
    "unknown storage class": (dump({"x": storage(kind="EvilStorage")}), "torch.EvilStorage, which is not allowed"),
    "code in a storage": (dump({"x": storage(system=call("hostile_module", "poke"))}), "hostile_module.poke"),
    "code as storage handle": (dump({"x": storage(handle=call("os", "system", "true"))}), "os.system"),
    "no storage handle": (dump({"x": storage(handle=5)}), "without description"),
    "storage too short": (dump({"x": storage(b"1234")}), "4 bytes claims 6"),
    "storage too long": (dump({"x": storage(bytes(100))}), "100 bytes claims 6"),
    "two element counts": (dump({"x": storage(stored=7)}), "claims 6 .or 7."),
    "huge element count": (dump({"x": storage(b"", count=2**60)}), "claims 1152921504606846976"),
    "negative element count": (dump({"x": storage(b"", count=-1)}), "claims -1"),
    "truth values of 2": (dump({"x": storage(b"\x02", count=1, kind="BoolStorage")}), "truth values"),
    "pickle bomb in a storage": (dump({"x": storage(system=Raw(b"(" + b"]" * 1000 + b"t"))}), "more than 200"),
    # NumPy.
    "object array": (dump({"x": call("numpy", "dtype", "O8", False, True)}), "NumPy dtype 'O8'"),
    "scalar of the wrong size": (
        dump({"x": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", "f8"), b"123")}),
        "wrong size",
    ),
    "array of the wrong size": (
        dump({"x": call("numpy._core.numeric", "_frombuffer", b"1234", call("numpy", "dtype", "f4"), (2,), "C")}),
        "wrong size",
    ),
    "array in a wrong order": (
        dump({"x": call("numpy.core.numeric", "_frombuffer", b"1234", call("numpy", "dtype", "f4"), (1,), "K")}),
        "array's order",
    ),
    "huge array": (
        dump(
            {
                "x": build(
                    call("numpy.core.multiarray", "_reconstruct", glob("numpy", "ndarray"), (0,), b"b"),
                    (1, (2**40, 2**20), call("numpy", "dtype", "f4"), False, b"1234"),
                )
            }
        ),
        "wrong size",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name, tmp_path):
    data, reason = HOSTILE[name]
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    with pytest.raises(NetworkFormatError, match=reason) as caught:
        persistence.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 3000 and str(caught.value).isprintable()


def test_many_wrong_names_are_not_all_listed():
    extra = {f"extra{index}": tensor((1,), (1,), source=storage(count=1)) for index in range(150)}
    with pytest.raises(NetworkFormatError, match="extra99 and 50 more"):
        persistence.load(network(_buffers={"scale": tensor((1,), (1,), source=storage(count=1)), **extra}))


def test_laughs_outside_networks_are_harmless(tmp_path):
    content = persistence.load(dump({"x": laughs(), "G": record(state=tiny(note=laughs()))}))
    persistence.save(content, tmp_path / "again.pkl")  # sharing is kept: still small
    assert (tmp_path / "again.pkl").stat().st_size < 10_000
    assert type(persistence.load(tmp_path / "again.pkl")["G"]) is HostileTiny


def test_records_within_records_are_not_followed(tmp_path):
    content = persistence.load(dump({"x": chain(20_000)}))
    assert type(content["x"]) is HostileChild
    with pytest.raises(NetworkFormatError, match="not written, 'x': maximum recursion depth"):
        persistence.save(content, tmp_path / "again.pkl")


def test_what_is_unknown_is_kept_beside_a_network_and_never_looked_up(tmp_path, monkeypatch):
    """Neither reading nor writing imports anything, though it could be: the module is there."""
    trap = build(new("hostile_module", "Trap"), {"x": 1, "pipe": glob("hostile_module", "poke"), "t": tensor()})
    itself = Raw(new("hostile_module", "Trap") + b"q\x07" + code("self") + b"h\x07\x86b")
    listed = Raw(call("hostile_module", "poke") + b"](" + code(1) + b"e0" + b"(" + code(2) + b"e")
    parts = {"D": trap, "called": call("hostile_module", "poke", 1), "itself": itself, "listed": listed}
    notes = []
    content = persistence.load(dump({"G_ema": record(state=tiny()), **parts, "odd": glob("numpy", "ndarray")}), notes)
    assert type(content["G_ema"]) is HostileTiny and set(content) == {"G_ema", *parts}
    assert notes[0] == "'D' is a hostile_module.Trap, which is not known here; it is kept unopened"
    assert "'odd' could not be written back and is left out" in notes[-1]
    with monkeypatch.context() as patch:
        patch.delitem(__import__("sys").modules, "hostile_module")
        persistence.save(content, tmp_path / "a.pkl")
        again = persistence.load(tmp_path / "a.pkl")
        persistence.save(again, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    assert again["D"].state["x"] == 1 and torch.equal(again["D"].state["t"], torch.arange(6.0).reshape(2, 3))
    assert again["itself"].state[1] is again["itself"] and again["listed"].items == [2]


def test_tensors_of_a_gpu_are_read_on_the_cpu():
    content = persistence.load(network(_parameters={"weight": parameter(source=storage(location="cuda:0"))}))
    assert content["G"].weight.device.type == "cpu"


def test_unknown_settings_objects_are_kept_unopened():
    content = persistence.load(dump({"loss_fn": record("EvilLoss", {"x": 1.0}), "augment_pipe": record("HostileTiny")}))
    assert content["loss_fn"].class_name == "EvilLoss" and content["loss_fn"].module_src == SOURCE
    assert isinstance(content["augment_pipe"], persistence.Record)


def test_stylegan3_generators_are_recognised():
    synthesis = record(
        "SynthesisNetwork", {"_modules": {"input": record("SynthesisInput"), "L0_36_512": record("Layer")}}
    )
    data = dump({"G_ema": record("Generator", {"_modules": {"synthesis": synthesis}, "_init_kwargs": {"z_dim": 512}})})
    with pytest.raises(NetworkFormatError, match="StyleGAN3"):
        persistence.load(data)


# Places that are not files.


def test_missing_file(tmp_path):
    with pytest.raises(NetworkFormatError, match="nothing.pkl: no such file"):
        persistence.load(tmp_path / "nothing.pkl")


def test_directory(tmp_path):
    with pytest.raises(NetworkFormatError, match="not a regular file"):
        persistence.load(tmp_path)


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NetworkFormatError, match="not a regular file"):
        persistence.load(tmp_path / "pipe")


def test_text_file_object():
    with pytest.raises(NetworkFormatError, match="binary mode"):
        persistence.load(io.StringIO("x"))


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "loop", "nowhere", "folder", "pipe"])
def test_symbolic_links_to_what_is_no_file(tmp_path, target):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(NetworkFormatError, match="link: (not a regular file|no such file)"):
        persistence.load(tmp_path / "link")


def test_symbolic_link_to_a_network(tmp_path):
    """Caches of downloads are full of them."""
    (tmp_path / "file").write_bytes(GOOD)
    (tmp_path / "link").symlink_to("file")
    assert type(persistence.load(tmp_path / "link")["G"]) is HostileTiny


def test_files_of_holes(tmp_path):
    """A terabyte that takes no room on the disk must not be read."""
    path = tmp_path / "holes.pkl"
    with open(path, "wb") as file:
        file.write(GOOD[:-1])
        file.truncate(2**40)
    with pytest.raises(NetworkFormatError, match="truncated, or something follows"):
        persistence.load(path)
    with open(path, "ab") as file:
        file.write(b".")
    with pytest.raises(NetworkFormatError, match="1100 GB, far more than any network"):
        persistence.load(path)


# Damage by chance.


@pytest.mark.parametrize("seed", range(10))
def test_random_flips_load_or_are_refused(seed):
    """Twenty files with one wrong byte each: ten anywhere, ten outside the weights."""
    good = (GOLDEN / "edm/fp16_cond.pkl").read_bytes()
    draw = random.Random(seed)
    structure = [at for at in range(len(good) - 40) if good[at : at + 20].isascii()]
    for index in range(20):
        at = draw.choice(structure) if index % 2 else draw.randrange(len(good))
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        try:
            content = persistence.load(bytes(bad))
        except NetworkFormatError as error:
            assert str(error).startswith("network pickle: ")
        else:
            assert isinstance(content, dict)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_golden_pickle(share):
    good = (GOLDEN / "stylegan2/sg2ada-orig16.pkl").read_bytes()
    with pytest.raises(NetworkFormatError, match="truncated"):
        persistence.load(good[: int(share * len(good))])
