"""Text from outside, against Python's own text files."""

import codecs
import io
import os
from pathlib import Path

import pytest

from gpt2onnx.errors import PromptError
from gpt2onnx.runtime.text.text_input import decode, lines

TEXT = "Zoë: „日本“ 😀\n\n  \nsecond\u2028still second\nlast"
# A codec, the byte order mark to put before what it writes, and the codec that reads both.
MARKED = {
    "utf-8": (b"", "utf-8"), "utf-8-sig": (b"", "utf-8-sig"), "utf-16": (b"", "utf-16"), "utf-32": (b"", "utf-32"),
    "utf-16-be": (codecs.BOM_UTF16_BE, "utf-16"), "utf-32-be": (codecs.BOM_UTF32_BE, "utf-32"),
}  # fmt: skip


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("codec", MARKED)
@pytest.mark.parametrize("named", ["utf-8", "latin-1", "utf-16-le"])
def test_marks_and_line_ends(codec: str, newline: str, named: str, tmp_path: Path) -> None:
    """A byte order mark goes before the encoding that was named."""
    mark, reader = MARKED[codec]
    path = tmp_path / "text"
    path.write_bytes(mark + TEXT.replace("\n", newline).encode(codec))
    expected = path.read_text(reader)
    assert expected == TEXT
    if codec != "utf-8" or named == "utf-8":  # without a mark it is what was named
        assert decode(path.read_bytes(), "text", named) == expected
        with path.open("rb") as file:
            assert list(lines(file, "text", named)) == [line.strip() for line in expected.split("\n") if line.strip()]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-32-be", "shift_jis", "mac-roman"])
def test_encodings_by_name(encoding: str) -> None:
    text = "日本\nabc" if encoding == "shift_jis" else "Zoë\nabc"
    assert decode(text.encode(encoding), "text", encoding) == text
    assert list(lines(io.BytesIO(text.encode(encoding)), "text", encoding)) == text.split("\n")


def test_what_cannot_be_decoded_is_told_with_its_line() -> None:
    content = b"first\n\ncaf\xe9\nZo\xc3\xab\n"
    with pytest.raises(
        PromptError, match=r"^letter\.txt, line 3: byte 0xe9 is not UTF-8; .*--encoding latin-1$"
    ) as alone:
        decode(content, "letter.txt")
    first, bad, last = lines(io.BytesIO(content), "letter.txt")
    assert (first, str(bad), last) == ("first", str(alone.value), "Zoë"), "a line stops no other"
    with pytest.raises(PromptError, match="line 2: byte 0xff is not ASCII"):
        decode(b"a\n\xff", "f", "ascii")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_files_that_end_in_the_middle_of_a_letter(cut: int) -> None:
    content = "ab\n😀".encode("utf-16")[:-cut]
    first, last = lines(io.BytesIO(content), "f")
    assert first == "ab"
    assert "line 2" in str(last)
    with pytest.raises(PromptError, match="is not UTF-16"):
        decode(content, "f")


def test_joined_files_bring_their_marks_along() -> None:
    content = '{"id": 1}\r\n'.encode("utf-8-sig") + '{"id": 2}\r\n'.encode("utf-8-sig")
    assert list(lines(io.BytesIO(content), "f")) == ['{"id": 1}', '{"id": 2}']


def test_a_line_comes_as_soon_as_it_is_there() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file, os.fdopen(write, "wb", buffering=0) as writer:
        coming = lines(file, "pipe")
        for line in ("{}", "second", "third"):
            writer.write(f"{line}\n".encode())
            assert next(coming) == line
