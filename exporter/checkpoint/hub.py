"""Finds a source on this machine, or fetches it from the Hugging Face hub."""

import os
import sys
from pathlib import Path
from typing import Any

from gpt2onnx.errors import CheckpointError, MissingExtraError, OptionError

from ...models import tales
from ...models.bundle import CONFIG
from ...models.config import ADAPTER_CONFIG
from ...models.messages import one_line
from .formats import SHARD_INDEX, SUFFIXES
from .formats.tensorflow_file import INDEX

# Files to fetch: the small ones, then the weights in one format.
_SMALL = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "gptq_model-*.safetensors", "adapter_model.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]
_OTHERS = ["tf_model.h5"], ["flax_model.msgpack"], ["rust_model.ot"]


def find(source: str, revision: str | None) -> Path:
    """The folder or file of a source. One on the hub is fetched into the hub's own cache.

    Args:
        source: the embedded name `tales`, a checkpoint folder or file, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.

    Raises:
        CheckpointError: it can't be found or fetched.
        OptionError: a revision of what is on this machine.
        MissingExtraError: a Hugging Face id was given, and huggingface_hub isn't installed.
    """
    place = find_here(source)
    if place is None:
        return _download(source, revision)
    if revision is not None:
        raise OptionError(f"revision goes with a Hugging Face id, and {source} is on this machine: leave it out")
    return place


def find_here(source: str) -> Path | None:
    """The folder or file of a source on this machine; None if there is none, and the source may be a Hugging Face id.

    Raises:
        CheckpointError: it is neither.
    """
    if not source:
        raise CheckpointError("the source is empty: name a checkpoint folder or file, a Hugging Face id, or tales")
    if source == "tales":
        return tales.FOLDER
    path = Path(source)
    # Unlike pathlib, os.path reports a name that is too long, or a folder that may not be searched, as missing.
    if os.path.isdir(path):  # noqa: PTH112
        if not os.access(path, os.R_OK | os.X_OK):
            raise CheckpointError(f"can't read {source}: you may not list this folder")
        return path
    if os.path.isfile(path):  # noqa: PTH113
        if path.suffix not in SUFFIXES and not path.name.endswith(SHARD_INDEX):
            raise CheckpointError(f"{source} is not a checkpoint folder, nor a {', '.join(SUFFIXES)} file")
        return path
    if os.path.isfile(index := f"{source}{INDEX}"):  # noqa: PTH113  # a TensorFlow checkpoint goes by its files' common name
        return Path(index)
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise CheckpointError(f"no checkpoint folder or file at {source!r}")
    return None


def find_config(source: str) -> Path | None:
    """The config.json of a source, fetched without the weights; None if it has none.

    Raises:
        CheckpointError, MissingExtraError: as for `find`.
    """
    place = find_here(source)
    folder = _fetch(source, None, [CONFIG]) if place is None else place
    path = (folder.parent if folder.is_file() else folder) / CONFIG
    return path if path.is_file() else None


def _download(repository: str, revision: str | None) -> Path:
    folder = _fetch(repository, revision, _SMALL + _SAFETENSORS)
    if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise CheckpointError(f"the repository {repository!r} has no {CONFIG}: it holds no GPT-2 for transformers")
    if _has_weights(folder, _SAFETENSORS):
        return folder
    for patterns in (_PICKLES, *_OTHERS):
        # The folder's name is the commit, so both halves are of one state.
        folder = _fetch(repository, folder.name, _SMALL + patterns)
        if _has_weights(folder, patterns):
            return folder
    raise CheckpointError(f"the repository {repository!r} has no weights of a known format, at least not in its root")


def _has_weights(folder: Path, patterns: list[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils.tqdm import tqdm
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Fetching {repository!r} from the Hugging Face hub", "huggingface_hub", "export"
        ) from error

    class Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        """The hub's progress bar, on a terminal only."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            quiet = {} if sys.stderr.isatty() else {"disable": True}
            super().__init__(*arguments, **settings | quiet)  # type: ignore[no-untyped-call, unused-ignore]

    hint = f"no checkpoint {repository!r}: not a local folder or file, not an embedded model"
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], tqdm_class=Bar
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"{hint}, and not a valid Hugging Face id") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository!r} is gated: ask for access on its page, then log in with hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hint}, and the Hugging Face hub knows none, or only a private one (then: hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repository!r} has no revision {revision!r} on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{hint}, and the Hugging Face hub can't be reached, nor is all of it in the hub's cache"
        ) from error
    except Exception as error:  # the HTTP library, and so its errors, changes with the hub's version
        raise CheckpointError(
            f"fetching {repository!r} from the Hugging Face hub broke off: {one_line(error)}; try again later"
        ) from error
