"""Hugging Face's GPT2LMHeadModel, with its config.json or as a bare state dict."""

from collections.abc import Mapping
from typing import Any

from ..weight import Weight
from .tensors import Tensors

EMBEDDING = "wte.weight"
# PyTorch's ONNX export transposes the output head and calls it onnx::MatMul_<number>.
_ONNX_HEAD = "onnx::MatMul_"
_POSITIONS = {"n_positions", "max_position_embeddings"}
_LAYERS = {"n_layer", "num_hidden_layers"}


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Takes the weights as they are; without a config.json, their shapes tell the architecture."""
    weights = {name: Weight((array,)) for name, array in tensors.arrays.items()}
    if head := next((name for name in weights if name.startswith(_ONNX_HEAD)), None):
        weights["lm_head.weight"] = Weight(weights.pop(head).parts, transposed=True)
    if config is None or not config.keys() & _LAYERS:
        width, inner = tensors.matrix_shape(EMBEDDING)[1], tensors.matrix_shape("h.0.mlp.c_fc.weight")[1]
        n_inner = None if inner == 4 * width else inner
        return tensors.config(EMBEDDING, "wpe.weight", "h.", None, config, n_inner=n_inner), weights
    # The first GPT-2s' config.json called it n_ctx; later ones have both.
    older = {"n_positions": config["n_ctx"]} if "n_ctx" in config and not config.keys() & _POSITIONS else {}
    return dict(config) | older, weights
