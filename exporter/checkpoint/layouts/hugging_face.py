"""Hugging Face's GPT2LMHeadModel, with its config.json."""

from collections.abc import Mapping
from typing import Any

from gpt2onnx.errors import CheckpointError

from ..weight import Weight
from .tensors import Tensors

NAME = "Hugging Face's"
EMBEDDING = "wte.weight"
_POSITIONS = {"n_positions", "max_position_embeddings"}


def recognises(tensors: Tensors) -> bool:
    """Whether it has the token embedding's name; nanoGPT's, which has the same, comes before."""
    return EMBEDDING in tensors.arrays


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Takes the weights as they are."""
    if config is None:
        raise CheckpointError(f"{tensors.path} has no config.json beside it: put the checkpoint's own there")
    # The first GPT-2s' config.json called it n_ctx; later ones have both.
    older = {"n_positions": config["n_ctx"]} if "n_ctx" in config and not config.keys() & _POSITIONS else {}
    return dict(config) | older, {name: Weight((array,)) for name, array in tensors.arrays.items()}
