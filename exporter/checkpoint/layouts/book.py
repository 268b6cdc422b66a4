"""GPTModel of Sebastian Raschka's book "Build a Large Language Model (From Scratch)".

https://github.com/rasbt/LLMs-from-scratch/blob/main/ch04/01_main-chapter-code/gpt.py
"""

from collections.abc import Mapping
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..arrays import StoredArray, ZeroArray
from ..weight import Weight
from .tensors import Tensors

NAME = "GPTModel's"
EMBEDDING = "tok_emb.weight"

_OUTSIDE = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
    "out_head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "norm1.scale": "ln_1.weight",
    "norm1.shift": "ln_1.bias",
    "att.out_proj.weight": "attn.c_proj.weight",
    "att.out_proj.bias": "attn.c_proj.bias",
    "norm2.scale": "ln_2.weight",
    "norm2.shift": "ln_2.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight",
    "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight",
    "ff.layers.2.bias": "mlp.c_proj.bias",
}
_QUERY_KEY_VALUE = ("att.W_query", "att.W_key", "att.W_value")


def recognises(tensors: Tensors) -> bool:
    """Whether it has the token embedding's name."""
    return EMBEDDING in tensors.arrays


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Transposes the matrices of the blocks, and joins those of queries, keys and values."""
    (vocabulary, width), layers = tensors.matrix_shape(EMBEDDING), tensors.count_blocks("trf_blocks.")
    inner = tensors.matrix_shape("trf_blocks.0.ff.layers.0.weight")[0]
    architecture = {
        "vocab_size": vocabulary,
        "n_positions": tensors.matrix_shape("pos_emb.weight")[0],
        "n_embd": width,
        "n_layer": layers,
        "n_inner": None if inner == 4 * width else inner,
        "activation_function": "gelu_new",
    }
    saved = [each["n_heads"] for each in tensors.settings.values() if isinstance(each, dict) and "n_heads" in each]
    if "out_head.bias" in tensors.arrays:
        raise CheckpointError(f"{tensors.path}: out_head has a bias, which GPT-2's output head can't have")
    weights = {ours: Weight((tensors.need(theirs),)) for theirs, ours in _OUTSIDE.items()}
    for layer in range(layers):
        theirs_of, ours_of = f"trf_blocks.{layer}.", f"h.{layer}."
        for theirs, ours in _IN_BLOCK.items():
            array = tensors.need(theirs_of + theirs)
            weights[ours_of + ours] = Weight((array,), transposed=len(array.shape) == 2)
        matrices = tuple(tensors.need(f"{theirs_of}{name}.weight") for name in _QUERY_KEY_VALUE)
        weights[f"{ours_of}attn.c_attn.weight"] = Weight(matrices, transposed=True)
        bias = f"{ours_of}attn.c_attn.bias"
        biases: tuple[StoredArray, ...] = (ZeroArray(tensors.path, bias, (3 * width,)),)  # built with qkv_bias=False
        if f"{theirs_of}att.W_query.bias" in tensors.arrays:
            biases = tuple(tensors.need(f"{theirs_of}{name}.bias") for name in _QUERY_KEY_VALUE)
        weights[bias] = Weight(biases)
    return tensors.config(architecture, saved[-1] if saved else None, config), weights
