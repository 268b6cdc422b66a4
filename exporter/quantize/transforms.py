"""Transforms of a network's weights that leave its function as it is and suit rounding better. Know no runtime."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

from ...models.config import GPT2Config
from .activations import InputStats
from .layers import Tensor

# Share of a channel's outliers that moves from the input into the matrix, as an exponent.
_STRENGTH = 0.6
# Smallest range of a channel, as a share of the largest: a channel that hardly varies in the sample may vary elsewhere.
_MIN_RANGE_SHARE = np.float32(0.01)


def centre(
    config: GPT2Config, tensor: Tensor, inputs: Mapping[str, InputStats]
) -> tuple[Tensor, dict[str, InputStats]]:
    """Moves the mean of each layer's inputs into biases, where a bias before the matrix allows it.

    The runtime rounds inputs to 8 bits, and a large mean would take most of that range. A mean that
    leaves the bias of a norm, or of the values that attention averages, comes back in the bias of the layer behind.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name.
        inputs: activation statistics by layer; the inputs of layers without any stay as they are.

    Returns:
        The weights by name, and the statistics after the transform.
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
        name: each
        if name.endswith(".mlp.c_proj")
        else replace(each, mean=np.zeros_like(each.mean), sample=each.sample - each.mean)
        for name, each in inputs.items()
    }
    return centred, after


def smooth(config: GPT2Config, tensor: Tensor, inputs: Mapping[str, InputStats]) -> Tensor:
    """Moves outliers of single channels from layers' inputs into their matrices, where a layer before can divide by them.

    The input is divided by a factor for each channel and the matrix multiplied by it. That is SmoothQuant
    (https://arxiv.org/abs/2211.10438), behind norms and behind the values that attention averages, not behind the
    activation function.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name.
        inputs: activation statistics by layer.

    Returns:
        The weights by name.
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
    """The factors of a matrix' channels, float32 [in], about 1 on average, for its [in, out] weight."""
    ours, theirs = np.abs(sample).max(0), np.abs(weight).max(1)
    ours = np.maximum(ours, _MIN_RANGE_SHARE * ours.max())
    usable = (ours > 0) & (theirs > 0)
    logarithm = np.zeros(len(weight), np.float32)
    logarithm[usable] = _STRENGTH * np.log(ours[usable]) - (1 - _STRENGTH) * np.log(theirs[usable])
    if usable.any():
        logarithm[usable] -= logarithm[usable].mean()
    return np.exp(logarithm)
