"""Transforms of a network's weights that leave its function as it is and suit rounding better. Know no runtime."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from ...models.config import GPT2Config
from ..graph.blocks import Array
from .activations import InputStats
from .layers import Scheme, Tensor

# Gives the root mean square of each channel of a layer's input, float32 [in], by the layer's name; None where it isn't known.
Ranges: TypeAlias = Callable[[str], Array | None]

# Share of a channel's importance that moves from the input into the matrix, as an exponent, by the matrix' bits. Inputs always
# have 8: with as many for the weights both are equally rough, with 4 the weights have to be the smoother ones.
_STRENGTH = {8: 0.5, 4: 0.25}
# As a share of the largest: a channel that hardly varies in the sample may vary elsewhere.
_MIN_IMPORTANCE = np.float32(0.01)


def centre(
    config: GPT2Config, tensor: Tensor, inputs: Mapping[str, InputStats]
) -> tuple[Tensor, dict[str, InputStats]]:
    """Moves the mean of each layer's inputs into biases, where a bias before the matrix allows it.

    The runtime rounds inputs to 8 bits, and a large mean would take most of that range. A mean that
    leaves the bias of a norm, or of the values that attention averages, comes back in the bias of the layer behind.

    Args:
        inputs: activation statistics by layer; the inputs of layers without any stay as they are.

    Returns:
        The weights by name, and the statistics after the transform.
    """

    def mean(layer: str) -> Array | float:
        return inputs[layer].mean if layer in inputs else 0.0

    def through(layer: str) -> Array | float:
        return inputs[layer].mean @ tensor(f"{layer}.weight") if layer in inputs else 0.0

    def centred(name: str) -> Array:
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
        if name.endswith((".mlp.c_proj", "lm_head"))
        else replace(each, mean=np.zeros_like(each.mean), sample=each.sample - each.mean)
        for name, each in inputs.items()
    }
    return centred, after


class Smoothing:
    """The same network with outliers of single channels moved from layers' inputs into their matrices.

    The input is divided by a factor for each channel and the matrix multiplied by it, where the layer before can divide:
    behind norms and behind the values that attention averages, not behind the activation function. That is SmoothQuant
    (https://arxiv.org/abs/2211.10438) without its factor for the output's scale. To scale channels of a network, and to divide
    the weights behind them, doesn't change the result.

    Args:
        scheme: how matrices are quantised; the inputs of those that aren't stay as they are.
        ranges: gives the range of each channel of a layer's input, float32 [in], by the layer's name; None: it stays as it is.
    """

    def __init__(self, config: GPT2Config, tensor: Tensor, scheme: Scheme, ranges: Ranges) -> None:
        self._config, self._tensor, self._scheme, self._ranges = config, tensor, scheme, ranges
        self._factors: dict[str, Array] = {}

    def tensor(self, name: str) -> Array:
        """A weight by its checkpoint name."""
        array = self._tensor(name)
        block, _, part = name.partition("h.")[2].partition(".")
        layer = f"h.{block}."
        match part:
            case "ln_1.weight" | "ln_1.bias":
                return array / self._of_inputs(f"{layer}attn.c_attn")
            case "ln_2.weight" | "ln_2.bias":
                return array / self._of_inputs(f"{layer}mlp.c_fc")
            case "attn.c_attn.bias":
                return array / self._of_outputs(f"{layer}attn.c_attn")
            case "attn.c_attn.weight":
                array = array / self._of_outputs(f"{layer}attn.c_attn")
                array *= self._of_inputs(f"{layer}attn.c_attn")[:, None]
            case "attn.c_proj.weight" | "mlp.c_fc.weight":
                return array * self._of_inputs(layer + part.removesuffix(".weight"))[:, None]
        return array

    def gradients(self, moments: Mapping[str, Array]) -> dict[str, Array]:
        """Second moments of gradients by layers' outputs, float32 [out, out], by layer, in the smoothed network."""
        return {
            layer: self._of_outputs(layer)[:, None] * moment * self._of_outputs(layer)
            for layer, moment in moments.items()
        }

    def _of_inputs(self, layer: str) -> Array:
        """Divisors of a layer's inputs, float32 [in] or [1]."""
        if layer not in self._factors:
            blocks, ranges = self._scheme(layer), self._ranges(layer)
            self._factors[layer] = (
                np.ones(1, np.float32)
                if blocks is None or ranges is None
                else _factors(ranges, self._tensor(f"{layer}.weight"), _STRENGTH[blocks.bits])
            )
        return self._factors[layer]

    def _of_outputs(self, layer: str) -> Array:
        """Divisors of a layer's outputs, float32 [out] or [1]: the values are inputs of attention's projection."""
        if not layer.endswith(".c_attn"):
            return np.ones(1, np.float32)
        factors, width = self._of_inputs(layer.replace("c_attn", "c_proj")), self._config.n_embd
        return np.concatenate([np.ones(2 * width, np.float32), np.broadcast_to(factors, width)])


def range_on(inputs: Mapping[str, InputStats], layer: str) -> Array | None:
    """The range of a layer's inputs in a sample, float32 [in]; None without a sample."""
    return np.sqrt(np.square(inputs[layer].sample).mean(0)) if layer in inputs else None


def range_by_weights(config: GPT2Config, tensor: Tensor, layer: str, *, values: bool = True) -> Array | None:
    """The range of the inputs of c_attn, attention's c_proj or c_fc, float32 [in], without data.

    Channels are taken for independent of each other, and what a norm multiplies by its weight for numbers of variance 1.

    Args:
        values: False gives None for c_proj, whose inputs are averages of values.
    """
    block, _, matrix = layer.removeprefix("h.").partition(".")
    norm = f"h.{block}.ln_2" if matrix == "mlp.c_fc" else f"h.{block}.ln_1"
    weight, bias = tensor(f"{norm}.weight"), tensor(f"{norm}.bias")
    if matrix == "attn.c_proj":
        if not values:
            return None
        of_values, shift = (
            tensor(f"h.{block}.attn.c_attn.{each}")[..., 2 * config.n_embd :] for each in ("weight", "bias")
        )
        weight, bias = np.sqrt(np.square(weight) @ np.square(of_values)), bias @ of_values + shift
    return np.hypot(weight, bias)


def _factors(ranges: Array, weight: Array, strength: float) -> Array:
    """The factors of an input's channels, float32 [in], for the [in, out] weight behind it.

    A channel's importance is its largest share of any output, which no scaling of the channel changes. Divided by its factor,
    the input ranges over importance^(1 - strength), and the largest share of weight times factor is importance^strength.
    """
    with np.errstate(all="ignore"):
        sizes = np.sqrt(np.square(ranges) @ np.square(weight))
        shares = (np.abs(weight) / np.where(sizes > 0, sizes, 1)).max(1)
        importance = ranges * shares
        importance = np.maximum(importance, _MIN_IMPORTANCE * importance.max())
        # Of a channel without weights, too, the input must not be larger than others.
        shares = np.where(shares > 0, shares, importance / np.where(ranges > 0, ranges, 1))
        factors: Array = importance**strength / shares
    usable = np.isfinite(factors).all() and (factors > 0).all()
    return factors if usable else np.ones_like(factors)
