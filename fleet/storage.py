"""Folders and files, here or in object storage, through pyarrow's filesystems."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import fsspec
import pyarrow
from pyarrow import fs

from gpt2onnx.errors import OutputError

# A file of theirs is seen once its last byte has arrived, never before.
_OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Place:
    """A file or folder somewhere.

    Attributes:
        name: as messages show it, without a password.
        filesystem: that it lies in.
        path: inside the filesystem.
    """

    name: str
    filesystem: fs.FileSystem
    path: str

    @classmethod
    def of(cls, name: str) -> "Place":
        """The place of a path or URI: s3://, gs://, abfs://, hdfs://, or one that fsspec has a package for.

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
        """The file itself, or those that lie in the folder, by path; none where there is nothing. Hidden ones don't count.

        Raises:
            OSError: it can't be read.
        """
        found = self.filesystem.get_file_info(self.path)
        if found.type == fs.FileType.NotFound:
            return []
        if found.is_file:
            return [found]
        inside = self.filesystem.get_file_info(fs.FileSelector(self.path))
        plain = (one for one in inside if one.is_file and not one.base_name.startswith((".", "_")))
        return sorted(plain, key=lambda one: str(one.path))

    def read(self, name: str) -> bytes | None:
        """The content of a file in the folder; None where there is none."""
        path = f"{self.path}/{name}"
        if not self.filesystem.get_file_info(path).is_file:
            return None
        with self.filesystem.open_input_stream(path) as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the folder; it is there complete or not at all, also when this process is killed.

        Raises:
            OSError: it can't be written.
        """
        path = f"{self.path}/{name}"
        if self.filesystem.type_name in _OBJECT_STORES:
            with self.filesystem.open_output_stream(path) as file:
                file.write(content)
            return
        passing = f"{self.path}/.{name}.{secrets.token_hex(4)}.new"
        try:
            with self.filesystem.open_output_stream(passing) as file:
                file.write(content)
            if self.is_local:
                _flush(passing)
            self.filesystem.move(passing, path)
        except BaseException:
            with suppress(OSError):
                self.filesystem.delete_file(passing)
            raise

    def remove(self, path: str) -> None:
        """Removes a file, by its path in the filesystem."""
        self.filesystem.delete_file(path)

    def clear_up(self) -> None:
        """Removes from the folder what killed writers left."""
        for one in self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True)):
            if one.is_file and one.base_name.startswith(".") and one.base_name.endswith(".new"):
                self.remove(one.path)


@contextmanager
def writing(place: Place) -> Iterator[None]:
    """Turns what goes wrong with a place into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"can't write {place.name}: {reason(error)}") from error


def public(uri: str) -> str:
    """A URI without the keys that some carry."""
    return re.sub(r"(\w://)[^/@\s]*@", r"\1", uri).partition("?")[0]


def reason(error: BaseException) -> str:
    """Why a file operation failed, in words; pyarrow repeats the path, and more than that."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


def _flush(path: str) -> None:
    """Has the system write a file to the disk, so that a power failure can't leave its name without its content."""
    with open(path, "r+b") as file:  # noqa: PTH123
        os.fsync(file.fileno())  # which Windows refuses for a file that is open for reading only
