"""Weight-only quantisation in blocks, in the layout of ONNX Runtime's MatMulNBits.

A matrix [out, in] is cut along `in` into blocks that share one scale: w is about scale * (q - zero),
with q stored unsigned and zero fixed at the middle of its range (128 for 8 bits, 8 for 4 bits).
Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Quantised weights are judged by squared error; these shares of the range that the largest weight
# asks for are tried, since giving up a little of the extremes often lowers the error of the rest.
_RANGE_SHARES = {8: (1.0,), 4: tuple(float(share) for share in np.linspace(0.6, 1.1, 21))}
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [out, in] in blocks of `block_size` along `in`.

    Attributes:
        data: uint8 [out, blocks, block_size * bits / 8]; of two 4-bit values in a byte the first is the low half.
        scales: float32 [out, blocks].
        bits: 8 or 4.
        block_size: a power of two from 16.
        width: `in`, before it was padded to whole blocks.
    """

    data: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    bits: int
    block_size: int
    width: int


def quantize(matrix: npt.NDArray[np.float32], bits: int, block_size: int) -> QuantizedMatrix:
    """Quantises a matrix [out, in] with the scales of least squared error among those tried."""
    rows, width = matrix.shape
    blocks = -(-width // block_size)
    data = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = matrix[start : start + _ROWS_AT_ONCE]
        padded = np.zeros((len(part), blocks * block_size), np.float32)
        padded[:, :width] = part
        values, part_scales = _fit(padded.reshape(len(part), blocks, block_size), bits)
        data[start : start + len(part)] = _pack(values, bits)
        scales[start : start + len(part)] = part_scales
    return QuantizedMatrix(data, scales, bits, block_size, width)


def dequantize(quantized: QuantizedMatrix) -> npt.NDArray[np.float32]:
    """The matrix [out, in] that the runtime computes with."""
    data = quantized.data
    if quantized.bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    values = data.astype(np.float32) - (1 << (quantized.bits - 1))
    matrix = values * quantized.scales[..., None]
    return matrix.reshape(len(matrix), -1)[:, : quantized.width]


def _fit(blocks: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Signed values and scales for blocks [rows, blocks, block_size]."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # The extreme weight of a block takes the longer, negative side of the range, whatever its own sign.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    full_range = np.where(extreme == 0, 1, extreme / low)
    best_values = np.zeros(blocks.shape, np.int8)
    best_scales = np.ones(blocks.shape[:2], np.float32)
    best_error = np.full(blocks.shape[:2], np.inf, np.float32)
    for share in _RANGE_SHARES[bits]:
        values = np.clip(np.rint(blocks / (full_range * np.float32(share))), low, high)
        # For given values the scale of least squared error has a closed form.
        square = np.einsum("rbk,rbk->rb", values, values)
        scales = np.einsum("rbk,rbk->rb", blocks, values) / np.maximum(square, 1)
        error = np.einsum("rbk,rbk->rb", *[blocks - values * scales[..., None]] * 2)
        better = error < best_error
        best_values[better] = values[better]
        best_scales[better] = scales[better]
        best_error[better] = error[better]
    return best_values, best_scales


def _pack(values: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    unsigned = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        return (unsigned[..., ::2] | unsigned[..., 1::2] << 4).astype(np.uint8)
    return unsigned
