"""Weight files of a checkpoint: finds them and reads the names of their arrays.

A new format is one file here with a function from a path to `SavedWeights`, and one entry in _READERS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ....models.config import read_json
from ..arrays import open_safetensors, with_aliases
from .dcp_file import INDEX as DCP_INDEX
from .dcp_file import open_dcp
from .flax_file import open_flax
from .folder import weights_of
from .gguf_file import open_gguf
from .hdf5_file import open_hdf5
from .llm_c_file import is_llm_c, open_llm_c
from .megatron_file import PARTS as MEGATRON_PARTS
from .megatron_file import open_megatron
from .onnx_file import open_onnx
from .saved import SavedWeights, beside, check_fetched
from .state_dict import open_state_dict
from .tensorflow_file import INDEX, open_tensorflow

__all__ = ["SHARD_INDEX", "SUFFIXES", "SavedWeights", "open_weights"]

SHARD_INDEX = ".index.json"  # ends the name of the file that tells which tensors are in which of several files


def open_weights(source: Path) -> SavedWeights:
    """Finds the weights of a checkpoint folder, or opens one file; reads no array.

    Raises:
        CheckpointError: there are none, or a file is missing, damaged, or refused.
        MissingExtraError: a package that reads the format isn't installed.
    """
    path = source if source.is_file() else weights_of(source, SUFFIXES)
    check_fetched(path)
    return _open_index(path) if path.name.endswith(SHARD_INDEX) else _open_file(path)


def _open_index(path: Path) -> SavedWeights:
    index = read_json(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{path} has no weight_map: fetch or save the checkpoint again")
    shards = {}
    for name in sorted(set(places.values())):
        shards[name] = _open_file(beside(path, name)).arrays
    arrays = {}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{path.parent / shard} lacks tensor {name}, which {path.name} says it holds")
        arrays[name] = shards[shard][name]
    return SavedWeights(path, with_aliases(arrays, index.get("metadata")))


def _open_file(path: Path) -> SavedWeights:
    # A shard's name may end in anything.
    if path.name == DCP_INDEX:
        return open_dcp(path)
    if path.name in MEGATRON_PARTS:
        return open_megatron(path)
    return _READERS.get(path.suffix, open_state_dict)(path)


def _open_bin(path: Path) -> SavedWeights:
    return open_llm_c(path) if path.is_file() and is_llm_c(path) else open_state_dict(path)


_READERS: Mapping[str, Callable[[Path], SavedWeights]] = {
    ".safetensors": lambda path: SavedWeights(path, open_safetensors(path)),
    ".bin": _open_bin,
    ".pt": open_state_dict,
    ".pth": open_state_dict,
    ".ckpt": open_state_dict,
    ".ot": open_state_dict,
    INDEX: open_tensorflow,
    ".gguf": open_gguf,
    ".onnx": open_onnx,
    ".h5": open_hdf5,
    ".msgpack": open_flax,
}
SUFFIXES = tuple(_READERS)
