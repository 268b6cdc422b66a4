"""A bundle on every machine of a fleet: where all see its folder, that one; else a copy, once per machine."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from gpt2onnx.errors import BackendError, BundleError

from ..models import user_cache
from ..models.bundle import MANIFEST, Bundle, sha256_of
from ..runtime.host.locks import lock

_CHUNK = 64 << 20  # bytes of an object in Ray's store


@dataclass(frozen=True)
class SharedBundle:
    """A bundle that workers anywhere can open.

    Attributes:
        folder: where it lies on the machine that the job was started on.
        digest: sha256 of its manifest, which holds the hashes of all its other files.
        chunks: the content of its files in Ray's object store; none where no other machine is to have it.
    """

    folder: str
    digest: str
    chunks: Mapping[str, Sequence["ray.ObjectRef[bytes]"]]

    @classmethod
    def share(cls, folder: Path, *, elsewhere: bool) -> "SharedBundle":
        """Makes a bundle known to workers, also to those on other machines if `elsewhere`.

        Raises:
            BundleError: it is not what its manifest says.
            BackendError: Ray has no room for it.
        """
        bundle = Bundle.open(folder)
        chunks = {}
        if elsewhere:
            bundle.verify()
            names = [MANIFEST, *bundle.manifest.files]
            try:
                chunks = {name: [ray.put(chunk) for chunk in _read(folder / name)] for name in names}
            except (ObjectStoreFullError, OutOfDiskError) as error:
                raise BackendError(
                    "the bundle doesn't fit into Ray's object store on this machine, and its disk is nearly full:"
                    " free some of it, or start Ray with a larger --object-store-memory"
                ) from error
        return cls(os.path.abspath(folder), sha256_of(folder / MANIFEST), chunks)  # noqa: PTH100

    def here(self) -> Path:
        """The bundle's folder on this machine, or that of a copy in the user's cache, made and verified if need be.

        Raises:
            BundleError: the copy is damaged.
            BackendError: it can't be written.
        """
        if _is(Path(self.folder), self.digest):
            return Path(self.folder)
        cache = user_cache.folder() / "fleet"
        target = cache / self.digest[:16]
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # One worker of a machine makes the copy, the others wait for it.
            with target.with_suffix(".lock").open("wb") as file:
                lock(file)
                if not _is(target, self.digest) or not _is_whole(target):
                    self._copy(target)
        except OSError as error:
            raise BackendError(f"can't copy the bundle to {target}: {error.strerror or error}") from error
        return target

    def _copy(self, target: Path) -> None:
        passing = target.with_suffix(".new")
        for old in (passing, target):
            shutil.rmtree(old, ignore_errors=True)
        for name, chunks in self.chunks.items():
            path = passing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                for chunk in chunks:
                    file.write(ray.get(chunk))
        Bundle.open(passing).verify()
        passing.rename(target)


def _is(folder: Path, digest: str) -> bool:
    try:
        return sha256_of(folder / MANIFEST) == digest
    except OSError:
        return False


def _is_whole(folder: Path) -> bool:
    try:
        Bundle.open(folder).verify()
    except BundleError:
        return False
    return True


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
