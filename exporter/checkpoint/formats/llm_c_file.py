"""llm.c's weights: a header of 256 numbers, then the arrays of GPT-2 one after another, those of all blocks together.

https://github.com/karpathy/llm.c/blob/master/train_gpt2.py (write_model)
"""

import math
import struct
from pathlib import Path

from gpt2onnx.errors import CheckpointError

from ..arrays import StoredArray, StridedArray, dense_strides, item_size
from .saved import SavedWeights

_HEADER = 1024  # bytes
_MAGIC, _OTHERS = 20240326, {20240327: "debug state", 20240328: "tokenizer"}
_MOST_LAYERS = 9_999
_DTYPES = {3: "float32", 5: "bfloat16"}  # by the file's version


def is_llm_c(path: Path) -> bool:
    """Whether a file begins with one of llm.c's magic numbers."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in {_MAGIC, *_OTHERS}
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error


def open_llm_c(path: Path) -> SavedWeights:
    """The arrays of a file by nanoGPT's names, without the rows that pad the vocabulary.

    Raises:
        CheckpointError: the file is truncated, of another version, or not of weights.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER:
        raise CheckpointError(f"{path} is truncated: fetch or save it again")
    magic, version, positions, vocabulary, layers, heads, width, rows = struct.unpack_from("<8i", header)
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is llm.c's {_OTHERS[magic]}: name the file with the weights")
    if version not in _DTYPES:
        raise CheckpointError(f"{path} has version {version} of llm.c's format, not 3 or 5: save it with a newer llm.c")
    if min(positions, vocabulary, layers, heads, width) < 1 or rows < vocabulary or layers > _MOST_LAYERS:
        raise CheckpointError(f"{path} is damaged: fetch or save it again")
    dtype, offset, arrays = _DTYPES[version], _HEADER, dict[str, StoredArray]()

    def add(name: str, *shape: int) -> None:
        nonlocal offset
        arrays[name] = StridedArray(path, name, shape, dtype, offset, dense_strides(shape))
        offset += math.prod(shape) * item_size(dtype)

    add("wte.weight", vocabulary, width)
    offset += (rows - vocabulary) * width * item_size(dtype)
    add("wpe.weight", positions, width)
    for name, *shape in (
        ("ln_1.weight", width), ("ln_1.bias", width), ("attn.c_attn.weight", 3 * width, width), ("attn.c_attn.bias", 3 * width),
        ("attn.c_proj.weight", width, width), ("attn.c_proj.bias", width), ("ln_2.weight", width), ("ln_2.bias", width),
        ("mlp.c_fc.weight", 4 * width, width), ("mlp.c_fc.bias", 4 * width), ("mlp.c_proj.weight", width, 4 * width),
        ("mlp.c_proj.bias", width),
    ):  # fmt: skip
        for layer in range(layers):
            add(f"h.{layer}.{name}", *shape)
    add("ln_f.weight", width)
    add("ln_f.bias", width)
    if offset != path.stat().st_size:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, not {offset:,}: fetch or save it again")
    return SavedWeights(path, arrays, {"config": {"n_head": heads}})
