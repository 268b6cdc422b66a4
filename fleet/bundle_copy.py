"""Bundle on every machine: its own folder where that is visible, else one copy in the user's cache."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from gpt2onnx.errors import BackendError, BundleError

from ..models import user_cache
from ..models.bundle import MANIFEST, Bundle
from ..models.files import sha256_of
from ..runtime.host.locks import lock


@dataclass(frozen=True)
class SharedBundle:
    """A bundle that workers on any machine can open.

    Attributes:
        folder: on the machine that started the job.
        digest: sha256 of its manifest, which holds the hashes of all other files.
        files: references to the files' bytes in Ray's object store; empty if no other machine needs them.
    """

    folder: str
    digest: str
    files: Mapping[str, "ray.ObjectRef[Any]"]

    @classmethod
    def share(cls, folder: Path, *, elsewhere: bool) -> "SharedBundle":
        """Puts a bundle into the object store, if `elsewhere`: other machines are going to open it.

        Raises:
            BundleError: it differs from its manifest.
            BackendError: the object store is full.
        """
        bundle = Bundle.open(folder)
        files = {}
        if elsewhere:
            bundle.verify()
            try:
                for name in (MANIFEST, *bundle.manifest.files):
                    files[name] = ray.put(np.fromfile(folder / name, np.uint8))
            except (ObjectStoreFullError, OutOfDiskError) as error:
                raise BackendError(
                    "the bundle doesn't fit into Ray's object store on this machine, and its disk is nearly full:"
                    " free some of it, or start Ray with a larger --object-store-memory"
                ) from error
        return cls(os.path.abspath(folder), sha256_of(folder / MANIFEST), files)  # noqa: PTH100

    def here(self) -> Path:
        """Finds the bundle on this machine, or copies it into the user's cache. A copy is verified each time.

        Raises:
            BundleError: the copy is damaged.
            OutputError: there is no cache of this user's own.
            BackendError: the copy can't be written.
        """
        folder = Path(self.folder)
        if (folder / MANIFEST).is_file() and sha256_of(folder / MANIFEST) == self.digest:
            return folder
        target = user_cache.made() / "fleet" / self.digest[:16]
        try:
            target.parent.mkdir(exist_ok=True)
            # One worker of a machine makes the copy; the others wait for it.
            with target.with_suffix(".lock").open("wb") as file:
                lock(file)
                try:
                    Bundle.open(target).verify()
                except BundleError:
                    self._copy(target)
        except OSError as error:
            raise BackendError(f"can't copy the bundle to {target}: {error.strerror or error}") from error
        return target

    def _copy(self, target: Path) -> None:
        """Writes the manifest last, without which the folder is no bundle."""
        shutil.rmtree(target, ignore_errors=True)
        for name in sorted(self.files, key=lambda name: name == MANIFEST):
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            ray.get(self.files[name]).tofile(path)
        Bundle.open(target).verify()
