"""Storage: folders on this machine or in object storage, through pyarrow's filesystems."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import fsspec
import pyarrow
from pyarrow import fs

from gpt2onnx.errors import OutputError, PromptError

# An upload appears when it is complete; other filesystems need a rename.
_OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Place:
    """A file or folder.

    Attributes:
        name: as messages show it, without keys.
        filesystem: pyarrow's.
        path: inside the filesystem.
    """

    name: str
    filesystem: fs.FileSystem
    path: str

    @classmethod
    def of(cls, name: str) -> "Place":
        """Opens a path or URI: s3://, gs://, abfs://, hdfs://, or any that fsspec has a package for.

        Raises:
            OSError: the URI can't be used.
        """
        if "://" not in name:
            return cls(name, fs.LocalFileSystem(), os.path.abspath(name))  # noqa: PTH100
        try:
            try:
                filesystem, path = fs.FileSystem.from_uri(name)
            except pyarrow.ArrowInvalid:
                handler, path = fsspec.url_to_fs(name)
                filesystem = fs.PyFileSystem(fs.FSSpecHandler(handler))
        except (ValueError, ImportError, NotImplementedError) as error:
            raise OSError(f"no such storage is known here: {public(str(error))}") from error
        return cls(public(name), filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether it lies in this machine's file system."""
        return bool(self.filesystem.type_name == "local")

    def files(self) -> list[fs.FileInfo]:
        """Lists the file itself or the folder's files by path, hidden ones included; empty if nothing is there.

        Raises:
            OSError: it can't be read.
        """
        found = self.filesystem.get_file_info(self.path)
        if found.is_file:
            return [found]
        inside = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted((one for one in inside if one.is_file), key=lambda one: str(one.path))

    def read(self, name: str) -> bytes | None:
        """Reads a file of the folder; None if it isn't there."""
        path = f"{self.path}/{name}"
        if not self.filesystem.get_file_info(path).is_file:
            return None
        with self.filesystem.open_input_stream(path) as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder. It appears complete or not at all, also if this process is killed.

        Raises:
            OSError: it can't be written.
        """
        path = f"{self.path}/{name}"
        if self.filesystem.type_name in _OBJECT_STORES:
            with self.filesystem.open_output_stream(path) as file:
                file.write(content)
            return
        unfinished = f"{self.path}/.{name}.{secrets.token_hex(4)}.new"
        try:
            with self.filesystem.open_output_stream(unfinished) as file:
                file.write(content)
            if self.is_local:  # after a power failure no name stands without its content
                with open(unfinished, "r+b") as file:  # noqa: PTH123  # Windows flushes no file opened for reading
                    os.fsync(file.fileno())
            self.filesystem.move(unfinished, path)
        except BaseException:
            with suppress(OSError):
                self.filesystem.delete_file(unfinished)
            raise


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns an OSError into a PromptError that names the input."""
    try:
        yield
    except OSError as error:
        raise PromptError(f"can't read {public(name)}: {_reason(error)}") from error


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"can't write {public(name)}: {_reason(error)}") from error


def unfinished_file(name: str) -> str | None:
    """Name of the file that a killed `Place.write` has left unfinished under another name; None for other files."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.new", name)
    return None if found is None else found[1]


def public(uri: str) -> str:
    """Removes user, password and query, which may hold keys."""
    return re.sub(r"(\w://)[^/@\s]*@", r"\1", uri).partition("?")[0]


def _reason(error: OSError) -> str:
    """The system's words for an error number; else pyarrow's message."""
    return os.strerror(error.errno) if error.errno else str(error)
