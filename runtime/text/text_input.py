"""Text from outside: bytes of files and pipes to str, whatever their encoding and line ends. Knows no model.

A byte order mark says the encoding, and goes before the one that the caller names. Line ends become "\\n".
"""

import codecs
import io
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO

from gpt2onnx.errors import PromptError

from ...models import limits

UTF_8 = "utf-8"
# UTF-32's mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LONGEST_MARK = 4


def read(file: Path | IO[bytes], source: str, encoding: str = UTF_8) -> str:
    """The text of a file.

    Args:
        file: path or open file.
        source: name of the file, for errors.
        encoding: of content without a byte order mark.

    Raises:
        PromptError: it can't be read, is larger than `limits.TEXT`, or is of another encoding.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            content = opened.read(limits.TEXT + 1)
    except OSError as error:
        raise PromptError(f"can't read {source}: {error.strerror}") from error
    if len(content) > limits.TEXT:
        raise PromptError(f"{source} has more than {limits.TEXT:,} bytes, too many for a text: is it another file?")
    return decode(content, source, encoding)


def decode(content: bytes, source: str, encoding: str = UTF_8) -> str:
    """The text of bytes.

    Args:
        content: of a whole file.
        source: name of the file, for errors.
        encoding: of content without a byte order mark.

    Raises:
        PromptError: the bytes are of another encoding.
    """
    codec = _codec(content, encoding)
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _undecodable(source, line, content[error.start], codec) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(stream: IO[bytes], source: str, encoding: str = UTF_8) -> Iterator[str | PromptError]:
    """The lines of a stream, each as soon as it is there; empty ones are left out.

    Args:
        stream: read as far as lines are asked for.
        source: name of the file, for errors.
        encoding: of a stream without a byte order mark.

    Yields:
        A line; or the error that says why it can't be read: it is of another encoding, or so long that nothing behind it
        is read, either.
    """
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
    codec = _codec(buffered.peek(_LONGEST_MARK), encoding)
    text = io.TextIOWrapper(buffered, codec, errors="surrogateescape")
    number = 0
    try:
        while line := text.readline(limits.LINE):
            number += 1
            if len(line) == limits.LINE:
                yield PromptError(f"{source}, line {number}: longer than {limits.LINE:,} letters; the rest is not read")
                return
            # Files that were joined bring their marks along.
            if line := line.lstrip("\ufeff").strip():
                byte = None if line.isascii() else undecoded(line)
                yield line if byte is None else _undecodable(source, number, byte, codec)
    except UnicodeDecodeError as error:  # UTF-16 and UTF-32: bytes that can't be told apart line by line
        yield _undecodable(source, number + 1, error.object[error.start], codec)
    finally:
        with suppress(ValueError):  # the stream is closed already
            text.detach()


def undecoded(text: str) -> int | None:
    """The first byte that stands undecoded in a text, as Python's surrogateescape leaves it; None if there is none."""
    return next((ord(letter) & 0xFF for letter in text if "\udc80" <= letter <= "\udcff"), None)


def _codec(start: bytes, encoding: str) -> str:
    return next((codec for mark, codec in _MARKS if start.startswith(mark)), encoding)


def _undecodable(source: str, line: int, byte: int, codec: str) -> PromptError:
    return PromptError(
        f"{source}, line {line}: byte {byte:#04x} is not {codec.upper().removesuffix('-SIG')};"
        " give it in UTF-8, or name its encoding, where the command takes one, such as --encoding latin-1"
    )
