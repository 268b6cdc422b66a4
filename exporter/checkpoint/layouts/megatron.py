"""Megatron-LM's GPT-2, of its own transformer (not that of Megatron Core).

Queries, keys and values are rows of one matrix, in an order that depends on the version of the checkpoint.
https://github.com/NVIDIA/Megatron-LM/blob/v2.4/megatron/checkpointing.py (fix_query_key_value_ordering)
https://github.com/huggingface/transformers/blob/v4.46.3/src/transformers/models/megatron_gpt2/convert_megatron_gpt2_checkpoint.py
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..arrays import DerivedArray, StoredArray
from ..weight import Weight
from .tensors import GPT2_VOCABULARY, Tensors

EMBEDDING = "language_model.embedding.word_embeddings.weight"

_POSITIONS, _HEAD = "language_model.embedding.position_embeddings.weight", "language_model.output_layer.weight"
_ENCODER, _LAYERS = "language_model.encoder.", "language_model.encoder.layers."
# What other versions write for these names.
_SPELLINGS = {"language_model.transformer.": _ENCODER, ".attention.": ".self_attention.", "_norm.": "_layernorm."}
_IN_BLOCK = {
    "input_layernorm": "ln_1",
    "self_attention.query_key_value": "attn.c_attn",
    "self_attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}
_DIVISOR = 128  # the embedding's rows are a multiple of the divisor in each part
# Settings with which a network computes something else with the same tensors.
_FOREIGN = ("apply_residual_connection_post_layernorm", "apply_layernorm_1p", "swiglu", "squared_relu")


@dataclass(frozen=True)
class ChangedArray(DerivedArray):
    """An array, read as a function of a stored one."""

    change: Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]

    def read(self) -> npt.NDArray[np.generic]:
        return self.change(self.stored.read())


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Transposes the matrices of the blocks, orders queries, keys and values, and leaves out the rows that pad the vocabulary."""
    tensors = replace(tensors, arrays={_spelled(name): array for name, array in tensors.arrays.items()})
    told, parts = (tensors.settings.get(name) for name in ("args", "parts"))
    if not isinstance(told, dict) or not isinstance(parts, int) or parts < 1:
        raise CheckpointError(
            f"{tensors.path} has Megatron-LM's names without its settings, which tell the order of queries, keys and values: export the"
            " folder that Megatron-LM saved"
        )
    if foreign := next((name for name in _FOREIGN if told.get(name)), None):
        raise CheckpointError(f"{tensors.path}: {foreign} makes it no GPT-2")
    full = tensors.config(
        EMBEDDING,
        _POSITIONS,
        _LAYERS,
        told.get("num_attention_heads"),
        config,
        vocab_size=_vocabulary(tensors.matrix_shape(EMBEDDING)[0], parts, told),
        n_inner=tensors.matrix_shape(f"{_LAYERS}0.mlp.dense_h_to_4h.weight")[0],
        activation_function=_activation(told),
        layer_norm_epsilon=told.get("layernorm_epsilon", 1e-5),
    )
    names = {EMBEDDING: "wte.weight", _POSITIONS: "wpe.weight", _HEAD: "lm_head.weight"}
    for kind in ("weight", "bias"):
        names[f"{_ENCODER}final_layernorm.{kind}"] = f"ln_f.{kind}"
        for layer in range(tensors.count_blocks(_LAYERS)):
            names |= {f"{_LAYERS}{layer}.{its}.{kind}": f"h.{layer}.{ours}.{kind}" for its, ours in _IN_BLOCK.items()}
    weights = {}
    for name, stored in tensors.arrays.items():
        ours, array = names.get(name, name), stored
        if name in (EMBEDDING, _HEAD):
            array = _tokens(stored, full["vocab_size"])
        elif ".attn.c_attn." in ours:
            array = _ordered(tensors, stored, full["n_head"])
        weights[ours] = Weight((array,), transposed=ours.startswith("h.") and len(stored.shape) > 1)
    return full, weights


def _spelled(name: str) -> str:
    for theirs, ours in _SPELLINGS.items():
        name = name.replace(theirs, ours)
    return name


def _tokens(array: StoredArray, vocabulary: object) -> StoredArray:
    """The rows of tokens."""
    if not isinstance(vocabulary, int) or not array.shape or not 0 < vocabulary < array.shape[0]:
        return array
    return ChangedArray(array, (vocabulary, *array.shape[1:]), lambda whole: whole[:vocabulary])


def _ordered(tensors: Tensors, array: StoredArray, heads: object) -> StoredArray:
    """Queries, keys and values one after another, in each of them one head after another."""
    version, parts = tensors.settings.get("checkpoint_version"), tensors.settings["parts"]
    if not isinstance(heads, int) or heads < 1 or heads % parts or not array.shape or array.shape[0] % (3 * heads):
        raise CheckpointError(
            f"{tensors.path}: tensor {array.name} has shape {list(array.shape)}, which {shown(heads)} heads in {parts} parts can't have"
        )
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    if version in (None, 0):
        lengths, order = (parts, 3, heads // parts, -1), (1, 0, 2, 3)
    elif version == 1:
        lengths, order = (heads, -1, 3), (2, 0, 1)
    elif isinstance(version, int | float) and version >= 2:
        lengths, order = (heads, 3, -1), (1, 0, 2)
    else:
        raise CheckpointError(f"{tensors.path}: Megatron-LM has no checkpoint_version {shown(version)}: save it again")

    def change(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        rest = stored.shape[1:]
        split = stored.reshape(*lengths, *rest)
        return split.transpose(*order, *range(len(order), split.ndim)).reshape(-1, *rest)

    return ChangedArray(array, array.shape, change)


def _vocabulary(rows: int, parts: int, told: Mapping[str, Any]) -> int:
    """Rows of the embedding that are tokens, as far as the training's settings, or GPT-2's own number, tell."""
    for name in ("orig_vocab_size", "vocab_size"):
        if isinstance(size := told.get(name), int) and 0 < size <= rows:
            return size
    divisor = told.get("make_vocab_size_divisible_by", _DIVISOR)
    step = parts * divisor if isinstance(divisor, int) and divisor > 0 else 1
    return GPT2_VOCABULARY if rows == -(-GPT2_VOCABULARY // step) * step else rows


def _activation(told: Mapping[str, Any]) -> str:
    """As transformers' converter takes it."""
    if not told or told.get("openai_gelu"):
        return "gelu_new"
    return "gelu_fast" if told.get("bias_gelu_fusion") else "gelu"
