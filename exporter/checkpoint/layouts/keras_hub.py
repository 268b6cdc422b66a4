"""keras-hub's GPT2Backbone and GPT2CausalLM, as Keras 3 saves their weights: layers by their kind, weights by their number.

https://github.com/keras-team/keras-hub/blob/master/keras_hub/src/models/gpt2/gpt2_backbone.py
https://github.com/keras-team/keras-hub/blob/master/keras_hub/src/layers/modeling/transformer_decoder.py
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..arrays import ReshapedArray, StoredArray
from ..weight import Weight
from .tensors import Tensors

EMBEDDING = "layers/reversible_embedding/vars/0"

_POSITIONS, _BLOCKS = "layers/position_embedding/vars/0", "layers/transformer_decoder"
_BLOCK = re.compile(rf"{_BLOCKS}(?:_(\d{{1,4}}))?/.*")
_OUTSIDE = {
    EMBEDDING: "wte.weight",
    _POSITIONS: "wpe.weight",
    "layers/layer_normalization/vars/0": "ln_f.weight",
    "layers/layer_normalization/vars/1": "ln_f.bias",
}
_ATTENTION = "_self_attention_layer/"
_IN_BLOCK = {
    "ln_1": ("_self_attention_layer_norm",),
    "attn.c_attn": tuple(f"{_ATTENTION}{name}_dense" for name in ("query", "key", "value")),
    "attn.c_proj": (f"{_ATTENTION}output_dense",),
    "ln_2": ("_feedforward_layer_norm",),
    "mlp.c_fc": ("_feedforward_intermediate_dense",),
    "mlp.c_proj": ("_feedforward_output_dense",),
}


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Renames the weights, joins queries, keys and values, and puts the numbers of all heads on one axis."""
    width = tensors.matrix_shape(EMBEDDING)[1]
    layers = 1 + max((int(match[1] or 0) for name in tensors.arrays if (match := _BLOCK.fullmatch(name))), default=-1)
    weights = {ours: Weight((tensors.need(theirs),)) for theirs, ours in _OUTSIDE.items()}
    heads, inner = None, 4 * width
    for layer in range(layers):
        block = _BLOCKS + (f"_{layer}/" if layer else "/")
        for ours, theirs in _IN_BLOCK.items():
            for number, kind in enumerate(("weight", "bias")):
                parts = tuple(tensors.need(f"{block}{name}/vars/{number}") for name in theirs)
                if ours == "attn.c_attn":
                    heads = parts[0].shape[-2] if len(parts[0].shape) > 1 else None
                inner = parts[0].shape[-1] if (ours, kind) == ("mlp.c_fc", "bias") and parts[0].shape else inner
                weights[f"h.{layer}.{ours}.{kind}"] = Weight(tuple(_flat(ours, kind, part, width) for part in parts))
    # A preset's own config.json tells nothing that the shapes don't.
    config = None if "class_name" in (config or {}) else config
    full = tensors.config(EMBEDDING, _POSITIONS, _BLOCKS, heads, config, n_layer=layers, n_inner=inner)
    return full, weights


def _flat(ours: str, kind: str, array: StoredArray, width: int) -> StoredArray:
    """The array of an attention's layer with the axes of heads and their numbers as one."""
    if not ours.startswith("attn."):
        return array
    axes = {("attn.c_attn", "weight"): 3, ("attn.c_attn", "bias"): 2, ("attn.c_proj", "weight"): 3}.get((ours, kind), 1)
    shape = (width, width) if kind == "weight" else (width,)
    if len(array.shape) != axes or math.prod(array.shape) != math.prod(shape):
        raise CheckpointError(
            f"{array.path}: tensor {array.name} has shape {list(array.shape)}, which doesn't fit a width of {width}"
        )
    return ReshapedArray(array, shape)
