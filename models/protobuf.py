"""Protobuf messages, read field by field without their definitions.

A message is a row of fields: a key (number and kind of the field), then its value.
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator
from mmap import mmap

_LONGEST_NUMBER = 70  # bits
_FIXED = {1: 8, 5: 4}  # bytes of numbers by their kind


def fields(content: bytes | memoryview | mmap, begin: int, end: int) -> Iterator[tuple[int, int | slice]]:
    """The fields of the message between two offsets: number, and the value; of a text or a message its place.

    Raises:
        ValueError: it isn't a whole message.
    """
    while begin < end:
        key, begin = varint(content, begin, end)
        kind = key & 7
        if kind == 2:
            size, begin = varint(content, begin, end)
            if size > end - begin:
                raise ValueError("it ends inside a field")
            yield key >> 3, slice(begin, begin + size)
            begin += size
        elif kind == 0:
            value, begin = varint(content, begin, end)
            yield key >> 3, value
        elif kind in _FIXED:
            if _FIXED[kind] > end - begin:
                raise ValueError("it ends inside a field")
            yield key >> 3, int.from_bytes(content[begin : begin + _FIXED[kind]], "little")
            begin += _FIXED[kind]
        else:
            raise ValueError(f"fields of kind {kind} are unknown")


def numbers(message: bytes) -> dict[int, int]:
    """The fields that hold numbers; the last counts.

    Raises:
        ValueError: it isn't a whole message.
    """
    return {number: value for number, value in fields(message, 0, len(message)) if isinstance(value, int)}


def messages(message: bytes) -> dict[int, list[bytes]]:
    """The fields that hold texts or messages.

    Raises:
        ValueError: it isn't a whole message.
    """
    found: dict[int, list[bytes]] = {}
    for number, place in fields(message, 0, len(message)):
        if isinstance(place, slice):
            found.setdefault(number, []).append(message[place])
    return found


def varint(content: bytes | memoryview | mmap, begin: int, end: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and where the next field begins.

    Raises:
        ValueError: it has no end.
    """
    number = shift = 0
    while begin < end and shift < _LONGEST_NUMBER:
        byte = content[begin]
        number |= (byte & 127) << shift
        begin, shift = begin + 1, shift + 7
        if byte < 128:
            return number, begin
    raise ValueError("it ends inside a number")
