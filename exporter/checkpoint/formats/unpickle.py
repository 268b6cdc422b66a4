"""Reads pickles without running code.

A pickle is a program for a small stack machine. Python's own may import and call anything. This one only builds plain
values: two functions that its caller gives decide what a global name, and a reference to data outside the pickle, stand
for. pickletools decodes the instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

from ....models import limits

# An instruction, a copied item and these bytes of text are a step each, so that time and memory are bounded to seconds and
# some hundred megabytes. A large model with its optimizer takes a tenth of the steps.
_BYTES_PER_STEP = 64
# Hashing nested tuples, or comparing numbers made to collide, could take forever.
_LARGEST_KEY = 2**60

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class PickleError(ValueError):
    """The pickle is damaged, or does something that no pickle of plain values does."""


class UnsupportedPickleError(PickleError):
    """The pickle holds something that isn't read here, or too much; it need not be damaged."""


@dataclass(eq=False)
class Record:
    """An object of a class that isn't there: its name and its attributes. Each is equal to itself alone, so that it may be a key.

    Attributes:
        name: of the class.
        fields: the object's attributes; `state` if it keeps something else.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """Stands for a function: `function` is called in its place."""

    function: Callable[..., Any]


def record(name: str) -> Call:
    """Stands for a class or a function: what it makes becomes a record, whatever it is made of."""
    return Call(lambda *_: Record(name))


def load(file: IO[bytes], find: Callable[[str, str], object], refer: Callable[[Any], Any]) -> Any:
    """Reads one pickle.

    Args:
        file: its position ends right behind the pickle. It bounds the bytes that are read at once.
        find: returns the value of a global name, given module and name: a `Call` or a plain value.
            Raises if the name isn't allowed.
        refer: returns the value of a persistent id.

    Raises:
        ValueError: the pickle is damaged, or asks for something that plain values don't need (PickleError).
    """
    machine = _Machine(find, refer)
    for opcode, argument, _ in pickletools.genops(file):
        machine.step(opcode.name, argument)
    return machine.pop()


class _Machine:
    def __init__(self, find: Callable[[str, str], object], refer: Callable[[Any], Any]) -> None:
        self.find, self.refer = find, refer
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps_left = limits.PICKLE_STEPS

    def spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise UnsupportedPickleError(f"it takes more than {limits.PICKLE_STEPS:,} steps")

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        self.spend(1 + (len(argument) // _BYTES_PER_STEP if isinstance(argument, str | bytes) else 0))
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
            ):  # fmt: skip
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                self.stack.append(_CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self.stack.append(_EMPTY[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
            case "MARK":
                self.stack.append(_MARK)
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.marked()
            case "DUP":
                self.stack.append(self.top())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "LIST":
                self.stack.append(self.marked())
            case "TUPLE":
                self.stack.append(tuple(self.marked()))
            case "DICT":
                items = self.marked()
                self.stack.append({})
                self.set_items(items)
            case "FROZENSET":
                items = self.marked()
                self.stack.append(set())
                self.extend(items)
            case "APPEND":
                self.extend([self.pop()])
            case "SETITEM":
                self.set_items([self.pop(), self.pop()][::-1])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.marked())
            case "SETITEMS":
                self.set_items(self.marked())
            case "GLOBAL":
                self.stack.append(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                named, module = self.pop(), self.pop()
                if not isinstance(named, str) or not isinstance(module, str):
                    raise PickleError("a global name in it is not a text")
                self.stack.append(self.find(module, named))
            case "BINPERSID":
                self.stack.append(self.refer(self.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, called = self.pop(), self.pop()
                if not isinstance(arguments, tuple):
                    raise PickleError("it calls a function without a tuple of arguments")
                if not isinstance(called, Call):
                    raise PickleError("it calls a value that is no function")
                self.spend(sum(len(each) for each in arguments if isinstance(each, list | tuple | dict)))
                self.stack.append(called.function(*arguments))
            case "BUILD":
                state = self.pop()
                self.spend(len(state) if isinstance(state, dict) else 0)
                _set_state(self.top(), state)
            case _:
                raise PickleError(f"it has the instruction {name}, which plain values don't need")

    def extend(self, items: list[Any]) -> None:
        """Puts items into the list or set on top of the stack. Those of a record, such as a script's own list, are dropped."""
        match self.top():
            case list() as target:
                target.extend(items)
            case set() as target:
                target.update(map(_key, items))
            case Record():
                pass
            case _:
                raise PickleError("it puts items into a value that holds none")

    def set_items(self, items: list[Any]) -> None:
        """Puts keys and values, which alternate, into the mapping on top of the stack, or the record, such as a script's own mapping."""
        pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
        match self.top():
            case dict() as target:
                target.update(pairs)
            case Record() as target:
                target.fields.update((key, value) for key, value in pairs if isinstance(key, str))
            case _:
                raise PickleError("it puts keys into a value that has none")

    def marked(self) -> list[Any]:
        """Takes the last mark, and all items above it, off the stack."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise PickleError("it refers to a mark that isn't there")

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("its stack is empty")
        return self.stack[-1]


def _key(key: Any) -> Any:
    if isinstance(key, str | bytes | Record | None) or (isinstance(key, int) and abs(key) < _LARGEST_KEY):
        return key
    kind = "large number" if isinstance(key, int) else type(key).__name__
    raise UnsupportedPickleError(f"a key of one of its mappings is a {kind}")


def _set_state(target: Any, state: Any) -> None:
    """Sets an object's attributes. Those of mappings, few and odd, are dropped."""
    match target, state:
        case Record(), dict():
            target.fields.update({name: value for name, value in state.items() if isinstance(name, str)})
        case Record(), tuple():
            target.fields["state"] = state
        case dict(), _:
            pass
        case Record(), Record() if target is state:  # a mapping whose keys are its attributes
            pass
        case _:
            raise PickleError("it changes a value that has no attributes")


def container(kind: Callable[..., Any]) -> Call:
    """Stands for a function that makes an empty container, or one of the items of another."""

    def make(*items: Any) -> Any:
        if not items:
            return kind()
        if len(items) == 1 and isinstance(items[0], list | tuple | dict):
            return kind(items[0])
        raise PickleError("it makes a container of something that is no list")

    return Call(make)


def mapping(pairs: list[Any] | tuple[Any, ...] | dict[Any, Any] = ()) -> dict[Any, Any]:
    """A mapping of pairs, or a copy of another, in place of any kind of dictionary."""
    if isinstance(pairs, dict):
        return dict(pairs)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise PickleError("a mapping is made of items that are no pairs")
    return {_key(key): value for key, value in pairs}


def plain_set(items: Iterable[Any] = ()) -> set[Any]:
    """A set of items that are quick to compare."""
    return {_key(item) for item in items}
