"""Weight files of a checkpoint: finds them and reads the names of their arrays."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from gpt2onnx.errors import CheckpointError

from ...models.config import ADAPTER_CONFIG, read_json
from . import gguf_file, tensorflow_file
from .arrays import StoredArray, StridedArray, open_safetensors
from .torch_file import read_checkpoint_file
from .unpickle import Record

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", tensorflow_file.INDEX, gguf_file.SUFFIX)
# The first that exists is taken. safetensors holds nothing but arrays, and shows whether it is whole.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# First words of the files that transformers' Trainer and accelerate write beside the weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_STEP, _TRAINER_STATE = re.compile(r"checkpoint-(\d{1,9})"), "trainer_state.json"  # the Trainer's
_STATE_DICTS = ("model_state_dict", "state_dict", "model")


@dataclass(frozen=True)
class SavedWeights:
    """The content of a checkpoint's weight files.

    Attributes:
        path: the file, or the index of several.
        arrays: by their names in the files.
        settings: whatever else was saved in the same file.
        tokenizer_files: a tokenizer in the same file, as the files that other checkpoints have: name and content.
    """

    path: Path
    arrays: Mapping[str, StoredArray]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)


def open_weights(source: Path) -> SavedWeights:
    """Finds the weights of a checkpoint folder, or opens one file; reads no array.

    Raises:
        CheckpointError: there are none, or a file is missing, damaged, or refused.
    """
    path = source if source.is_file() else _weights_of(source)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    return _open_file(path)


def _weights_of(folder: Path) -> Path:
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is itself an adapter ({ADAPTER_CONFIG}), not a base: merge it with peft's merge_and_unload, and save that"
        )
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    if index := tensorflow_file.latest(folder):
        return index
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in SUFFIXES and not path.name.startswith(_NO_WEIGHTS) and path.is_file()
    ]
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(f"{folder} holds {', '.join(path.name for path in others)}: name the one to export")
    if steps := _saved_steps(folder):
        raise CheckpointError(
            f"{folder} has no weights itself, but {', '.join(path.name for path in steps)}: name one, such as {_best(steps)}"
        )
    raise CheckpointError(
        f"{folder} has no weights: none of {', '.join(_NAMES)}, nor another {' '.join(SUFFIXES)} file"
    )


def _saved_steps(folder: Path) -> list[Path]:
    """The checkpoints that transformers' Trainer saved in a folder, in the order of the training."""
    steps = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(steps)]


def _best(steps: list[Path]) -> Path:
    """The one that the training itself found best, else the last."""
    state = steps[-1] / _TRAINER_STATE
    named = read_json(state).get("best_model_checkpoint") if state.is_file() else None
    return next((path for path in steps if path.name == PurePath(str(named)).name), steps[-1])


def _open_index(path: Path) -> SavedWeights:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{path} has no weight_map: fetch or save the checkpoint again")
    shards = {}
    for name in sorted(set(places.values())):
        if PurePath(name).name != name or name in (".", "..") or "\\" in name:
            raise CheckpointError(f"{path} names a file outside the checkpoint's folder: {name}")
        shards[name] = _open_file(path.parent / name).arrays
    arrays = {}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{path.parent / shard} lacks tensor {name}, which {path.name} says it holds")
        arrays[name] = shards[shard][name]
    return SavedWeights(path, arrays)


def _open_file(path: Path) -> SavedWeights:
    if path.suffix == ".safetensors":
        return SavedWeights(path, open_safetensors(path))
    if path.suffix == gguf_file.SUFFIX:
        arrays, settings = gguf_file.open_gguf(path)
        return SavedWeights(path, arrays, settings, gguf_file.tokenizer_files(settings))
    if path.suffix == tensorflow_file.INDEX:
        # gpt-2-simple and the like copy OpenAI's settings beside their checkpoints.
        hparams = path.parent / "hparams.json"
        settings = {"hparams": read_json(hparams)} if hparams.is_file() else {}
        return SavedWeights(path, tensorflow_file.open_tensorflow(path), settings)
    content = read_checkpoint_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    # build-nanogpt saves its settings as an object.
    others = {key: value.fields if isinstance(value, Record) else value for key, value in content.items()}
    for name in _STATE_DICTS:
        if arrays := _arrays(content.get(name)):
            return SavedWeights(path, arrays, {key: value for key, value in others.items() if key != name})
    return SavedWeights(
        path, _arrays(content), {key: value for key, value in others.items() if isinstance(value, dict)}
    )


def _arrays(content: object) -> dict[str, StoredArray]:
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, StridedArray) and isinstance(name, str)}
