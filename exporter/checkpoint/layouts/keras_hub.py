"""keras-hub's GPT2Backbone and GPT2CausalLM, as Keras 3 saves their weights: layers by their kind, weights by their number.

https://github.com/keras-team/keras-hub/blob/master/keras_hub/src/models/gpt2/gpt2_backbone.py
https://github.com/keras-team/keras-hub/blob/master/keras_hub/src/layers/modeling/transformer_decoder.py
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..arrays import ReshapedArray, StoredArray
from ..weight import Weight
from .tensors import Tensors

NAME = "keras-hub's"
EMBEDDING = "layers/reversible_embedding/vars/0"

_BEFORE = re.compile(r".*/(?=layers/)")  # GPT2CausalLM keeps its backbone among its layers
_BLOCK = re.compile(r"layers/transformer_decoder(?:_(\d{1,4}))?/.*")
_OUTSIDE = {
    EMBEDDING: "wte.weight",
    "layers/position_embedding/vars/0": "wpe.weight",
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


def recognises(tensors: Tensors) -> bool:
    """Whether it has the token embedding's name."""
    return any(name.endswith(EMBEDDING) for name in tensors.arrays)


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Renames the weights, joins queries, keys and values, and puts the numbers of all heads on one axis."""
    tensors = replace(tensors, arrays={_BEFORE.sub("", name): array for name, array in tensors.arrays.items()})
    (vocabulary, width), positions = (
        tensors.matrix_shape(EMBEDDING),
        tensors.matrix_shape("layers/position_embedding/vars/0")[0],
    )
    layers = 1 + max((int(match[1] or 0) for name in tensors.arrays if (match := _BLOCK.fullmatch(name))), default=-1)
    weights = {ours: Weight((tensors.need(theirs),)) for theirs, ours in _OUTSIDE.items()}
    heads, inner = None, 4 * width
    for layer in range(layers):
        block = "layers/transformer_decoder" + (f"_{layer}/" if layer else "/")
        for ours, theirs in _IN_BLOCK.items():
            for number, kind in enumerate(("weight", "bias")):
                parts = tuple(tensors.need(f"{block}{name}/vars/{number}") for name in theirs)
                if ours == "attn.c_attn":
                    heads = parts[0].shape[-2] if len(parts[0].shape) > 1 else None
                inner = parts[0].shape[-1] if (ours, kind) == ("mlp.c_fc", "bias") and parts[0].shape else inner
                weights[f"h.{layer}.{ours}.{kind}"] = Weight(tuple(_flat(ours, kind, part, width) for part in parts))
    architecture = {
        "vocab_size": vocabulary,
        "n_positions": positions,
        "n_embd": width,
        "n_layer": layers,
        "n_inner": inner,
        "activation_function": "gelu_new",
    }
    # A preset's own config.json tells nothing that the shapes don't.
    return tensors.config(architecture, heads, None if "class_name" in (config or {}) else config), weights


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
