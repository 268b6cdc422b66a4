"""A machine for pickles that has no instruction for running code.

A pickle is a program for a small stack machine, which in Python's own module may import and call anything. This one
builds plain values; what a name stands for, and what becomes of a reference to something outside, two functions
decide, which are given to it. Instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

# An instruction, an item that is copied, or some bytes of text are a step each: together they are bounded, and so are time and memory,
# to seconds and some hundred megabytes. The state of a large model and its optimizer takes a tenth of them.
MOST_STEPS = 1_000_000
_BYTES_PER_STEP = 64
MOST_BYTES = MOST_STEPS * _BYTES_PER_STEP
_LONGEST_LINE = 2**16
# Only such keys: hashing tuples in tuples, or comparing numbers made to collide, could take forever.
_LARGEST_KEY = 2**60

_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
# Values of a given length: the length's format, and how they are decoded; None for bytes.
_SIZED: dict[bytes, tuple[str, str | None]] = {
    b"X": ("<I", "utf-8"), b"\x8c": ("<B", "utf-8"), b"\x8d": ("<Q", "utf-8"),
    b"U": ("<B", "ascii"), b"T": ("<i", "ascii"),
    b"C": ("<B", None), b"B": ("<I", None), b"\x8e": ("<Q", None),
}  # fmt: skip
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_MARK = object()


class Readable(Protocol):
    """A file to read a pickle from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


class PickleError(ValueError):
    """The pickle is damaged, or does what no pickle of plain values does."""


class UnsupportedPickleError(PickleError):
    """The pickle holds what isn't read here, or too much; it need not be damaged."""


