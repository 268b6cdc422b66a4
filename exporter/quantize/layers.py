"""Quantised layers: a network's weights as the graph takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ...models.precision import Blocks
from ..graph.blocks import Array, in_axis, quantize
from ..graph.fused import Weights
from ..graph.input_rounding import PerTensor
from ..graph.operators import Weight

# Gives a float32 weight by its checkpoint name.
Tensor: TypeAlias = Callable[[str], Array]
# Quantisation scheme: the blocks of a layer's matrix, by the layer's name; None: it isn't quantised.
Scheme: TypeAlias = Callable[[str], Blocks | None]


@dataclass(frozen=True)
class QuantizedLayers:
    """A network whose layers are quantised.

    Attributes:
        weights: gives every weight by its checkpoint name.
        per_tensor: how the second graph quantises the input of the layers that it changes, by their names.
    """

    weights: Weights
    per_tensor: dict[str, PerTensor]


def to_nearest(tensor: Tensor, scheme: Scheme) -> QuantizedLayers:
    """Rounds each matrix to nearest, when it is asked for: one weight at a time is in memory."""

    def weight(name: str) -> Weight:
        array = tensor(name)
        blocks = None if array.ndim == 1 or name == "wpe.weight" else scheme(name.removesuffix(".weight"))
        return array if blocks is None else quantize(array if in_axis(name) == 1 else array.T, blocks.bits, blocks.size)

    return QuantizedLayers(weight, {})
