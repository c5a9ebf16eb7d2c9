"""A pickle interpreter that can only produce data: it imports nothing, calls nothing from the file and expands nothing.

The opcodes that network pickles use are interpreted here instead of by `pickle.Unpickler`, whose C code can be made to
allocate gigabytes by one memo index and to overflow the C stack by hashing nested tuples, and which keeps a second copy
of every weight in its memo. Opcodes that are not listed in `_OPERATIONS` are refused by name. So are globals that the
caller did not list, or else they become `Unknown`, and what the file makes of them `Opaque`: names and data, inert.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_KEY = 2**60  # below the modulus of Python's integer hash: no two keys can be made to collide


class NetworkFormatError(ValueError):
    """A file is not a network pickle that this project can use; the message names the file and the reason."""


def printable(value: object) -> str:
    """Return a value from a file as text for a message: short, without control characters, and never expanded."""
    if not isinstance(value, (str, int, float, type(None), BaseException)):
        return f"a {type(value).__name__}"
    text = str(value)[:1000]
    return text if text.isprintable() else ascii(text)


def need(condition: bool, what: str) -> None:
    """Raise NetworkFormatError unless the condition holds."""
    if not condition:
        raise damaged(what)


def damaged(what: str) -> NetworkFormatError:
    """Return the error for a file that no writer of network pickles has made as it is."""
    return NetworkFormatError(f"damaged or not a network pickle: {what}")


@dataclass(frozen=True, eq=False)
class Global:
    """A global that a pickle may refer to; this object stands for it.

    Attributes:
        name: for messages.
        call: what REDUCE calls, with a number of arguments between the two in `arity`; None: not to be called.
        new: what NEWOBJ calls, without arguments; None: not to be instantiated.
        value: what the global stands for, where it is only mentioned.
    """

    name: str
    call: Callable | None = None
    arity: tuple[int, int] = (0, 0)
    new: Callable | None = None
    value: Any = None


@dataclass(frozen=True, eq=False, slots=True)
class Unknown:
    """The name of a class or function that is not on the list; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{printable(self.module)}.{printable(self.name)}"

    def refusal(self) -> NetworkFormatError:
        """Return the error for a place where nothing unknown can be used."""
        return NetworkFormatError(f"refers to {self}, which is not allowed in a network pickle")


@dataclass(eq=False, slots=True)
class Opaque:
    """An object that only something unknown could make: how the file describes it, without having been made.

    Attributes:
        root: what is unknown about it.
        maker: what would be called; an `Unknown`, another `Opaque`, or a listed `Global` that was given one of these.
        args: the arguments of the call.
        new: whether `maker` is a class to be instantiated without its constructor.
        state: what the object's state would be set to; None where the file sets none.
        items, pairs: what would be appended to the object, and set in it as in a dictionary.
    """

    root: Unknown
    maker: Any
    args: tuple
    new: bool
    state: Any = None
    items: list | None = None
    pairs: list | None = None

    def __deepcopy__(self, memo: dict) -> "Opaque":
        return self  # never changed once the file is read, as records are


@dataclass(eq=False)
class PersistentId:
    """A persistent id, with the value that the file gives for it."""

    value: Any


