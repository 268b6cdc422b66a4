"""The archive of a bundle: one .tar.gz, the same bytes whenever the same bundle is packed.

The manifest comes first, so that the name and size of all that follows are known before it is read.
Needs the standard library alone, so that a machine without any extra packs and unpacks.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from gpt2onnx.errors import BundleError, OutputError

from ...models.bundle import MANIFEST, Bundle, FileRecord, Manifest, check_place, sha256_of
from .atomic import replacing, replacing_file

Progress = Callable[[int, int], None]

_LEVEL = 6
_CHUNK = 1 << 20
# A manifest has some kilobytes. It is read before anything bounds it.
_LARGEST_MANIFEST = 1 << 20


@dataclass(frozen=True)
class Archive:
    """What `pack` made.

    Attributes:
        path: of the archive.
        size: of the archive, in bytes.
        sha256: of the archive, in hexadecimal.
        content: the files in it, by their path inside the bundle.
    """

    path: Path
    size: int
    sha256: str
    content: dict[str, FileRecord]


def pack(
    folder: str | os.PathLike[str],
    archive: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Archive:
    """Packs a bundle into one file.

    The archive holds nothing that depends on time, place or user. (Another implementation of zlib may
    compress the same content to other bytes.)

    Args:
        folder: the bundle; every file is compared with the manifest before and while it is packed.
        archive: the file to make; it appears whole or not at all.
        force: replace an existing file.
        progress: called with the bytes packed so far and in all.

    Raises:
        BundleError: the bundle is missing, or not what its manifest says.
        OutputError: the archive exists, lies in the bundle, or can't be written.
    """
    folder, target = Path(folder), Path(archive)

    def check() -> None:
        if target.is_dir():
            raise OutputError(f"{target} is a folder: name a file such as {target / 'bundle.tar.gz'}")
        if not force and os.path.lexists(target):
            raise OutputError(f"{target} exists: choose another name, or replace it with --force")

    check()
    bundle = Bundle.open(folder)
    if target.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{target} would lie in the bundle: choose a place outside it")
    bundle.verify()
    manifest = folder / MANIFEST
    content = {MANIFEST: FileRecord(manifest.stat().st_size, sha256_of(manifest))}
    content |= dict(sorted(bundle.manifest.files.items()))
    with replacing_file(target, check) as file:
        # Neither a name nor a time in gzip's header.
        with (
            gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as compressed,
            tarfile.open(mode="w", fileobj=compressed, format=tarfile.GNU_FORMAT) as tar,
        ):
            done, total = 0, sum(record.size for record in content.values())
            for name, record in content.items():
                _add(tar, folder, name, record)
                done += record.size
                if progress is not None:
                    progress(done, total)
        file.flush()
        size, digest = file.tell(), sha256_of(Path(file.name))
    return Archive(target, size, digest, content)


def unpack(
    archive: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Unpacks an archive that `pack` made.

    Nothing but regular files that its manifest lists is taken from it, each with the size and hash listed there.

    Args:
        archive: the file to read.
        target: the bundle's folder; it appears whole or not at all.
        force: replace an existing bundle.
        progress: called with the bytes unpacked so far and in all.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the archive is missing, damaged, or not a bundle's.
        OutputError: the target exists or can't be written.
    """
    archive, target = Path(archive), Path(target)

    check_place(target, force=force)
    try:
        file = archive.open("rb")
    except OSError as error:
        raise BundleError(f"can't read {archive}: {error.strerror}") from error
    with file, replacing(target, lambda: check_place(target, force=force)) as folder:
        try:
            _Content(file).extract(folder, progress)
            made = Bundle.open(folder)  # here, since another may take its place at once
        except BundleError as error:
            # The folder has a passing name, and is gone when this is read.
            reason = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}", "it")
            raise BundleError(f"{archive}: {reason}") from error
    return replace(made, folder=target)


class _Content:
    """What an archive holds, read in order and trusted in nothing.

    tarfile itself would follow long names and extended headers of any size; `pack` writes none.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = gzip.GzipFile(fileobj=file)

    def extract(self, folder: Path, progress: Progress | None) -> None:
        """Writes all files, the manifest first, to an empty folder."""
        first = self._header()
        if first is None or first.name != MANIFEST or first.size > _LARGEST_MANIFEST:
            raise BundleError("not an archive made by 'gpt2onnx pack'")
        self._write(first, folder / MANIFEST)
        awaited = dict(Manifest.read(folder).files)
        done, total = 0, sum(record.size for record in awaited.values())
        free = shutil.disk_usage(folder).free
        if total > free:
            raise OutputError(
                f"unpacking takes {total:,} bytes and {free:,} are free: make room, or choose another place"
            )
        while (header := self._header()) is not None:
            record = awaited.pop(header.name, None)
            if record is None:
                raise BundleError(f"holds {header.name!r}, which its manifest doesn't list")
            if record.size != header.size:
                raise BundleError(f"holds {header.size} bytes of {header.name}, its manifest says {record.size}")
            if self._write(header, folder / header.name) != record.sha256:
                raise BundleError(f"{header.name} is not what the manifest says: get the archive again")
            done += header.size
            if progress is not None:
                progress(done, total)
        if awaited:
            raise BundleError(f"lacks {min(awaited)}: get the archive again")
        # The end that tar fills up with zeros; reading it to its end compares gzip's checksum.
        if any(self._read(tarfile.RECORDSIZE)) or self._read(1):
            raise BundleError("goes on behind its end: get the archive again")

    def _header(self) -> tarfile.TarInfo | None:
        """The next file's; None at the end."""
        block = self._exactly(tarfile.BLOCKSIZE)
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BundleError("not an archive made by 'gpt2onnx pack', or damaged") from error
        if header.type != tarfile.REGTYPE or header.size < 0:
            raise BundleError(f"holds {header.name!r}, which is not a regular file")
        return header

    def _write(self, header: tarfile.TarInfo, path: Path) -> str:
        """Writes a file's content; returns its sha256."""
        digest, left = hashlib.sha256(), header.size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")
        except (FileExistsError, NotADirectoryError) as error:
            raise BundleError(f"holds {header.name!r} in the place of another file") from error
        with file:
            while left:
                chunk = self._exactly(min(left, _CHUNK))
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        self._exactly(-header.size % tarfile.BLOCKSIZE)
        return digest.hexdigest()

    def _exactly(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) < count:
            raise BundleError("cut off: get the archive again")
        return data

    def _read(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except EOFError as error:
            raise BundleError("cut off: get the archive again") from error
        except (OSError, zlib.error) as error:
            raise BundleError("not an archive made by 'gpt2onnx pack', or damaged") from error


class _Hashed:
    """A file whose content is hashed as tarfile reads it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self.digest.update(data)
        return data


def _add(tar: tarfile.TarFile, folder: Path, name: str, record: FileRecord) -> None:
    header = tarfile.TarInfo(name)
    header.size = record.size
    header.mode = 0o644
    try:
        with (folder / name).open("rb") as file:
            hashed = _Hashed(file)
            tar.addfile(header, hashed)  # type: ignore[arg-type]
    except OSError as error:
        if error.strerror is None:  # tarfile's own: the file has become shorter
            raise BundleError(f"{folder / name} changed while it was packed: pack it again") from error
        raise
    if hashed.digest.hexdigest() != record.sha256:
        raise BundleError(f"{folder / name} changed while it was packed: pack it again")
