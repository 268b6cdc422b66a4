"""The state dict in a file of PyTorch, alone or where a training script puts it beside its optimizer."""

from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..arrays import StoredArray, StridedArray
from .saved import SavedWeights
from .torch_file import read_checkpoint_file

_STATE_DICTS = ("model_state_dict", "state_dict", "model", "module")  # the last is DeepSpeed's
_WEIGHT = ".weight"  # ending of names in every network of PyTorch


def open_state_dict(path: Path) -> SavedWeights:
    """The arrays of a state dict, and the settings beside it.

    Raises:
        CheckpointError: the file is missing, damaged or refused, or it isn't clear which of its mappings is the network.
    """
    content = read_checkpoint_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    arrays, inner = _arrays(content), {key: held for key, value in content.items() if (held := _arrays(value))}
    name = next((name for name in _STATE_DICTS if name in inner), None)
    if name is None and not _is_network(arrays):
        networks = [key for key, held in inner.items() if _is_network(held)]
        if len(networks) > 1:
            raise CheckpointError(f"{path} holds several networks, {shown(networks)}: save one alone")
        name = next(iter(networks), None)
    if name is not None:
        return SavedWeights(path, inner[name], {key: value for key, value in content.items() if key != name})
    if content and not arrays:
        raise CheckpointError(f"{path} has no state dict under its keys {shown(list(content))}: save it under 'model'")
    return SavedWeights(path, arrays, {key: value for key, value in content.items() if isinstance(value, dict)})


def _is_network(arrays: dict[str, StoredArray]) -> bool:
    return any(name.endswith(_WEIGHT) for name in arrays)


def _arrays(content: object) -> dict[str, StoredArray]:
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, StridedArray) and isinstance(name, str)}
