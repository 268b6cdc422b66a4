"""Bounds on zip archives, looked at before Python's zipfile takes them into memory."""

import struct
from pathlib import Path
from typing import BinaryIO

from gpt2onnx.errors import CheckpointError

_ZIP_END, _ZIP_END_SIZE = b"PK\x05\x06", 22
_LONGEST_ZIP_END = _ZIP_END_SIZE + 2**16 + 76  # with its comment, and the larger record before it
_ZIP64_LOCATOR, _ZIP64_LOCATOR_BEFORE = b"PK\x06\x07", 20
_ZIP64_END_BEFORE = _ZIP64_LOCATOR_BEFORE + 56
_MOST_DIRECTORY = 16 * 2**20  # bytes, some 100 for each tensor


def check_directory(path: Path, file: BinaryIO) -> None:
    """Bounds the list of members, which the zipfile module takes into memory many times its size.

    The format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 to 4.3.16.

    Raises:
        CheckpointError: the list is longer than any checkpoint's.
    """
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _LONGEST_ZIP_END))
    tail = file.read()
    file.seek(0)
    # The same place that the zipfile module takes for the end record: the very end, or the last that looks like one.
    plain = tail[-_ZIP_END_SIZE:]
    found = tail.rfind(_ZIP_END) if plain[:4] != _ZIP_END or plain[-2:] != b"\0\0" else len(tail) - _ZIP_END_SIZE
    record = tail[max(found, 0) :]
    size = struct.unpack_from("<I", record, 12)[0] if len(record) >= _ZIP_END_SIZE else 0
    if found >= _ZIP64_END_BEFORE and tail[found - _ZIP64_LOCATOR_BEFORE :][:4] == _ZIP64_LOCATOR:
        size = struct.unpack_from("<Q", tail, found - _ZIP64_END_BEFORE + 40)[0]
    if size > _MOST_DIRECTORY:
        raise CheckpointError(f"{path} is a zip archive with far more members than a checkpoint has tensors")
