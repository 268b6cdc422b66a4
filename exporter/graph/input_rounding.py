"""Dynamic quantisation of activations, as ONNX Runtime's operators do it where they multiply 8-bit weights.

MatMulNBits quantises its input block-wise, and takes weights in the same blocks. DynamicQuantizeMatMul quantises its
input per tensor: one scale for all tokens together.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
"""

from dataclasses import dataclass

import numpy as np

from .blocks import Array


@dataclass(frozen=True)
class Blockwise:
    """MatMulNBits with accuracy_level 4: 127 steps from zero to the largest magnitude of each block.

    Attributes:
        size: numbers in a block.
    """

    size: int

    def rounded(self, x: Array) -> Array:
        """The numbers [..., in] that the operator multiplies."""
        width = x.shape[-1]
        blocks = np.zeros((*x.shape[:-1], -(-width // self.size) * self.size), np.float32)
        blocks[..., :width] = x
        blocks = blocks.reshape(*x.shape[:-1], -1, self.size)
        scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        result: Array = (np.rint(blocks / scales) * scales).reshape(*x.shape[:-1], -1)[..., :width]
        return result


@dataclass(frozen=True)
class PerTensor:
    """DynamicQuantizeMatMul: 255 steps from the smallest to the largest number, zero included.

    Attributes:
        min_row_scale: each row is first divided by its maximum, or by this where the maximum is smaller; None: rows are
            not scaled.
    """

    min_row_scale: float | None = None

    def rounded(self, x: Array) -> Array:
        """The numbers [..., in] that the operator multiplies."""
        if self.min_row_scale is not None:
            scales = np.maximum(x.max(-1, keepdims=True), np.float32(self.min_row_scale))
            rescaled: Array = PerTensor().rounded(x / scales) * scales
            return rescaled
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        scale = (high - low) / np.float32(255) or np.float32(1)
        zero = np.rint(-low / scale)
        result: Array = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        return result


InputRounding = Blockwise | PerTensor
