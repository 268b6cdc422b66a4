"""Weight-only quantisation in blocks, in the layout of ONNX Runtime's MatMulNBits.

A matrix [out, in] is cut along `in` into blocks that share one scale: w is about scale * (q - zero),
with q stored unsigned and zero fixed at the middle of its range (128 for 8 bits, 8 for 4 bits).
Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

Where it is known what the matrix will be multiplied with, rounding minimises the error of its output instead of its
own: along `in`, each weight also makes up for the errors of those before it. That is GPTQ
(https://arxiv.org/abs/2210.17323) in the form of LDLQ (https://arxiv.org/abs/2307.13304, section 3). Where it is known
how much errors of the outputs matter together, later outputs make up for those of earlier ones, too: the same along
`out`, as in YAQA (https://arxiv.org/abs/2505.22988).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Quantised weights are judged by squared error; these shares of the range that the largest weight
# asks for are tried, since giving up a little of the extremes often lowers the error of the rest.
# The last share of each puts the largest weight on the shorter side's end: plain symmetric rounding.
_RANGE_SHARES = {8: (1.0, 128 / 127), 4: (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 8 / 7)}
# So many weights at a time: what is computed of them then stays in the processor's cache.
_AT_ONCE = 1 << 16
# With feedback so many rows at a time, which bounds the memory that their errors take.
_ROWS_WITH_FEEDBACK = 4096
# Rows that make up for others' errors are rounded in so many groups, one after another.
_GROUPS = 16
# Errors of earlier columns are added up for so many columns in one product of matrices.
_COLUMNS_AT_ONCE = 64
# Added to the variance of each input, and to the mean square of the gradient by each output, as shares of their means.
_DAMPING, _DAMPING_OF_GRADIENTS = 0.01, 0.2


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


def quantize(
    matrix: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    covariance: npt.NDArray[np.float32] | None = None,
    gradients: npt.NDArray[np.float32] | None = None,
) -> QuantizedMatrix:
    """Quantises a matrix [out, in] with the scales of least squared error among those tried.

    Args:
        matrix: float32 [out, in].
        bits: 8 or 4.
        block_size: a power of two from 16.
        covariance: of the matrix' inputs, float32 [in, in]; with it the variance of the output's error is minimised.
        gradients: second moment of a loss' gradients by the outputs, float32 [out, out]; with it, and a covariance,
            what that error e costs, e^T gradients e.
    """
    rows, width = matrix.shape
    blocks = -(-width // block_size)
    data = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    feedback = None if covariance is None else _feedback(covariance, _DAMPING)
    between = None if feedback is None or gradients is None else _BetweenRows(matrix, gradients)
    order = np.arange(rows) if between is None else between.order
    step = max(1, _AT_ONCE // width) if feedback is None else _ROWS_WITH_FEEDBACK
    step = step if between is None else -(-rows // _GROUPS)
    for start in range(0, rows, step):
        part = order[start : start + step]
        if feedback is None:
            padded = np.zeros((len(part), blocks * block_size), np.float32)
            padded[:, :width] = matrix[part]
            values, scales[part] = _fit(padded.reshape(len(part), blocks, block_size), bits)
        else:
            wanted = matrix[part] if between is None else between.wanted(start, start + step)
            values, scales[part] = _fit_with_feedback(wanted, bits, block_size, feedback)
            if between is not None:
                between.add(start, _multiplied(values, scales[part], width))
        data[part] = _pack(values, bits)
    return QuantizedMatrix(data, scales, bits, block_size, width)


def dequantize(quantized: QuantizedMatrix) -> npt.NDArray[np.float32]:
    """The matrix [out, in] that the runtime computes with."""
    data = quantized.data
    if quantized.bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    values = data.astype(np.float32) - (1 << (quantized.bits - 1))
    return _multiplied(values, quantized.scales, quantized.width)


def damping(covariance: npt.NDArray[np.float32], share: float = _DAMPING) -> float:
    """What is added to each variance, as a share of their mean: a sample never shows all that can come."""
    return share * (abs(float(np.trace(covariance, dtype=np.float64))) / len(covariance) or 1.0)


def _fit(blocks: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Signed whole values and scales for blocks [rows, blocks, block_size]."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    # The extreme weight of a block takes the longer, negative side of the range, whatever its own sign.
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], axis=-1)
    whole_range = np.where(extreme == 0, 1, extreme / low)
    best_values = np.zeros_like(blocks)
    best_scales = np.ones(blocks.shape[:2], np.float32)
    best_gain = np.full(blocks.shape[:2], -1, np.float32)
    for share in _RANGE_SHARES[bits]:
        values = blocks / (whole_range * np.float32(share))
        np.clip(np.rint(values, out=values), low, high, out=values)
        # For given values the scale of least squared error has a closed form, and so has what it gains.
        product = np.einsum("rbk,rbk->rb", blocks, values)
        square = np.maximum(np.einsum("rbk,rbk->rb", values, values), 1)
        gain = product * product / square
        better = gain > best_gain
        best_values[better] = values[better]
        best_scales[better] = product[better] / square[better]
        best_gain[better] = gain[better]
    return best_values, best_scales


class _BetweenRows:
    """What rows of a matrix [out, in] are to make up for, of the errors of the rows before them.

    Args:
        matrix: float32 [out, in].
        gradients: second moment of a loss' gradients by the outputs, float32 [out, out].
    """

    def __init__(self, matrix: npt.NDArray[np.float32], gradients: npt.NDArray[np.float32]) -> None:
        # Neighbours, such as the rows of one head, depend on each other most: each is in another group.
        self.order = np.concatenate([np.arange(first, len(matrix), _GROUPS) for first in range(_GROUPS)])
        self._feedback = _feedback(gradients[np.ix_(self.order, self.order)], _DAMPING_OF_GRADIENTS)
        self._matrix = matrix[self.order]
        self._errors = np.empty_like(self._matrix)

    def wanted(self, start: int, end: int) -> npt.NDArray[np.float32]:
        """What some rows, in this order, are to be rounded to; those before them are known."""
        # Within a group rows don't wait for each other, so what they owe is shared out among them at once.
        own = self._feedback[start:end, start:end].T
        owed = np.linalg.solve(own + np.eye(len(own)), self._feedback[:start, start:end].T).astype(np.float32)
        return np.asarray(self._matrix[start:end] + owed @ self._errors[:start], np.float32)

    def add(self, start: int, found: npt.NDArray[np.float32]) -> None:
        """Takes the rows from `start` on as they are after rounding."""
        end = start + len(found)
        self._errors[start:end] = self._matrix[start:end] - found


def _multiplied(
    values: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], width: int
) -> npt.NDArray[np.float32]:
    """The matrix [rows, width] of signed values [rows, blocks, block_size] and scales."""
    matrix: npt.NDArray[np.float32] = (values * scales[..., None]).reshape(len(values), -1)
    return matrix[:, :width]


def _feedback(covariance: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.float32]:
    """How much of each weight's error [earlier weight, later weight] the later weight is to make up for.

    With covariance = (1 + U) D (1 + U)^T, U strictly upper triangular and D diagonal, the variance of the output's error
    is the sum over the columns of error (1 + U), squared, times D. Each of them is as small as rounding allows if
    the weight takes the errors before it, times its column of U, on itself. `share` is that of the damping.
    """
    # The factor that NumPy gives is the lower one; both axes turned round make it the upper one. NumPy takes several
    # times as long where the axes are turned but their memory isn't.
    turned = covariance[::-1, ::-1].astype(np.float64, order="C")
    added = damping(covariance, share)
    while True:
        turned[np.diag_indices_from(turned)] += added
        try:
            factor = np.linalg.cholesky(turned)[::-1, ::-1]
            break
        except np.linalg.LinAlgError:  # inputs that hardly vary beside their mean: float32 has lost their variance
            added *= 10
    return np.triu(factor / np.diagonal(factor), 1).astype(np.float32)


def _fit_with_feedback(
    matrix: npt.NDArray[np.float32], bits: int, block_size: int, feedback: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """As `_fit`, for a matrix [rows, in] that isn't padded yet."""
    rows, width = matrix.shape
    low, high = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    columns = np.ascontiguousarray(matrix.T)
    errors = np.empty_like(columns)
    values = np.zeros((-(-width // block_size) * block_size, rows), np.float32)
    scales = np.empty((rows, len(values) // block_size), np.float32)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        wanted = columns[start:end] + feedback[:start, start:end].T @ errors[:start]
        block = np.zeros((rows, 1, block_size), np.float32)
        block[:, 0, : end - start] = wanted.T
        scale = _as_stored(_fit(block, bits)[1][:, 0])
        scale[scale == 0] = 1  # of a block of zeros
        for first in range(start, end, _COLUMNS_AT_ONCE):
            last = min(first + _COLUMNS_AT_ONCE, end)
            targets = wanted[first - start : last - start] + feedback[start:first, first:last].T @ errors[start:first]
            for column in range(first, last):
                target = targets[column - first] + feedback[first:column, column] @ errors[first:column]
                # For so few numbers np.clip would take several times as long.
                values[column] = np.minimum(np.maximum(np.rint(target / scale), low), high)
                errors[column] = columns[column] - values[column] * scale
        scales[:, start // block_size] = scale
    return values.T.reshape(rows, -1, block_size), scales


def _as_stored(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales as float16 has them, in which they are kept where they are in its range."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16).astype(np.float32)
    return np.where(np.abs(rounded - scales) <= 2**-11 * np.abs(scales), rounded, scales)


def _pack(values: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.uint8]:
    unsigned = (values + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        return (unsigned[..., ::2] | unsigned[..., 1::2] << 4).astype(np.uint8)
    return unsigned
