"""The bundle: a folder in the Hugging Face convention, with a manifest of its own.

config.json  generation_config.json  tokenizer.json  tokenizer_config.json  chat_template.jinja
genai_config.json       what onnxruntime-genai reads
gpt2onnx.json           the manifest: origin, precision, size and sha256 of every other file
onnx/model.onnx         the graph
onnx/model.onnx_data    its weights, memory-mapped by ONNX Runtime
onnx/ragged.onnx        the same network for our own runtime: rows bring their own numbers of tokens
onnx/wide.onnx          from 512 wide on: the graph for batches; in int8 and int4 for prompts, too
onnx/wide_weights.onnx  makes its weights of the first graph's
onnx/twin.onnx          in fp32 and fp16: the network in 8 bits, which drafts tokens for the full one to verify
onnx/twin.onnx_data     its weights
onnx/*_int8_cache.onnx  the runtime's graphs once more, with a KV cache in 8 bits
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from gpt2onnx.errors import BackendError, BundleError, CheckpointError, OptionError

from . import graph_rules, limits
from .config import GPT2Config, json_object, read_small
from .files import files_in, sha256_of
from .messages import shown
from .precision import BLOCK_SIZES, DTYPES, QUANTIZED

MANIFEST = "gpt2onnx.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENAI_CONFIG = "genai_config.json"
GRAPH = "onnx/model.onnx"
WEIGHTS = "onnx/model.onnx_data"
RAGGED_GRAPH = "onnx/ragged.onnx"
# For passes of many rows, "wide" ones in the names of files, reports and arguments.
SECOND_GRAPH = "onnx/wide.onnx"
SECOND_GRAPH_WEIGHTS = "onnx/wide_weights.onnx"
TWIN_GRAPH = "onnx/twin.onnx"
TWIN_WEIGHTS = "onnx/twin.onnx_data"
# The runtime's graphs with a KV cache in int8, in place of the cache in floats.
INT8_CACHE_GRAPHS = {
    name: f"{name.removesuffix('.onnx')}_int8_cache.onnx" for name in (RAGGED_GRAPH, SECOND_GRAPH, TWIN_GRAPH)
}
GRAPHS = ("fused", "portable")
CACHE_DTYPES = ("fp32", "int8")
FORMAT_VERSION = 1

_GRAPH_FILES = (GRAPH, RAGGED_GRAPH, SECOND_GRAPH, SECOND_GRAPH_WEIGHTS, TWIN_GRAPH, *INT8_CACHE_GRAPHS.values())
_REQUIRED = (CONFIG, GENERATION_CONFIG, GRAPH)
# Files up to this size are hashed whenever a bundle is opened, which takes less than a millisecond in all.
_SMALL = 2**18


@dataclass(frozen=True)
class FileRecord:
    """A file in the manifest: bytes and sha256 in hexadecimal."""

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
        block_size: weights that share a scale, in most matrices that are quantised in blocks; None where none are.
        files: every file but the manifest, by its path inside the bundle.
        parity: the parity report against PyTorch, where one was made.
        quality: loss of the precision against fp32, where it was measured; see `exporter.validate.quality`.
        sha256: of gpt2onnx.json with this field empty; set where it is written.
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
    sha256: str = ""

    def write(self, folder: Path) -> None:
        """Writes gpt2onnx.json into the folder."""
        digest = hashlib.sha256(replace(self, sha256="")._to_json()).hexdigest()
        (folder / MANIFEST).write_bytes(replace(self, sha256=digest)._to_json())

    def _to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads gpt2onnx.json.

        Raises:
            BundleError: it is missing, unreadable, of a newer format, no longer what was written, or names a file
                outside the folder.
        """
        path = folder / MANIFEST
        try:
            # Read once: between two reads another export may take its place.
            content = read_small(path)
            raw = json_object(content, path)
        except CheckpointError as error:
            raise BundleError(str(error)) from error
        version = raw.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise BundleError(
                f"{folder} has bundle format {shown(version)}, this gpt2onnx reads up to {FORMAT_VERSION}:"
                " upgrade gpt2onnx"
            )
        raw.setdefault("sha256", "")  # the first bundles had none
        try:
            manifest = msgspec.convert(raw, cls)
            usable = (
                manifest.dtype in DTYPES and manifest.graph in GRAPHS and manifest.block_size in (None, *BLOCK_SIZES)
            )
        except msgspec.ValidationError:
            usable = False
        if not usable or raw.keys() != {field.name for field in fields(cls)}:
            raise BundleError(f"{path} is not a manifest of gpt2onnx: export the bundle again")
        digest = manifest.sha256
        if digest and hashlib.sha256(content.replace(digest.encode(), b"")).hexdigest() != digest:
            raise BundleError(f"{path} was changed after it was written: export the bundle again")
        for name in manifest.files:
            if not _stays_inside(name):
                raise BundleError(f"{path} names a file outside the bundle: {shown(name)}")
        return manifest


