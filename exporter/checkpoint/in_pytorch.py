"""A checkpoint as transformers' GPT2LMHeadModel. Imports torch and transformers only when it is asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

# The other attentions of transformers 4 leave out scale_attn_by_inverse_layer_idx and scale_attn_weights.
ATTENTION = "eager"


def build(checkpoint: Checkpoint) -> "GPT2LMHeadModel":
    """The network with the checkpoint's weights, float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {**checkpoint.raw_config, "tie_word_embeddings": checkpoint.tied, "attn_implementation": ATTENTION}
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    fill(model, checkpoint.tensor)
    return model


def fill(model: "GPT2LMHeadModel", tensor: Callable[[str], npt.NDArray[np.float32]]) -> None:
    """Replaces all weights of a network by those that `tensor` gives by their checkpoint names."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head isn't among them
            weight = np.require(tensor(name.removeprefix("transformer.")), requirements=["C", "W"])
            parameter.copy_(torch.from_numpy(weight))
