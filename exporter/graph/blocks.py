"""Block-wise quantised matrices, in the layout of ONNX Runtime's MatMulNBits.

A matrix [out, in] is cut along `in` into blocks that share one scale: w is about scale * (q - zero),
with q stored unsigned and zero fixed at the middle of its range (128 for 8 bits, 8 for 4 bits).
Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# Scales tried, as shares of the one that the largest weight asks for: clipping the extremes a little often lowers the
# squared error. The last share puts the largest weight on the range's shorter side: symmetric rounding.
_SCALE_SHARES = {8: (1.0, 128 / 127), 4: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 8 / 7)}
_WEIGHTS_AT_ONCE = 1 << 16  # their intermediate results fit into the processor's cache


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [out, in] in blocks of `block_size` along `in`.

    Attributes:
        data: uint8 [out, blocks, block_size * bits / 8]; of two 4-bit values in a byte the first is the low half.
        scales: float32 [out, blocks].
        bits: 8 or 4.
        block_size: a power of two from 16.
        width: `in`, before padding to whole blocks.
    """

    data: npt.NDArray[np.uint8]
    scales: Array
    bits: int
    block_size: int
    width: int

    @classmethod
    def empty(cls, rows: int, width: int, bits: int, block_size: int) -> "QuantizedMatrix":
        """A matrix [rows, width] whose rows are to be filled by `put`."""
        blocks = -(-width // block_size)
        data = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
        return cls(data, np.empty((rows, blocks), np.float32), bits, block_size, width)

    def put(self, rows: slice | npt.NDArray[np.int64], values: Array, scales: Array) -> None:
        """Stores rows: signed whole values [rows, blocks, block_size] and scales [rows, blocks]."""
        unsigned = (values + (1 << (self.bits - 1))).astype(np.uint8)
        if self.bits == 4:
            unsigned = (unsigned[..., ::2] | unsigned[..., 1::2] << 4).astype(np.uint8)
        self.data[rows], self.scales[rows] = unsigned, scales


def quantize(matrix: Array, bits: int, block_size: int) -> QuantizedMatrix:
    """Rounds a matrix [out, in] to nearest, with the scales of least squared error among those tried.

    Args:
        matrix: float32 [out, in].
        bits: 8 or 4.
        block_size: a power of two from 16.
    """
    rows, width = matrix.shape
    quantized = QuantizedMatrix.empty(rows, width, bits, block_size)
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        padded = np.zeros((len(part), quantized.scales.shape[1] * block_size), np.float32)
        padded[:, :width] = part
        quantized.put(slice(start, start + step), *fit(padded.reshape(len(part), -1, block_size), bits))
    return quantized


def dequantize(quantized: QuantizedMatrix) -> Array:
    """The matrix [out, in] that the runtime multiplies with."""
    data = quantized.data
    if quantized.bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    values = data.astype(np.float32) - (1 << (quantized.bits - 1))
    return scaled(values, quantized.scales, quantized.width)


def scaled(values: Array, scales: Array, width: int) -> Array:
    """The matrix [rows, width] of signed values [rows, blocks, block_size] and scales [rows, blocks]."""
    matrix: Array = (values * scales[..., None]).reshape(len(values), -1)
    return matrix[:, :width]


def in_axis(name: str) -> int:
    """The axis of a matrix that its layer's inputs have, along which it is quantised."""
    return 1 if name in ("wte.weight", "lm_head.weight") else 0


def fit(blocks: Array, bits: int) -> tuple[Array, Array]:
    """Signed whole values and scales [rows, blocks] of least squared error, for blocks [rows, blocks, block_size]."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # The extreme weight of a block takes the longer, negative side of the range, whatever its own sign.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    whole_range = np.where(extreme == 0, 1, extreme / low)
    best_values = np.zeros_like(blocks)
    best_scales = np.ones(blocks.shape[:2], np.float32)
    best_gain = np.full(blocks.shape[:2], -1, np.float32)
    for share in _SCALE_SHARES[bits]:
        values = blocks / (whole_range * np.float32(share))
        np.clip(np.rint(values, out=values), low, high, out=values)
        # For given values the scale of least squared error has a closed form, and so has the error that it saves.
        product = np.einsum("rbk,rbk->rb", blocks, values)
        square = np.maximum(np.einsum("rbk,rbk->rb", values, values), 1)
        gain = product * product / square
        better = gain > best_gain
        best_values[better] = values[better]
        best_scales[better] = product[better] / square[better]
        best_gain[better] = gain[better]
    return best_values, best_scales