def _stays_inside(name: str) -> bool:
    """Whether a manifest's path is a plain one below its folder, on any system."""
    path = PurePosixPath(name)
    return (
        path.parts != ()
        and path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and not set(name) & set("\\:\0")
    )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, manifest and architecture, and the precision of the KV cache that it is run with.

    Attributes:
        cache_dtype: "int8", or "fp32": keys and values as the network computes them, in fp16 bundles float16.
    """

    folder: Path
    manifest: Manifest
    config: GPT2Config
    cache_dtype: str = "fp32"

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Opens a bundle, and compares every file's size and the small ones' hashes with the manifest.

        Raises:
            BundleError: a file is missing, differs, or leads out of the folder; or the manifest or config.json
                can't be used.
        """
        if not os.path.isdir(folder):  # noqa: PTH112  # for the reason that is_bundle gives
            raise BundleError(f"no bundle at {folder}: make one with 'gpt2onnx export SOURCE {folder}'")
        if not is_bundle(folder):
            raise BundleError(f"{folder} is not a bundle (no {MANIFEST}): make one with 'gpt2onnx export'")
        root = os.path.realpath(folder)
        _place(folder, root, MANIFEST)
        manifest = Manifest.read(folder)
        for name in _REQUIRED:
            if name not in manifest.files:
                raise BundleError(f"{folder / MANIFEST} doesn't list {name}: export the bundle again")
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            if name not in manifest.files and os.path.lexists(folder / name):
                raise _not_listed(folder / name)
        for name, record in manifest.files.items():
            path, size = _place(folder, root, name)
            if size != record.size:
                raise BundleError(f"{path} has {size} bytes, the manifest says {record.size}: export the bundle again")
            if size <= _SMALL:
                _check_hash(path, record)
        try:
            config = GPT2Config.from_file(folder / CONFIG)
        except CheckpointError as error:
            raise BundleError(f"{folder}: {error}") from error
        return cls(folder, manifest, config)

    @property
    def has_twin(self) -> bool:
        """Whether a quantised twin drafts for it."""
        return TWIN_GRAPH in self.manifest.files

    @property
    def has_int8_cache(self) -> bool:
        """Whether it can be run with a KV cache in int8: it has a graph for that beside each other one."""
        files = self.manifest.files
        return RAGGED_GRAPH in files and all(
            cached in files for name, cached in INT8_CACHE_GRAPHS.items() if name in files
        )

    def sha256(self, tokenizer: Path | None = None) -> str:
        """Hash over all files but the manifest, which also holds reports.

        Those for a KV cache in int8 count only where one is used: their scales were measured, so their last digits depend on the
        machine that made the bundle.

        Args:
            tokenizer: folder of a tokenizer in place of the bundle's own.
        """
        unused = INT8_CACHE_GRAPHS.values() if self.cache_dtype == "fp32" else ()
        hashes = {name: record.sha256 for name, record in self.manifest.files.items() if name not in unused}
        if tokenizer is not None:
            for name in (TOKENIZER, TOKENIZER_CONFIG):
                hashes.pop(name, None)
                if (tokenizer / name).exists():
                    hashes[name] = sha256_of(tokenizer / name)
        return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()

    def with_cache(self, dtype: str) -> "Bundle":
        """The bundle, run with a KV cache in another precision.

        Raises:
            OptionError: there is no such precision, or the bundle has no graph for it.
        """
        check_cache_dtype(dtype)
        if dtype == "int8" and not self.has_int8_cache:
            raise OptionError(
                f"{self.folder} has no graph with a cache in int8: export it again with --int8-cache, not in fp16 or as portable",
                "cache_dtype",
            )
        return replace(self, cache_dtype=dtype)

    def path(self, name: str) -> Path:
        """The file of a graph, or of its form with the bundle's KV cache."""
        return self.folder / (INT8_CACHE_GRAPHS.get(name, name) if self.cache_dtype == "int8" else name)

    def checked_path(self, name: str) -> Path:
        """As `path`, once it is known that ONNX Runtime may open the file.

        ONNX Runtime follows a graph's references to other files, before 1.24 wherever they lead, and runs any program in it.

        Raises:
            BundleError: it is too large or no graph, takes weights from elsewhere, holds what no exported graph has, or is of another
                precision.
        """
        path = self.path(name)
        try:
            if path.stat().st_size > limits.GRAPH:
                raise BundleError(f"{path} has more than {limits.GRAPH:,} bytes: export the bundle again")
            content = path.read_bytes()
            makes_weights = name == SECOND_GRAPH_WEIGHTS
            places = graph_rules.check(content, self.config.n_positions, makes_weights=makes_weights)
        except OSError as error:
            raise BundleError(f"can't read {path}: {error.strerror}") from error
        except ValueError as error:
            raise BundleError(f"{path} is not an ONNX graph ({error}): export the bundle again") from error
        except graph_rules.NotExportedError as error:
            raise BundleError(f"{path} has {error}, which no exported graph has: export the bundle again") from error
        # Of the operators, only this one computes with quantised weights.
        quantized = self.manifest.dtype in QUANTIZED
        if name in (GRAPH, RAGGED_GRAPH) and (b"MatMulNBits" in content) != quantized:
            raise BundleError(f"{path} isn't a graph in {self.manifest.dtype}: export the bundle again")
        for place in places:
            if not _stays_inside(place) or (PurePosixPath(name).parent / place).as_posix() not in self.manifest.files:
                raise BundleError(f"{path} takes weights from {shown(place)}, which is not a file of the bundle")
        return path

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compares every file's sha256 with the manifest, looks for files that it doesn't list, and checks the graphs.

        Args:
            progress: called with the bytes read and the bytes in all.

        Raises:
            BundleError: a file has other content, can't be read, leads out of the folder, or isn't in the manifest; or
                ONNX Runtime may not open a graph.
        """
        if not self.manifest.sha256:
            raise BundleError(f"{self.folder / MANIFEST} has no hash of itself: export the bundle again")
        done, total = 0, sum(record.size for record in self.manifest.files.values())

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        for name, record in self.manifest.files.items():
            _check_hash(self.folder / name, record, advance)
            if name in _GRAPH_FILES:
                self.checked_path(name)
        try:
            for path in files_in(self.folder):
                name = path.relative_to(self.folder).as_posix()
                if name not in self.manifest.files and name != MANIFEST:
                    raise _not_listed(path)
        except OSError as error:
            raise BundleError(f"can't read {error.filename}: {error.strerror}") from error

    def without(self, *files: str) -> "Bundle":
        """The bundle as if it had been made without some of its files."""
        kept = {name: record for name, record in self.manifest.files.items() if name not in files}
        return replace(self, manifest=replace(self.manifest, files=kept))

    def check_in_place(self) -> None:
        """Looks whether it is still what its folder holds, before more of it is read than was opened.

        Raises:
            BackendError: it is gone, or another export has taken its place.
        """
        if not self.folder.is_dir():
            raise BackendError(f"{self.folder} is gone")
        try:
            current = Manifest.read(self.folder).sha256
        except (BundleError, OSError):
            return  # it isn't done yet
        if current != self.manifest.sha256:
            raise BackendError(f"{self.folder} is another bundle by now: load it again")


def _place(folder: Path, root: str, name: str) -> tuple[Path, int]:
    """A file of the bundle that really lies in it (`root`, without links), and its size."""
    path = folder / name
    try:
        real = os.path.realpath(path, strict=True)
        facts = os.stat(real)  # noqa: PTH116
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise BundleError(f"{path} {reason}: export the bundle again") from error
    if not real.startswith(root.rstrip(os.sep) + os.sep):
        raise BundleError(f"{path} is a link that leads out of the bundle: put the file itself there")
    if not stat.S_ISREG(facts.st_mode):
        raise BundleError(f"{path} is not a plain file: export the bundle again")
    if not os.access(real, os.R_OK):  # ONNX Runtime says less
        raise BundleError(f"{path} can't be read: you lack the permission")
    return path, facts.st_size


def _check_hash(path: Path, record: FileRecord, advance: Callable[[int], None] | None = None) -> None:
    try:
        digest = sha256_of(path, advance)
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from error
    if digest != record.sha256:
        raise BundleError(f"{path} is not what the manifest says: export the bundle again")


def _not_listed(path: Path) -> BundleError:
    return BundleError(f"{path} is not in the manifest: remove it, or export the bundle again")


def check_cache_dtype(dtype: str) -> None:
    """Raises OptionError if a KV cache can't have this precision."""
    if dtype not in CACHE_DTYPES:
        raise OptionError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {shown(dtype)}")


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a manifest of gpt2onnx."""
    # Unlike pathlib, os.path takes a name too long, or a folder that may not be searched, for one that isn't there.
    return os.path.isfile(folder / MANIFEST)  # noqa: PTH113


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file below the folder but the manifest, by path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path))
        for path in sorted(files_in(folder))
        if path != folder / MANIFEST
    }
