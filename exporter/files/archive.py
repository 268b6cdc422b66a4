"""The archive of a bundle: one .tar.gz, the same bytes whenever the same bundle is packed.

The manifest comes first, so that the name and size of every other file are known before it is read.
Needs neither NumPy nor ONNX Runtime.
"""

import gzip
import os
import shutil
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from gpt2onnx.errors import BundleError, OptionError, OutputError

from ...models import limits
from ...models.bundle import MANIFEST, Bundle, FileRecord, Manifest
from ...models.files import sha256_of
from ...runtime.host.progress import Progress
from .atomic import replacing, replacing_file
from .target import check_target

_COMPRESSION_LEVEL = 6
_CHUNK = 1 << 20  # bytes
_TOO_MUCH = "holds more than its manifest lists: get the archive again"


@dataclass(frozen=True)
class Archive:
    """An archive that `pack` made.

    Attributes:
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

    The archive doesn't depend on time, place or user. (Another implementation of zlib may compress the same content to
    other bytes.)

    Args:
        folder: the bundle. Every file is compared with the manifest before and after it is packed.
        archive: the file to make; it appears whole or not at all.
        progress: called with the bytes packed and the bytes in all.

    Raises:
        BundleError: the bundle is missing, or contradicts its manifest.
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
        try:
            _write(file, folder, content, progress)
        except OSError:  # tarfile's, if a file became shorter
            _check_unchanged(bundle, content[MANIFEST])
            raise
        _check_unchanged(bundle, content[MANIFEST])
        file.flush()
        size, digest = file.tell(), sha256_of(Path(file.name))
    return Archive(target, size, digest, content)


def _write(file: IO[bytes], folder: Path, content: dict[str, FileRecord], progress: Progress | None) -> None:
    done, total = 0, sum(record.size for record in content.values())
    with (
        # Neither a name nor a time in gzip's header.
        gzip.GzipFile("", "wb", _COMPRESSION_LEVEL, file, mtime=0) as compressed,
        tarfile.open(mode="w", fileobj=compressed, format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, record in content.items():
            header = tarfile.TarInfo(name)
            header.size, header.mode = record.size, 0o644
            with (folder / name).open("rb") as source:
                tar.addfile(header, source)
            done += record.size
            if progress is not None:
                progress(done, total)


def _check_unchanged(bundle: Bundle, manifest: FileRecord) -> None:
    try:
        bundle.verify()
        unchanged = sha256_of(bundle.folder / MANIFEST) == manifest.sha256
    except (BundleError, OSError):
        unchanged = False
    if not unchanged:
        raise BundleError(f"{bundle.folder} changed while it was packed: pack it again")


def unpack(
    archive: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    max_size: int = limits.ARCHIVE_CONTENT,
    progress: Progress | None = None,
) -> Bundle:
    """Unpacks an archive that `pack` made.

    Only regular files that its manifest lists are taken from it, each with the size and hash listed there.

    Args:
        target: the bundle's folder; it appears whole or not at all.
        max_size: most bytes that the bundle may have.
        progress: called with the bytes unpacked and the bytes in all.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the archive is missing, damaged, or holds anything but a bundle.
        OptionError: the bundle has more than `max_size` bytes.
        OutputError: the target exists or can't be written.
    """
    archive, target = Path(archive), Path(target)

    check_target(target, force=force)
    try:
        file = archive.open("rb")
    except OSError as error:
        raise BundleError(f"can't read {archive}: {error.strerror}") from error
    with file, replacing(target, lambda: check_target(target, force=force)) as folder:
        try:
            _extract(_Content(file), folder, max_size, progress)
            made = Bundle.open(folder)  # here, since another run may replace the target at once
            made.verify()
        except (tarfile.TarError, ValueError, RecursionError) as error:  # tarfile's, of hostile headers
            raise BundleError(f"{archive} is not an archive made by 'gpt2onnx pack', or damaged") from error
        except BundleError as error:
            # The folder is gone when the message is read.
            reason = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}", "it")
            raise BundleError(f"{archive}: {reason}") from error
    return replace(made, folder=target)


class _Content:
    """The tar file in an archive. Reading more than `limit` bytes is an error.

    tarfile takes long names and extended headers into memory, however large they say they are.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._done = gzip.GzipFile(fileobj=file), 0
        self.limit = _tar_size([limits.ARCHIVE_MANIFEST])

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(min(size, self.limit + 1 - self._done))
        except (EOFError, OSError, zlib.error) as error:
            raise BundleError("cut off, damaged, or not made by 'gpt2onnx pack': get the archive again") from error
        self._done += len(data)
        if self._done > self.limit:
            raise BundleError(_TOO_MUCH)
        return data


def _extract(content: _Content, folder: Path, max_size: int, progress: Progress | None) -> None:
    """Writes all files to an empty folder."""
    with tarfile.open(fileobj=content, mode="r|") as tar:  # type: ignore[call-overload]
        first = tar.next()
        if first is None or first.name != MANIFEST:
            raise BundleError("not an archive made by 'gpt2onnx pack'")
        _extract_file(tar, first, folder, limits.ARCHIVE_MANIFEST)
        awaited = dict(Manifest.read(folder).files)
        sizes = [record.size for record in awaited.values()]
        done, total, free = 0, sum(sizes), shutil.disk_usage(folder).free
        if total > max_size:
            raise OptionError(
                f"{total:,} bytes would be unpacked, above the limit of {max_size:,}: raise it if you trust the source"
            )
        if total > free:
            raise OutputError(
                f"unpacking takes {total:,} bytes and {free:,} are free: make room, or choose another place"
            )
        content.limit = _tar_size([first.size, *sizes])
        while (member := tar.next()) is not None:
            record = awaited.pop(member.name, None)
            if record is None:
                raise BundleError(f"holds {member.name!r}, which its manifest doesn't list")
            _extract_file(tar, member, folder, record.size)
            done += member.size
            if progress is not None:
                progress(done, total)
    if awaited:
        raise BundleError(f"lacks {min(awaited)}: get the archive again")
    while content.read(_CHUNK):  # to the end, where gzip compares its checksum
        pass


def _extract_file(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, most: int) -> None:
    """Writes one file of up to `most` bytes below the folder; the manifest has been checked to name no other place."""
    # tarfile counts sparse files as regular ones; their holes take nothing in the archive and all their size on the disk.
    regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    source = tar.extractfile(member) if regular else None
    if source is None:
        raise BundleError(f"holds {member.name!r}, which is not a regular file")
    if member.size > most:
        raise BundleError(_TOO_MUCH)
    path = folder / member.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise BundleError(f"holds {member.name!r} in the place of another file") from error
    with file:
        shutil.copyfileobj(source, file, _CHUNK)


def _tar_size(sizes: list[int]) -> int:
    """Bytes of a tar file of files with these sizes."""

    def rounded_up(size: int, unit: int) -> int:
        return -(-size // unit) * unit

    files = sum(tarfile.BLOCKSIZE + rounded_up(size, tarfile.BLOCKSIZE) for size in sizes)
    return rounded_up(files + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)