@dataclass(eq=False)
class Record:
    """An object of a class that isn't there: its name and its attributes, and nothing that could be called.

    Attributes:
        name: of the class.
        fields: the object's attributes.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordType:
    """Stands for a class whose objects become records."""

    name: str


@dataclass(frozen=True)
class Call:
    """Stands for a function: what is called in its place."""

    function: Callable[..., Any]


def load(file: Readable, find: Callable[[str, str], object], refer: Callable[[Any], Any]) -> Any:
    """Reads one pickle.

    Args:
        file: is left behind the pickle.
        find: what stands for a global name, given module and name: a `Call`, a `RecordType`, or a plain value;
            raises where nothing may.
        refer: the value of a persistent id.

    Raises:
        PickleError: the pickle is damaged, or asks for something that plain values don't need.
    """
    return _Machine(file, find, refer).run()


class _Machine:
    def __init__(self, file: Readable, find: Callable[[str, str], object], refer: Callable[[Any], Any]) -> None:
        self.file, self.find, self.refer = file, find, refer
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = MOST_STEPS

    def run(self) -> Any:
        while (code := self.read(1)) != b".":
            self.spend(1)
            self.step(code)
        return self.pop()

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise UnsupportedPickleError(f"it takes more than {MOST_STEPS} steps")

    def step(self, code: bytes) -> None:
        if code in _NUMBERS:
            self.stack.append(self.number(_NUMBERS[code]))
        elif code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _SIZED:
            size_format, encoding = _SIZED[code]
            content = self.read(self.number(size_format))
            self.stack.append(content if encoding is None else content.decode(encoding, "surrogatepass"))
        elif code in _TUPLES:
            self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[code])])))
        else:
            self.rare_step(code)

    def rare_step(self, code: bytes) -> None:
        match code:
            case b"\x80":  # the protocol's version
                self.read(1)
            case b"\x95":  # a frame's length
                self.read(8)
            case b"(":
                self.stack.append(_MARK)
            case b"0":
                self.stack.pop()
            case b"1":
                self.marked()
            case b"2":
                self.stack.append(self.top())
            case b"q" | b"r" | b"p" | b"\x94":
                self.memo[self.place(code)] = self.top()
            case b"h" | b"j" | b"g":
                self.stack.append(self.memo[self.place(code)])
            case b"I":
                text = self.line()
                self.stack.append({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text))
            case b"L":
                self.stack.append(int(self.line().rstrip("L")))
            case b"\x8a" | b"\x8b":
                self.stack.append(
                    int.from_bytes(self.read(self.number("<B" if code == b"\x8a" else "<i")), "little", signed=True)
                )
            case b"F":
                self.stack.append(float(self.line()))
            case b"V":
                self.stack.append(self.line("raw-unicode-escape"))
            case b"S":
                self.stack.append(self.line().strip("'\""))
            case b"]" | b"}" | b"\x8f":
                self.stack.append({b"]": list, b"}": dict, b"\x8f": set}[code]())
            case b"l" | b"t" | b"d" | b"\x91":
                self.gather(code)
            case b"a" | b"s":
                self.extend([self.pop()] if code == b"a" else [self.pop(), self.pop()][::-1])
            case b"e" | b"u" | b"\x90":
                self.extend(self.marked())
            case b"c":
                self.stack.append(self.find(self.line("utf-8"), self.line("utf-8")))
            case b"\x93":
                name, module = self.pop(), self.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise PickleError("it names something by what is no text")
                self.stack.append(self.find(module, name))
            case b"Q":
                self.stack.append(self.refer(self.pop()))
            case b"R" | b"\x81":
                arguments, called = self.pop(), self.pop()
                if not isinstance(arguments, tuple):
                    raise PickleError("it calls something without a list of arguments")
                self.spend(sum(len(each) for each in arguments if isinstance(each, list | tuple)))
                self.stack.append(_called(called, arguments, new=code == b"\x81"))
            case b"b":
                state = self.pop()
                self.spend(len(state) if isinstance(state, dict) else 0)
                _set_state(self.top(), state)
            case _:
                raise PickleError(f"it has the instruction {code!r}, which plain values don't need")

    def gather(self, code: bytes) -> None:
        items = self.marked()
        if code in (b"d", b"\x91"):
            self.stack.append({} if code == b"d" else set())
            self.extend(items)
        else:
            self.stack.append(items if code == b"l" else tuple(items))

    def extend(self, items: list[Any]) -> None:
        """Puts items into the list, set or mapping on top of the stack; for the last, keys and values in turn."""
        match self.top():
            case list() as target:
                target.extend(items)
            case set() as target:
                target.update(map(_key, items))
            case dict() as target if len(items) % 2 == 0:
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case _:
                raise PickleError("it puts items into what holds none")

    def marked(self) -> list[Any]:
        """Takes off the stack what lies above the last mark, and the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise PickleError("it refers to a mark that isn't there")

    def place(self, code: bytes) -> int:
        """Where in the memo an instruction writes or reads."""
        if code == b"\x94":
            return len(self.memo)
        return int(self.line()) if code in (b"p", b"g") else int(self.number("<B" if code in (b"q", b"h") else "<I"))

    def pop(self) -> Any:
        value = self.top()
        del self.stack[-1]
        return value

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("its stack is empty")
        return self.stack[-1]

    def number(self, number_format: str) -> Any:
        return struct.unpack(number_format, self.read(struct.calcsize(number_format)))[0]

    def line(self, encoding: str = "ascii") -> str:
        line = self.file.readline(_LONGEST_LINE)
        self.spend(len(line) // _BYTES_PER_STEP)
        if not line.endswith(b"\n"):
            raise PickleError("it ends inside a line")
        return line[:-1].decode(encoding)

    def read(self, size: int) -> bytes:
        self.spend(size // _BYTES_PER_STEP)
        content = self.file.read(size) if size >= 0 else b""
        if len(content) != size:
            raise PickleError("it ends too early")
        return content


def _key(key: Any) -> Any:
    if isinstance(key, str | bytes | None) or (isinstance(key, int) and abs(key) < _LARGEST_KEY):
        return key
    kind = "large number" if isinstance(key, int) else type(key).__name__
    raise UnsupportedPickleError(f"a key of one of its mappings is a {kind}")


def _called(called: Any, arguments: tuple[Any, ...], *, new: bool) -> Any:
    match called:
        case Call():
            return called.function(*arguments)
        case RecordType() if new and not arguments:
            return Record(called.name)
    raise PickleError("it calls what is no function")


def _set_state(target: Any, state: Any) -> None:
    """An object's attributes: those of a record are kept, those of mappings, which are few and odd, are not."""
    match target, state:
        case Record(), dict():
            target.fields.update({name: value for name, value in state.items() if isinstance(name, str)})
        case dict(), _:
            pass
        case _:
            raise PickleError("it changes what has no attributes")


def mapping(pairs: list[Any] | tuple[Any, ...] = ()) -> dict[Any, Any]:
    """A mapping of pairs, which takes the place of any kind of dictionary."""
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise PickleError("a mapping is made of what are no pairs")
    return {_key(key): value for key, value in pairs}


def plain_set(items: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
    """A set of items that are quick to compare."""
    return {_key(item) for item in items}
