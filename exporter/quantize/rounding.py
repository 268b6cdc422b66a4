"""How the runtime rounds what a matrix is multiplied with, and which operator a matrix gets for it.

ONNX Runtime multiplies 8-bit weights by 8-bit inputs. MatMulNBits rounds the input in blocks, each with a scale of its
own, and takes weights in the same blocks. DynamicQuantizeMatMul rounds the whole input, all tokens of it, with one
scale, and takes weights with one scale for each output: where many tokens pass through at once it is about twice as fast.
How much its one scale costs depends on the input's outliers, so a sample of the input decides.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# What rounding the input may add to the output, as a share of the output's energy: so much in any case, and so many
# times what rounding in blocks adds.
_HARMLESS, _TIMES_BLOCKS = 1.5e-4, 2.0
# Rows are never scaled up more than this share of a usual row asks for, so that rows of zeros stay zeros.
_LEAST_SHARE = 1 / 16


@dataclass(frozen=True)
class InBlocks:
    """As MatMulNBits does with accuracy_level 4: in each block 127 steps from zero to the greatest number.

    Attributes:
        size: of a block.
    """

    size: int

    def rounded(self, x: Array) -> Array:
        """Numbers [..., in] as the operator multiplies them."""
        width = x.shape[-1]
        blocks = np.zeros((*x.shape[:-1], -(-width // self.size) * self.size), np.float32)
        blocks[..., :width] = x
        blocks = blocks.reshape(*x.shape[:-1], -1, self.size)
        scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        result: Array = (np.rint(blocks / scales) * scales).reshape(*x.shape[:-1], -1)[..., :width]
        return result


@dataclass(frozen=True)
class OneScale:
    """As DynamicQuantizeMatMul does: 255 steps from the least to the greatest number of all, zero included.

    Attributes:
        least: before that, each row is divided by its maximum, or by this where that is less; None leaves rows as they
            are.
    """

    least: float | None = None

    def rounded(self, x: Array) -> Array:
        """Numbers [..., in] as the operator multiplies them."""
        if self.least is not None:
            scales = np.maximum(x.max(-1, keepdims=True), np.float32(self.least))
            rescaled: Array = OneScale().rounded(x / scales) * scales
            return rescaled
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        scale = (high - low) / np.float32(255) or np.float32(1)
        zero = np.rint(-low / scale)
        result: Array = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        return result


Rounding = InBlocks | OneScale


def choose(sample: Array, weight: Array, block_size: int) -> Rounding:
    """The simplest rounding that is good enough for a matrix' input.

    Args:
        sample: inputs, float32 [rows, in].
        weight: float32 [in, out].
        block_size: weights that share a scale where rounding goes by blocks.
    """
    blocks = InBlocks(block_size)

    def energy(x: Array) -> float:
        return float(np.square(x @ weight, dtype=np.float64).mean())

    whole = energy(sample)
    if not 0 < whole < np.inf:
        return blocks

    def added(rounding: Rounding) -> float:
        return energy(rounding.rounded(sample) - sample) / whole

    allowed = max(_HARMLESS, _TIMES_BLOCKS * added(blocks))
    candidates = [OneScale()]
    least = _LEAST_SHARE * float(np.median(sample.max(-1)))
    if least > 0:
        candidates.append(OneScale(least))
    return next((each for each in candidates if added(each) <= allowed), blocks)
