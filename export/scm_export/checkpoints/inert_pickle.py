"""Reads a pickle without running code from it: an interpreter of the opcodes that data needs, on top of the standard library's parser.

It is not a subclass of ``pickle.Unpickler``, which calls whatever REDUCE finds on the stack, sets attributes of whatever BUILD finds there, and allocates
gigabytes for a nine-byte file with a high memo index. Here a global is only a name, which the caller's table maps to a stand-in.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import printable

# A snapshot of the largest published network has some 50 000 opcodes. Each can create an object many times larger than its bytes in the file.
MAX_OPCODES = 2_000_000
MAX_COPIED = 2_000_000  # elements of the containers that calls and states copy: a container of a million elements may be an argument of each call
PICKLE_COST = 100  # elements that a byte string counts as, since it may hold a pickle, and 100 characters of text as one
MAX_LINE = 1 << 16
MAX_INTEGER_BITS = 128  # torch's magic number has 80
INLINE = 1 << 12  # bytes; longer byte strings stay in the file until they are used


class ForbiddenPickleError(Exception):
    """The pickle needs more than data. The message names what it needs."""


class MalformedPickleError(Exception):
    """The pickle is damaged, or was not written by a pickler."""


class OversizedPickleError(MalformedPickleError):
    """The pickle has too many opcodes, or its calls copy too much: reading it would take minutes and gigabytes."""


@dataclass(frozen=True)
class Blob:
    """A long byte string of a pickle: in a file, or as the text that protocol 2 writes for it, one character per byte."""

    source: Path | str
    start: int
    size: int

    def read(self, start: int, size: int) -> bytearray:
        """Return a copy of ``size`` bytes starting at ``start``."""
        if start < 0 or size < 0 or start + size > self.size:
            raise MalformedPickleError(f"{size} bytes required at {start} of {self.size}")
        first = self.start + start
        if isinstance(self.source, str):
            return bytearray(self.source[first : first + size].encode("latin-1"))
        data = bytearray(size)
        with open_regular(self.source) as file:
            file.seek(first)
            if file.readinto(data) != size:
                raise MalformedPickleError("the file has changed while it was read")
        return data


@dataclass(frozen=True)
class StandIn:
    """Replacement for a global of a pickle. REDUCE calls ``call`` with its arguments, and NEWOBJ calls ``new`` with its own."""

    call: Callable[..., object] | None = None
    new: Callable[..., object] | None = None


@runtime_checkable
class Buildable(Protocol):
    """A stand-in's object that accepts the state from the pickle."""

    def build(self, state: object) -> None: ...


@dataclass(frozen=True)
class Global:
    """A global on the stack. It has a stand-in."""

    name: str


StandIns = Mapping[str, StandIn]


def read_pickle(path: Path, stand_ins: StandIns) -> object:
    """Read the pickle in a file: containers, plain values and objects from the stand-ins. Long byte strings are returned as :class:`Blob`.

    Raises:
        ForbiddenPickleError: the pickle names a global without a stand-in, or uses an opcode that data does not need.
        MalformedPickleError: the pickle is damaged, or too long.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        return Interpreter(Bounded(file, path.stat().st_size), stand_ins, path).run()


def read_small_pickle(data: BinaryIO, stand_ins: StandIns, persistent: Callable[[object], object] | None = None) -> object:
    """Read a pickle from memory and leave the stream's position at its end. Raises the errors of :func:`read_pickle`.

    Args:
        data: stream to read from.
        stand_ins: replacements for globals, by dotted name.
        persistent: converts a persistent id to an object; None refuses persistent ids.
    """
    return Interpreter(data, stand_ins, None, persistent).run()


class Bounded:
    """A file for pickletools that limits reads to its size. pickletools reads as many bytes as the pickle claims."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.size - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(MAX_LINE)


