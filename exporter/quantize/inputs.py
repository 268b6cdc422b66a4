"""What reaches a matrix, and a network's weights arranged for rounding that. Knows no runtime."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...models.config import GPT2Config
from .blocks import damping

# Inputs of a matrix that are kept as they are.
SAMPLE = 256

Tensor = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Inputs:
    """What reaches a matrix [out, in].

    Attributes:
        mean: float32 [in].
        sample: some of the inputs themselves, float32 [rows, in], evenly from all texts and positions.
    """

    mean: npt.NDArray[np.float32]
    sample: npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeadInputs:
    """What reaches the output head [vocabulary, in].

    Attributes:
        second_moment: float32 [in, in].
        sample: some of the inputs themselves, float32 [rows, in], evenly from all texts and positions.
    """

    second_moment: npt.NDArray[np.float32]
    sample: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Moments:
    """Over texts: what reaches a matrix [in, out] behind others that are quantised, and what fp32 has for its output.

    Attributes:
        mean: of the inputs, float32 [in].
        covariance: of the inputs, float32 [in, in].
        wanted: mean of the outputs in fp32, float32 [out].
        cross: covariance of the inputs with those outputs, float32 [in, out].
        sample: some of the inputs themselves, float32 [rows, in].
    """

    mean: npt.NDArray[np.float32]
    covariance: npt.NDArray[np.float32]
    wanted: npt.NDArray[np.float32]
    cross: npt.NDArray[np.float32]
    sample: npt.NDArray[np.float32]

    @classmethod
    def of(cls, inputs: npt.NDArray[np.float32], outputs: npt.NDArray[np.float32]) -> "Moments":
        """Those of inputs [count, in] and outputs [count, out]."""
        mean, wanted, count = inputs.mean(0), outputs.mean(0), np.float32(len(inputs))
        # Means are taken off first: beside large ones float32 would lose what varies.
        centred = inputs - mean
        covariance, cross = centred.T @ centred / count, centred.T @ (outputs - wanted) / count
        # An odd step meets all positions of texts whose length is a power of two.
        return cls(mean, covariance, wanted, cross, inputs[:: -(-len(inputs) // SAMPLE) | 1].copy())

    def fitted(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The matrix [in, out] that comes closest to fp32's outputs, for these inputs.

        That is ridge regression, drawn towards the fp32 weight instead of towards zero.
        """
        damped = self.covariance.astype(np.float64)
        least = damping(self.covariance)
        damped[np.diag_indices_from(damped)] += least
        try:
            fitted: npt.NDArray[np.float32] = np.linalg.solve(
                damped, self.cross + least * weight.astype(np.float64)
            ).astype(np.float32)
        except np.linalg.LinAlgError:
            return weight
        return fitted

    def bias(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The bias [out] that gives the outputs their mean in fp32, beside a weight [in, out]."""
        through: npt.NDArray[np.float32] = self.mean @ weight
        return self.wanted - through


def of_both_uses(head: HeadInputs) -> npt.NDArray[np.float32]:
    """What a tied embedding is to be rounded for, float32 [in, in].

    As the output head it multiplies its inputs; as the table of embeddings its own error counts, and counts as much.
    """
    moment = head.second_moment
    scaled: npt.NDArray[np.float32] = moment / np.float32(np.trace(moment) / len(moment))
    return scaled + np.eye(len(moment), dtype=np.float32)


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
        name: each
        if name.endswith(".mlp.c_proj")
        else replace(each, mean=np.zeros_like(each.mean), sample=each.sample - each.mean)
        for name, each in inputs.items()
    }
    return centred, after