class Machine:
    """An interpreter of one pickle.

    Args:
        data: the file, or a part of it; bytes objects in the pickle stay views of it.
        globals_: what each (module, name) stands for.
        keep_unknown: let other globals be `Unknown`; a pickle that names one is refused else.
        build: what BUILD calls with an object and its state; None: the opcode is refused.
        position: where the pickle begins; after `run`, where it ended.
        allow_persistent_id: let BINPERSID yield a `PersistentId`.
        max_operations: when to give up. One operation yields a few hundred bytes at most, or what stands in the file.
    """

    def __init__(
        self,
        data: memoryview,
        globals_: Mapping[tuple[str, str], Global],
        build: Callable[[Any, Any], None] | None = None,
        position: int = 0,
        allow_persistent_id: bool = False,
        max_operations: int = 1_000_000,
        keep_unknown: bool = False,
    ):
        self.data = data
        self.globals = globals_
        self.set_state = build
        self.position = position
        self.allow_persistent_id = allow_persistent_id
        self.max_operations = max_operations
        self.keep_unknown = keep_unknown
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.unknown: dict[tuple[str, str], Unknown] = {}

    def run(self) -> Any:
        """Return the object that the pickle describes.

        Raises:
            NetworkFormatError: the pickle does what is not allowed or makes no sense; others are possible, too.
        """
        need(self.take(1) == pickle.PROTO and self.uint(1) in (2, 3, 4, 5), "it does not begin like a pickle")
        for _ in range(self.max_operations):
            code = self.uint(1)
            if code == pickle.STOP[0]:
                need(len(self.stack) == 1 and not self.marked, "the pickle ends too early")
                return self.stack.pop()
            operation = _OPERATIONS[code]
            if operation is None:
                raise NetworkFormatError(f"{_opcode_name(code)}, which network pickles do not use")
            operation(self)
        raise NetworkFormatError(f"more than {self.max_operations} pickle operations, far more than any network needs")

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise NetworkFormatError("the file is truncated")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, size: int) -> str:
        return str(self.take(size), "utf-8", "surrogatepass")

    def line(self) -> str:
        name, newline, _ = bytes(self.data[self.position : self.position + 500]).partition(b"\n")
        need(bool(newline) or len(name) < 500, "a global with an endless name")
        self.take(len(name) + 1)
        return str(name, "utf-8")

    def pop(self) -> Any:
        need(bool(self.stack), "the stack is empty")
        return self.stack.pop()

    def pop_marked(self) -> list:
        need(bool(self.marked), "a mark is missing")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def top(self) -> Any:
        need(bool(self.stack), "the stack is empty")
        return self.stack[-1]

    def put_appended(self, items: list) -> None:
        target = self.top()
        if isinstance(target, Opaque):
            target.items = target.items or []
            target = target.items
        need(isinstance(target, list), "an item for something that is no list")
        target.extend(items)

    def put_items(self, pairs: list) -> None:
        target = self.top()
        need(len(pairs) % 2 == 0, "a dictionary with half an item")
        if isinstance(target, Opaque):
            target.pairs = target.pairs or []
            target.pairs.extend(pairs)
            return
        need(isinstance(target, dict), "an item for something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2]):
            need(type(key) is str or (type(key) is int and abs(key) < _MAX_KEY), "a dictionary key that is no string")
            if key in target:
                raise NetworkFormatError(f"'{printable(key)}' appears twice in one dictionary")
            target[key] = value

    def find_global(self, module: Any, name: Any) -> None:
        is_name = type(module) is str and type(name) is str
        found = self.globals.get((module, name)) if is_name else None
        if found is None and not (is_name and self.keep_unknown):
            raise Unknown(module, name).refusal()
        self.stack.append(found or self.unknown.setdefault((module, name), Unknown(module, name)))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        need(index in self.memo, "a reference to nothing")
        self.stack.append(self.memo[index])

    # Operations with more to them than one push or pop.

    def stack_global(self) -> None:
        name = self.pop()
        self.find_global(self.pop(), name)

    def global_(self) -> None:
        module = self.line()
        self.find_global(module, self.line())

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if self.put_opaque(function, args, new=False):
            return
        if not isinstance(function, Global) or function.call is None:
            raise NetworkFormatError(f"calls {_kind(function)}, which is not allowed")
        least, most = function.arity
        if type(args) is not tuple or not least <= len(args) <= most:
            raise NetworkFormatError(f"calls {function.name} with the wrong number of arguments")
        self.stack.append(function.call(*args))

    def newobj(self) -> None:
        args, kind = self.pop(), self.pop()
        if self.put_opaque(kind, args, new=True):
            return
        if not isinstance(kind, Global) or kind.new is None or type(args) is not tuple or args:
            raise NetworkFormatError(f"instantiates {_kind(kind)}, which is not allowed")
        self.stack.append(kind.new())

    def put_opaque(self, maker: Any, args: Any, new: bool) -> bool:
        """Push a description in place of what a call gives, if it is one of or with something unknown; say whether."""
        if type(args) is not tuple or not isinstance(maker, (Global, Unknown, Opaque)):
            return False
        inert = next((item for item in (maker, *args) if isinstance(item, (Unknown, Opaque))), None)
        if inert is None:
            return False
        self.stack.append(Opaque(inert if isinstance(inert, Unknown) else inert.root, maker, args, new))
        return True

    def build(self) -> None:
        if self.set_state is None:
            raise damaged("an object's state where there are no objects")
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque) and target.state is None:
            target.state = state
        else:
            self.set_state(target, state)

    def frame(self) -> None:
        if self.uint(8) > len(self.data) - self.position:
            raise NetworkFormatError("the file is truncated")

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def put_tuple(self, count: int) -> None:
        need(len(self.stack) >= count, "the stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def add_items(self) -> None:
        items = self.pop_marked()
        need(all(type(item) is str for item in items), "a set of something other than strings")
        target = self.top()
        need(isinstance(target, set), "an item for something that is no set")
        target.update(items)

    def persistent_id(self) -> None:
        need(self.allow_persistent_id, "a persistent id outside a storage")
        self.stack.append(PersistentId(self.pop()))


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"


def _opcode_name(code: int) -> str:
    names = [name for name in pickle.__all__ if name.isupper() and getattr(pickle, name) == bytes([code])]
    return f"uses the pickle opcode {names[0]}" if names else f"has byte {code} where a pickle opcode belongs"


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        value = make(machine)  # which may replace the stack
        machine.stack.append(value)

    return operation


_OPS: dict[bytes, Callable[[Machine], Any]] = {
    pickle.FRAME: Machine.frame,
    pickle.NONE: _push(lambda m: None),
    pickle.NEWTRUE: _push(lambda m: True),
    pickle.NEWFALSE: _push(lambda m: False),
    pickle.BININT: _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    pickle.BININT1: _push(lambda m: m.uint(1)),
    pickle.BININT2: _push(lambda m: m.uint(2)),
    pickle.LONG1: _push(lambda m: int.from_bytes(m.take(m.uint(1)), "little", signed=True)),
    pickle.BINFLOAT: _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    pickle.SHORT_BINUNICODE: _push(lambda m: m.text(m.uint(1))),
    pickle.BINUNICODE: _push(lambda m: m.text(m.uint(4))),
    pickle.BINUNICODE8: _push(lambda m: m.text(m.uint(8))),
    pickle.SHORT_BINBYTES: _push(lambda m: m.take(m.uint(1))),
    pickle.BINBYTES: _push(lambda m: m.take(m.uint(4))),
    pickle.BINBYTES8: _push(lambda m: m.take(m.uint(8))),
    pickle.BYTEARRAY8: _push(lambda m: m.take(m.uint(8))),
    pickle.EMPTY_LIST: _push(lambda m: []),
    pickle.EMPTY_TUPLE: _push(lambda m: ()),
    pickle.EMPTY_DICT: _push(lambda m: {}),
    pickle.EMPTY_SET: _push(lambda m: set()),
    pickle.MARK: Machine.mark,
    pickle.POP: lambda m: m.pop() if m.stack else m.pop_marked(),
    pickle.POP_MARK: Machine.pop_marked,
    pickle.TUPLE: _push(lambda m: tuple(m.pop_marked())),
    pickle.TUPLE1: lambda m: m.put_tuple(1),
    pickle.TUPLE2: lambda m: m.put_tuple(2),
    pickle.TUPLE3: lambda m: m.put_tuple(3),
    pickle.APPEND: lambda m: m.put_appended([m.pop()]),
    pickle.APPENDS: lambda m: m.put_appended(m.pop_marked()),
    pickle.SETITEM: lambda m: m.put_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.put_items(m.pop_marked()),
    pickle.ADDITEMS: Machine.add_items,
    pickle.BINPUT: lambda m: m.memoize(m.uint(1)),
    pickle.LONG_BINPUT: lambda m: m.memoize(m.uint(4)),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    pickle.BINGET: lambda m: m.recall(m.uint(1)),
    pickle.LONG_BINGET: lambda m: m.recall(m.uint(4)),
    pickle.GLOBAL: Machine.global_,
    pickle.STACK_GLOBAL: Machine.stack_global,
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.newobj,
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.persistent_id,
}
_OPERATIONS = [_OPS.get(bytes([code])) for code in range(256)]
