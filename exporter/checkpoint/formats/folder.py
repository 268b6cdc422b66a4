"""Which file of a checkpoint's folder holds the weights."""

import re
from pathlib import Path, PurePath

from gpt2onnx.errors import CheckpointError

from ....models.bundle import MANIFEST
from ....models.config import ADAPTER_CONFIG, read_json
from .dcp_file import pieces_of
from .megatron_file import megatron_in
from .tensorflow_file import latest

# The first that exists is taken. safetensors holds nothing but arrays, and shows whether it is whole.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# transformers 4's, which people kept beside PyTorch's.
_OTHERS = ("tf_model.h5", "flax_model.msgpack")
# Made of the others, by optimum and transformers.js; each name also in the folder `onnx`.
_GRAPH, _GRAPHS = ".onnx", ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx")
# First words of the files that transformers' Trainer, accelerate and Megatron-LM write.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "model_optim_rng")
_STEP, _TRAINER_STATE = re.compile(r"checkpoint-(\d{1,9})"), "trainer_state.json"  # the Trainer's

# DeepSpeed's: the file that names the latest step, and the ending of a piece of stage 3's.
_DEEPSPEED_LATEST, _ZERO_3, _LONGEST_NAME = "latest", "zero_pp_rank_0_mp_rank_00_model_states.pt", 255


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
    if states := _deepspeed(folder) or pieces_of(folder) or megatron_in(folder):
        return states
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in suffixes
        and path.suffix != _GRAPH
        and not path.name.startswith(_NO_WEIGHTS)
        and path.is_file()
    ]
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(f"{folder} holds {', '.join(path.name for path in others)}: name the one to export")
    for name in _GRAPHS:
        for place in (folder, folder / "onnx"):
            if (place / name).is_file():
                return place / name
    if steps := _saved_steps(folder):
        raise CheckpointError(
            f"{folder} has no weights itself, but {', '.join(path.name for path in steps)}: name one, such as {_best(steps)}"
        )
    raise CheckpointError(
        f"{folder} has no weights: none of {', '.join(_NAMES)}, nor another {' '.join(suffixes)} file"
    )


def _deepspeed(folder: Path) -> Path | None:
    """The file in which DeepSpeed's stages 0 to 2 keep the network; None if the folder isn't DeepSpeed's.

    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/engine.py (save_checkpoint)
    """
    latest_step = folder / _DEEPSPEED_LATEST
    if latest_step.is_file():
        with latest_step.open("rb") as file:
            step = folder / PurePath(file.read(_LONGEST_NAME).decode("utf-8", "ignore").strip()).name
    else:
        step = folder
    if not step.is_dir():
        return None
    parts = sorted(step.glob("mp_rank_*_model_states.pt"))
    if len(parts) > 1:
        raise CheckpointError(
            f"{step} has the parts of {len(parts)} devices: run DeepSpeed's ds_to_universal.py, or train on one"
        )
    if not parts and any(step.glob(f"*{_ZERO_3}")):
        raise CheckpointError(
            f"{step} has the weights in DeepSpeed's pieces: run python zero_to_fp32.py . weights, in the folder above it, and export that"
        )
    return parts[0] if parts else None


def _saved_steps(folder: Path) -> list[Path]:
    """The checkpoints that transformers' Trainer saved in a folder, in the order of the training."""
    steps = [
        (int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(steps)]


def _best(steps: list[Path]) -> Path:
    """The one that the training itself found best, else the last."""
    try:
        named = read_json(steps[-1] / _TRAINER_STATE).get("best_model_checkpoint")
    except CheckpointError:  # missing, damaged or large: it serves a hint only
        return steps[-1]
    return next((path for path in steps if path.name == PurePath(str(named)).name), steps[-1])
