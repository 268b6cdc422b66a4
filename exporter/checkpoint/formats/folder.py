"""Which file of a checkpoint's folder holds the weights."""

import re
from pathlib import Path, PurePath

from gpt2onnx.errors import CheckpointError

from ....models.bundle import MANIFEST
from ....models.config import ADAPTER_CONFIG, read_json
from .tensorflow_file import latest

# The first that exists is taken. safetensors holds nothing but arrays, and shows whether it is whole.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# transformers 4's, which people kept beside PyTorch's.
_OTHERS = ("tf_model.h5", "flax_model.msgpack")
# Made of the others, by optimum and transformers.js; each name also in the folder `onnx`.
_GRAPHS = ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx")
# First words of the files that transformers' Trainer and accelerate write beside the weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_STEP, _TRAINER_STATE = re.compile(r"checkpoint-(\d{1,9})"), "trainer_state.json"  # the Trainer's


def weights_of(folder: Path, suffixes: tuple[str, ...]) -> Path:
    """The file with the weights, or the index of several.

    Args:
        folder: of a checkpoint.
        suffixes: of all files that can be read.

    Raises:
        CheckpointError: there is none, or none that is to be preferred.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is itself an adapter ({ADAPTER_CONFIG}), not a base: merge it with peft's merge_and_unload, and save that"
        )
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    if index := latest(folder):
        return index
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is a bundle itself: export the checkpoint that it was made from")
    for name in _OTHERS:
        if (folder / name).is_file():
            return folder / name
    for name in _GRAPHS:
        for place in (folder, folder / "onnx"):
            if (place / name).is_file():
                return place / name
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in suffixes and not path.name.startswith(_NO_WEIGHTS) and path.is_file()
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
        f"{folder} has no weights: none of {', '.join(_NAMES)}, nor another {' '.join(suffixes)} file"
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