class Interpreter:
    """The pickle machine: a stack, marks on it, and a memo."""

    def __init__(self, source: Any, stand_ins: StandIns, path: Path | None, persistent: Callable[[object], object] | None = None) -> None:
        self.source, self.stand_ins, self.path, self.persistent = source, stand_ins, path, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks below the marks, innermost last
        self.memo: dict[int, object] = {}
        self.copied = 0

    def run(self) -> object:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.source)):
                if count > MAX_OPCODES:
                    raise OversizedPickleError(f"it has more than {MAX_OPCODES} opcodes")
                if opcode.name in PUSHED:
                    self.stack.append(PUSHED[opcode.name](argument))
                elif opcode.name in HANDLERS:
                    HANDLERS[opcode.name](self, argument)
                elif opcode.name not in IGNORED:
                    raise ForbiddenPickleError(_forbidden(opcode.name, argument))
            return self.stack.pop()
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as error:  # from pickletools, and from unexpected operands
            raise MalformedPickleError(str(error) or type(error).__name__) from error

    # Containers.

    def mark(self, _: object) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self, _: object = None) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def append(self, _: object) -> None:
        item = self.stack.pop()
        _of(self.stack[-1], list).append(item)

    def appends(self, _: object) -> None:
        items = self.pop_mark()
        _of(self.stack[-1], list).extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def set_items(self, _: object) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def add_items(self, _: object) -> None:
        items = self.pop_mark()
        _of(self.stack[-1], set).update(map(self.key, items))

    def collect(self, make: Callable[[list[Any]], object]) -> None:
        items = self.pop_mark()
        self.stack.append(make(items))

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _set_items(self, target: object, items: list[Any]) -> object:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _of(target, dict)[self.key(key)] = value
        return target

    def key(self, value: Any) -> Hashable:
        """Check that a key is a plain value: hashing a deeply nested tuple overflows the C stack."""
        if value is None or isinstance(value, str | float | int):
            return value
        raise MalformedPickleError(f"a key must be text or a number, got {type(value).__name__}")

    # Long byte strings stay in the file. pickletools has just read past this one.

    def byte_string(self, data: bytes) -> None:
        if self.path is None or len(data) <= INLINE:
            self.stack.append(bytes(data))
        else:
            self.stack.append(Blob(self.path, self.source.tell() - len(data), len(data)))

    # Opcodes with which an unpickler imports, calls and sets attributes.

    def import_name(self, argument: str) -> None:
        self._push_global(*argument.split(" ", 1))

    def import_from_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_global(_of(module, str), _of(name, str))

    def _push_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.stand_ins:
            raise ForbiddenPickleError(printable(full))
        self.stack.append(Global(full))

    def reduce(self, _: object) -> None:
        arguments, function = _of(self.stack.pop(), tuple), self.stack.pop()
        call = self.stand_ins[function.name].call if isinstance(function, Global) else None
        if call is None:
            raise ForbiddenPickleError(f"a call of {_what(function)}")
        self._count(arguments)
        self.stack.append(call(*arguments))

    def new_object(self, _: object) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        new = self.stand_ins[cls.name].new if isinstance(cls, Global) else None
        if new is None:
            raise ForbiddenPickleError(f"an object of {_what(cls)}")
        self._count(arguments)
        self.stack.append(new(*_of(arguments, tuple)))

    def build(self, _: object) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self._count(state)
        if isinstance(target, Buildable):
            target.build(state)
        elif not (isinstance(target, dict) and (state is None or isinstance(state, dict))):  # attributes of a dict are discarded
            raise ForbiddenPickleError(f"the state of {_what(target)}")

    def _count(self, value: object, depth: int = 4) -> None:
        """Count the elements that a call copies: those of its arguments, and of the containers in them."""
        if isinstance(value, str | bytes | Blob):
            self.copied += len(value) // 100 if isinstance(value, str) else PICKLE_COST
        elif isinstance(value, dict | list | tuple | set | frozenset):
            self.copied += len(value)
        if self.copied > MAX_COPIED:
            raise OversizedPickleError(f"its calls copy more than {MAX_COPIED} elements")
        if depth and isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._count(item, depth - 1)

    def persistent_id(self, _: object) -> None:
        if self.persistent is None:
            raise ForbiddenPickleError("a persistent id")
        self.stack.append(self.persistent(self.stack.pop()))


def _as_is(argument: Any) -> object:
    return argument


def _integer(argument: int) -> int:
    """Check that an integer is short enough to be printed and converted to a float."""
    if argument.bit_length() > MAX_INTEGER_BITS:
        raise MalformedPickleError(f"an integer must have at most {MAX_INTEGER_BITS} bits, got {argument.bit_length()}")
    return argument


PUSHED: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _integer),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), _as_is),
    **dict.fromkeys(("SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _as_is),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
}

IGNORED = {"PROTO", "FRAME", "STOP"}

HANDLERS: dict[str, Callable[[Interpreter, Any], object]] = {
    "MARK": Interpreter.mark,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": Interpreter.pop_mark,
    "LIST": lambda machine, _: machine.collect(list),
    "TUPLE": lambda machine, _: machine.collect(tuple),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "DICT": lambda machine, _: machine.collect(lambda items: machine._set_items({}, items)),
    "APPEND": Interpreter.append,
    "APPENDS": Interpreter.appends,
    "SETITEM": Interpreter.set_item,
    "SETITEMS": Interpreter.set_items,
    "ADDITEMS": Interpreter.add_items,
    "FROZENSET": lambda machine, _: machine.collect(lambda items: frozenset(map(machine.key, items))),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), Interpreter.byte_string),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine.memo.update({index: machine.stack[-1]})),
    "MEMOIZE": lambda machine, _: machine.memo.update({len(machine.memo): machine.stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "GLOBAL": Interpreter.import_name,
    "STACK_GLOBAL": Interpreter.import_from_stack,
    "REDUCE": Interpreter.reduce,
    "NEWOBJ": Interpreter.new_object,
    "BUILD": Interpreter.build,
    "BINPERSID": Interpreter.persistent_id,
}


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise MalformedPickleError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


def _forbidden(opcode: str, argument: object) -> str:
    """Describe an unsupported opcode, with the name of its global if it has one."""
    if opcode == "INST" and isinstance(argument, str):
        return printable(argument.replace(" ", ".", 1))
    if opcode.startswith("EXT"):
        return f"the extension {argument}"
    return "a persistent id" if opcode == "PERSID" else f"the opcode {opcode}"


def _what(value: object) -> str:
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"
