"""From what a user names to a model that generates: the place where exporter and runtime meet."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gpt2onnx.errors import BundleError, CheckpointError, OutputError

from .models import bundle, tales, user_cache
from .models.config import ADAPTER_CONFIG, GPT2Config, read_json

if TYPE_CHECKING:
    from .model import Model
    from .runtime.host.progress import Progress


# Raised when exports change, so that those in the cache are made anew.
_EXPORT = 3


def load(
    model: str | os.PathLike[str] = "tales",
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    verify: bool = False,
    wide_after: int | None = 512,
    draft: str = "auto",
    draft_model: str | os.PathLike[str] | None = None,
    draft_length: int | None = None,
    cache_dtype: str = "fp32",
) -> "Model":
    """Loads a model.

    Args:
        model: a bundle folder; or any source that `export` takes, which is then exported, in fp32, into the user's cache
            (the folder that GPT2ONNX_CACHE names, or else the platform's), and anew when a file of its folder changes.
        tokenizer: folder of a tokenizer in any form that `export` takes, for a bundle without one, or in its place.
        device: "cpu", "cuda", the name of another execution provider, or "auto": CUDA where it works, else the CPU.
        threads: of one operator; by default as many as this process may use, fewer for very small models.
        verify: compare every byte of the bundle with its manifest first; otherwise only the files' sizes, and the
            small files' content.
        wide_after: tokens after which a second graph is opened, which is faster for batches and, in int8 and int4, for prompts.
            The tokens of these count; in fp32 those of batches, where the processor has AVX-512. To open it takes a
            moment and memory, and in int8 and int4 it rounds a little more. 0: at once. None: never.
        draft: source of drafts, next tokens that one forward pass then verifies: "none"; "lookup", the text so
            far; "twin", the bundle's network in 8 bits; "auto", the twin where it pays. A pass over several
            tokens rounds in another way than one over a single token. In fp32 that decides only what differs by some 1e-6,
            in lower precisions also a near tie.
        draft_model: a smaller model of the same vocabulary, which drafts in place of the twin.
        draft_length: tokens of a draft by twin or draft model; by default as many as pay, which can be none.
        cache_dtype: of the KV cache, the keys and values of earlier tokens, on the CPU. "int8" takes a quarter of the memory of
            "fp32"; with AVX-512, steps of many or long texts are faster. The text can change.

    Raises:
        BundleError, CheckpointError: the model can't be found or used.
        MissingExtraError: it has to be exported first, and the extra `export` isn't installed.
        OptionError: an argument is out of range.
        BackendError: the device isn't there or doesn't run this model, the model doesn't fit into memory, or ONNX
            Runtime can't load the graph.
    """
    from .model import Model

    bundle.check_cache_dtype(cache_dtype)  # before an export
    folder = resolve(model, int8_cache=cache_dtype == "int8")
    if verify:
        bundle.Bundle.open(folder).verify()
    with TemporaryDirectory() as converted:
        own = None if tokenizer is None else _convert_tokenizer(Path(tokenizer), folder, Path(converted))
        return Model(
            folder,
            tokenizer=own,
            device=device,
            threads=threads,
            wide_after=wide_after,
            draft=draft,
            draft_model=None if draft_model is None else resolve(draft_model),
            draft_length=draft_length,
            cache_dtype=cache_dtype,
        )


def resolve(
    model: str | os.PathLike[str],
    dtype: str = "fp32",
    progress: "Progress | None" = None,
    *,
    int8_cache: bool = False,
) -> Path:
    """The bundle folder of a model: its own, or that of its export in the user's cache, in a precision.

    Args:
        model: as for `load`.
        int8_cache: the export is to be run with a KV cache in int8.
        progress: called with the bytes done and all bytes of an export, if it is needed.
    """
    folder = Path(model)
    if bundle.is_bundle(folder):
        return folder
    source = os.fspath(model)
    target = user_cache.folder() / _cache_name(source, dtype)
    if int8_cache and bundle.is_bundle(target) and not _is_made(target, int8_cache=True):
        target = user_cache.folder() / _cache_name(source, f"{dtype} with int8 cache")  # the other one may be in use
    if not _is_made(target, int8_cache=int8_cache):
        # Only now: the exporter's imports are needless, and may be missing, where the export is there.
        from .exporter.export import export

        user_cache.made()
        try:
            export(source, target, dtype=dtype, int8_cache=int8_cache or None, force=True, progress=progress)
        except OutputError:
            if not _is_made(target, int8_cache=int8_cache):  # otherwise another process has just made the same
                raise
    return target


def _is_made(folder: Path, *, int8_cache: bool) -> bool:
    """Whether a folder holds a bundle, with graphs for a KV cache in int8 if that is asked for."""
    try:
        made = bundle.Bundle.open(folder)
    except BundleError:
        return False
    return made.has_int8_cache or not int8_cache


def _convert_tokenizer(source: Path, model: Path, target: Path) -> Path:
    """The folder `target`, with the tokenizer of the folder `source` as an export of it would have it."""
    from .exporter.tokenizer.convert import write_tokenizer

    vocab_size = bundle.Bundle.open(model).config.vocab_size
    if not source.is_dir() or not write_tokenizer(source, {"vocab_size": vocab_size}, target):
        raise CheckpointError(
            f"{source} has no tokenizer: name a folder with tokenizer.json, or vocab.json and merges.txt"
        )
    return target


def look_up(model: str | os.PathLike[str]) -> "bundle.Bundle | GPT2Config":
    """Facts about a model that isn't exported.

    Returns:
        The bundle: the model's own, or that of an earlier export in the user's cache. Where there is none, the
        architecture that the source has; of one on the Hugging Face hub, only its config.json is fetched.

    Raises:
        BundleError, CheckpointError: the model can't be found or used.
        MissingExtraError: the source can only be read with the packages of the extra `export`.
    """
    if bundle.is_bundle(Path(model)):
        return bundle.Bundle.open(Path(model))
    source = os.fspath(model)
    try:
        return bundle.Bundle.open(user_cache.folder() / _cache_name(source))
    except BundleError:
        pass
    folder = tales.FOLDER if source == "tales" else Path(source)
    config: Path | None = folder / bundle.CONFIG
    if not os.path.isfile(folder / bundle.CONFIG):  # noqa: PTH113
        from .exporter.checkpoint.hub import find_config

        config = find_config(source)
    if config is not None and "model_type" in read_json(config):
        return GPT2Config.from_file(config)
    # Other programs save less, or under other names: the rest is read off the weights.
    from .exporter.checkpoint.checkpoint import Checkpoint

    return Checkpoint.open(source).config


def _cache_name(source: str, dtype: str = "fp32") -> str:
    """A folder name for a source in a precision and, where it lies on this machine, for the state it is in."""
    place = os.fspath(tales.FOLDER) if source == "tales" else os.path.abspath(source)  # noqa: PTH100
    state = [f"format {bundle.FORMAT_VERSION}, export {_EXPORT}", dtype, source]
    places = [place]
    if os.path.isfile(adapter := os.path.join(place, ADAPTER_CONFIG)):  # noqa: PTH113, PTH118
        base = read_json(Path(adapter)).get("base_model_name_or_path")
        places += [os.path.abspath(base)] if isinstance(base, str) else []  # noqa: PTH100
    # os.path where pathlib would raise for a name that is too long.
    for place in filter(os.path.exists, places):
        # One checkpoint file is read together with what lies beside it.
        folder = Path(place) if os.path.isdir(place) else Path(place).parent  # noqa: PTH112
        state.append(place)
        with suppress(OSError):  # a folder that may not be listed, which the export says
            for path in sorted(folder.iterdir()):
                if path.name.startswith("."):  # such as an editor's lock file
                    continue
                with suppress(OSError):  # a link that leads nowhere
                    facts = path.stat()
                    state.append(f"{path.name} {facts.st_size} {facts.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(state).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source)[-40:].strip('-.') or 'model'}-{digest[:12]}"
