"""What reaches a matrix, and a network's weights arranged for rounding that. Knows no runtime."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..models.config import GPT2Config

Tensor = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Inputs:
    """Of a matrix [out, in]: its input's mean, float32 [in], and covariance, float32 [in, in]."""

    mean: npt.NDArray[np.float32]
    covariance: npt.NDArray[np.float32]


def centre(config: GPT2Config, tensor: Tensor, inputs: Mapping[str, Inputs]) -> tuple[Tensor, dict[str, Inputs]]:
    """The same network with inputs of mean zero, wherever a bias before the matrix allows it.

    What is taken off the bias of a norm, or of the values that attention averages, comes back through the bias of
    the matrix behind it.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name.
        inputs: from `observe`.

    Returns:
        The network's weights by name, and its matrices' inputs.
    """

    def mean(layer: str) -> npt.NDArray[np.float32] | float:
        return inputs[layer].mean if layer in inputs else 0.0

    def through(layer: str) -> npt.NDArray[np.float32] | float:
        return inputs[layer].mean @ tensor(f"{layer}.weight") if layer in inputs else 0.0

    def centred(name: str) -> npt.NDArray[np.float32]:
        array = tensor(name)
        block, _, part = name.rpartition(".bias")[0].partition(".")[2].partition(".")
        layer = f"h.{block}."
        match part:
            case "ln_1":
                return array - mean(f"{layer}attn.c_attn")
            case "attn.c_attn":
                array = array + through(f"{layer}attn.c_attn")
                array[2 * config.n_embd :] -= mean(f"{layer}attn.c_proj")  # the values' part
                return array
            case "attn.c_proj":
                return array + through(f"{layer}attn.c_proj")
            case "ln_2":
                return array - mean(f"{layer}mlp.c_fc")
            case "mlp.c_fc":
                return array + through(f"{layer}mlp.c_fc")
        return array

    after = {
        name: each if name.endswith(".mlp.c_proj") else Inputs(np.zeros_like(each.mean), each.covariance)
        for name, each in inputs.items()
    }
    return centred, after
