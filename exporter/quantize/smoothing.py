"""A network's weights arranged so that its matrices' inputs have fewer outliers. Knows no runtime.

What an input is divided by, channel by channel, its matrix is multiplied by: the network stays the same, while one
scale for a whole input then suits more of its channels. That is SmoothQuant (https://arxiv.org/abs/2211.10438).
"""

from collections.abc import Mapping
from functools import cache

import numpy as np
import numpy.typing as npt

from ...models.config import GPT2Config
from .inputs import Inputs, Tensor

# How much of a channel's outliers moves into the matrix, as an exponent.
_STRENGTH = 0.6
_LEAST_SHARE = np.float32(0.01)


def smooth(config: GPT2Config, tensor: Tensor, inputs: Mapping[str, Inputs]) -> Tensor:
    """The same network with smoother inputs, wherever a layer before the matrix can divide by the factors.

    That is so behind a norm, and behind the values that attention averages; not behind the activation function.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name.
        inputs: from `calibrate.observe`.

    Returns:
        The network's weights by name.
    """

    @cache
    def factors(layer: str) -> npt.NDArray[np.float32] | float:
        if layer not in inputs or layer.endswith(".mlp.c_proj"):
            return 1.0
        return _factors(inputs[layer].sample, tensor(f"{layer}.weight"))

    def smoothed(name: str) -> npt.NDArray[np.float32]:
        array = tensor(name)
        block, _, part = name.partition("h.")[2].partition(".")
        layer = f"h.{block}."
        match part:
            case "ln_1.weight" | "ln_1.bias":
                return array / factors(f"{layer}attn.c_attn")
            case "attn.c_attn.weight":
                array = (array.T * factors(f"{layer}attn.c_attn")).T
                array[:, 2 * config.n_embd :] /= factors(f"{layer}attn.c_proj")  # the values' part
            case "attn.c_attn.bias":
                array = array.copy()
                array[2 * config.n_embd :] /= factors(f"{layer}attn.c_proj")
            case "attn.c_proj.weight":
                return (array.T * factors(f"{layer}attn.c_proj")).T
            case "ln_2.weight" | "ln_2.bias":
                return array / factors(f"{layer}mlp.c_fc")
            case "mlp.c_fc.weight":
                return (array.T * factors(f"{layer}mlp.c_fc")).T
        return array

    return smoothed


def _factors(sample: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of the channels of a matrix [in, out]; about 1 on average."""
    ours, theirs = np.abs(sample).max(0), np.abs(weight).max(1)
    # What hardly varies in the sample may do so elsewhere.
    ours = np.maximum(ours, _LEAST_SHARE * ours.max())
    usable = (ours > 0) & (theirs > 0)
    logarithm = np.zeros(len(weight), np.float32)
    logarithm[usable] = _STRENGTH * np.log(ours[usable]) - (1 - _STRENGTH) * np.log(theirs[usable])
    if usable.any():
        logarithm[usable] -= logarithm[usable].mean()
    return np.exp(logarithm)
