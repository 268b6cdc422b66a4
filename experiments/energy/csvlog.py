"""A CSV file that several processes append rows to at the same time. Knows nothing of what is in the rows."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt2onnx.errors import OutputError

from ...runtime.host.locks import lock, unlock


class CsvLog:
    """A CSV file with a header and rows.

    The file itself is locked while a row is written, so there is no lock file; and a row is one write.

    Args:
        path: the file; one that isn't there, or is empty, gets its header now.

    Raises:
        OutputError: the file can't be written, or has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        with self._locked() as file:
            self._check_header(file)

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row; None becomes an empty field, and a list JSON.

        Raises:
            OutputError: the file can't be written, or has other columns by now.
        """
        line = to_csv([[row[name] for name in self.columns]]).encode()
        with self._locked() as file:
            self._check_header(file)
            end = file.seek(0, os.SEEK_END)
            file.seek(end - 1)
            try:
                # An editor may have left out the newline that ends the last row.
                _write(file, line if file.read(1) == b"\n" else b"\n" + line)
            except OSError:
                file.truncate(end)
                raise

    def _check_header(self, file: IO[bytes]) -> None:
        header = to_csv([self.columns]).encode()
        file.seek(0)
        first = file.readline(2 * len(header))  # never all of a file that has no lines
        if not first:
            try:
                _write(file, header)
            except OSError:
                file.truncate(0)
                raise
        elif first.replace(b"\r", b"") != header:
            raise OutputError(
                f"{self.path} has other columns (another program or version made it): choose another file"
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        try:
            # Unbuffered: what is written goes out in one piece.
            with self.path.open("a+b", buffering=0) as file:
                lock(file)
                try:
                    yield file
                finally:
                    unlock(file)
        except OSError as error:
            raise OutputError(f"can't write {self.path}: {error.strerror or error}") from error


def to_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV text; None becomes an empty field, and a list JSON."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_field(value) for value in row] for row in rows])
    return text.getvalue()


def _field(value: Any) -> Any:
    return json.dumps(list(value), ensure_ascii=False) if isinstance(value, list | tuple) else value


def _write(file: IO[bytes], data: bytes) -> None:
    if file.write(data) != len(data):
        raise OSError(None, "the disk is full")
