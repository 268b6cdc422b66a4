"""The state dict in a file of PyTorch, alone or where a training script puts it beside its optimizer."""

from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ..arrays import StoredArray, StridedArray
from .saved import SavedWeights
from .torch_file import read_checkpoint_file
from .unpickle import Record

_STATE_DICTS = ("model_state_dict", "state_dict", "model", "module")  # the last is DeepSpeed's


def open_state_dict(path: Path) -> SavedWeights:
    """The arrays of a state dict, and the settings beside it.

    Raises:
        CheckpointError: the file is missing, damaged or refused.
    """
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
