"""The bundle: a folder in the Hugging Face convention, with a manifest of its own.

config.json  generation_config.json  tokenizer.json  tokenizer_config.json
genai_config.json       what onnxruntime-genai reads
gpt2onnx.json           the manifest: origin, precision, size and sha256 of every other file
onnx/model.onnx         the graph
onnx/model.onnx_data    its weights, memory-mapped by ONNX Runtime
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gpt2onnx.errors import BundleError, CheckpointError

from .config import GPT2Config, read_json

MANIFEST = "gpt2onnx.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
GENAI_CONFIG = "genai_config.json"
GRAPH = "onnx/model.onnx"
WEIGHTS = "onnx/model.onnx_data"
FORMAT_VERSION = 1

_REQUIRED = (CONFIG, GENERATION_CONFIG, TOKENIZER, GRAPH)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file: bytes and sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of gpt2onnx.json.

    Attributes:
        gpt2onnx: version that wrote the bundle.
        source: what was exported, as the user named it.
        source_sha256: hash over the checkpoint's weight files.
        graph: "fused" or "portable".
        dtype: "fp32", "fp16", "int8" or "int4".
        block_size: weights that share a scale; None where nothing is quantised.
        files: every file but the manifest, by its path inside the bundle.
        parity: the parity report against PyTorch, where one was made.
        quality: what the precision costs against fp32, where it was measured; see `exporter.quality`.
    """

    gpt2onnx: str
    source: str
    source_sha256: str
    graph: str
    dtype: str
    block_size: int | None
    files: dict[str, FileRecord]
    parity: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Writes gpt2onnx.json into the folder."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads gpt2onnx.json.

        Raises:
            BundleError: it is missing, unreadable, of a newer format, or names a file outside the folder.
        """
        try:
            raw = read_json(folder / MANIFEST)
            version = raw.get("format_version")
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise BundleError(
                    f"{folder} has bundle format {version!r}, this gpt2onnx reads up to {FORMAT_VERSION}: upgrade gpt2onnx"
                )
            files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
            manifest = cls(files=files, **raw)
        except CheckpointError as error:
            raise BundleError(str(error)) from error
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{folder / MANIFEST} is not a manifest of gpt2onnx: export the bundle again") from error
        for name in manifest.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise BundleError(f"{folder / MANIFEST} names a file outside the bundle: {name}")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, manifest and architecture."""

    folder: Path
    manifest: Manifest
    config: GPT2Config

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Opens a bundle and compares every file's size with the manifest (hashes are `gpt2onnx verify`'s).

        Raises:
            BundleError: a file is missing or has another size, or the manifest or config.json can't be used.
        """
        if not folder.is_dir():
            raise BundleError(f"no bundle at {folder}: make one with 'gpt2onnx export SOURCE {folder}'")
        if not (folder / MANIFEST).is_file():
            raise BundleError(f"{folder} is not a bundle (no {MANIFEST}): make one with 'gpt2onnx export'")
        manifest = Manifest.read(folder)
        for name in _REQUIRED:
            if name not in manifest.files:
                raise BundleError(f"{folder / MANIFEST} doesn't list {name}: export the bundle again")
        for name, record in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise BundleError(f"{folder / name} is missing: export the bundle again") from error
            if size != record.size:
                raise BundleError(
                    f"{folder / name} has {size} bytes, the manifest says {record.size}: export the bundle again"
                )
        try:
            config = GPT2Config.from_file(folder / CONFIG)
        except CheckpointError as error:
            raise BundleError(str(error)) from error
        return cls(folder, manifest, config)

    def verify(self) -> None:
        """Compares every file's sha256 with the manifest, and looks for files that it doesn't list.

        Raises:
            BundleError: a file has other content, can't be read, or isn't in the manifest.
        """
        try:
            found = describe_files(self.folder)
        except OSError as error:
            raise BundleError(f"can't read {error.filename}: {error.strerror}") from error
        for name, record in self.manifest.files.items():
            if found.pop(name, None) != record:
                raise BundleError(f"{self.folder / name} is not what the manifest says: export the bundle again")
        if found:
            raise BundleError(
                f"{self.folder / min(found)} is not in the manifest: remove it, or export the bundle again"
            )


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a manifest of gpt2onnx."""
    # Unlike pathlib, os.path takes a name too long, or a folder that may not be searched, for one that isn't there.
    return os.path.isfile(folder / MANIFEST)  # noqa: PTH113


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below the folder, the manifest aside, by path with forward slashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path))
        for path in files
        if path != folder / MANIFEST
    }


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
