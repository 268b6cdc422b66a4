"""Rounding with error feedback: GPTQ along a matrix' inputs, YAQA's extension along its outputs.

Rounding minimises the error of the matrix' output instead of the error of its weights: along `in`, each weight makes up for
the errors of the weights before it. That is GPTQ (https://arxiv.org/abs/2210.17323) in the form of LDLQ
(https://arxiv.org/abs/2307.13304, section 3). With the second moment of the loss' gradients by the outputs, later
outputs also make up for the errors of earlier ones, as in YAQA (https://arxiv.org/abs/2505.22988).
"""

import numpy as np
import numpy.typing as npt

from ..graph.blocks import Array, QuantizedMatrix, fit, scaled

_ROWS_AT_ONCE = 4096  # bounds the memory of their errors
# Groups of rows, rounded one after another. Measured on `tales`: docs/export.md.
_GROUPS = 16
_COLUMNS_AT_ONCE = 64  # whose sums of earlier columns' errors are one product of matrices
# Added to the variance of each input, and to the mean square of the gradient by each output, as shares of their means.
_DAMPING, _DAMPING_OF_GRADIENTS = 0.01, 0.2


def quantize_with_feedback(
    matrix: Array, bits: int, block_size: int, covariance: Array, gradients: Array | None = None
) -> QuantizedMatrix:
    """Quantises a matrix [out, in] so that the variance of its output's error is small.

    Args:
        matrix: float32 [out, in].
        bits: 8 or 4.
        block_size: a power of two from 16.
        covariance: of the matrix' inputs, float32 [in, in].
        gradients: second moment of a loss' gradients by the outputs, float32 [out, out]: minimises e^T gradients e of
            the output's error e instead.
    """
    rows, width = matrix.shape
    quantized = QuantizedMatrix.empty(rows, width, bits, block_size)
    feedback = _feedback(covariance, _DAMPING)
    if gradients is None:
        for start in range(0, rows, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            quantized.put(part, *_fit_with_feedback(matrix[part], bits, block_size, feedback))
        return quantized
    between = _RowFeedback(matrix, gradients)
    step = -(-rows // _GROUPS)
    for start in range(0, rows, step):
        values, scales = _fit_with_feedback(between.targets(start, start + step), bits, block_size, feedback)
        between.add(start, scaled(values, scales, width))
        quantized.put(between.order[start : start + step], values, scales)
    return quantized


def damping(covariance: Array, share: float = _DAMPING) -> float:
    """The constant to add to each variance: a share of their mean, since a sample never shows all that can come."""
    return share * (abs(float(np.trace(covariance, dtype=np.float64))) / len(covariance) or 1.0)


class _RowFeedback:
    """Feedback between the rows of a matrix [out, in].

    Args:
        matrix: float32 [out, in].
        gradients: second moment of a loss' gradients by the outputs, float32 [out, out].
    """

    def __init__(self, matrix: Array, gradients: Array) -> None:
        # Neighbours, such as the rows of one head, depend on each other most: each is in another group.
        self.order = np.concatenate([np.arange(first, len(matrix), _GROUPS) for first in range(_GROUPS)])
        self._feedback = _feedback(gradients[np.ix_(self.order, self.order)], _DAMPING_OF_GRADIENTS)
        self._matrix = matrix[self.order]
        self._errors = np.empty_like(self._matrix)

    def targets(self, start: int, end: int) -> Array:
        """The values to round rows to, in this order; the errors of the rows before them are known."""
        # Within a group rows don't wait for each other, so their share of earlier errors is solved for at once.
        own = self._feedback[start:end, start:end].T
        owed = np.linalg.solve(own + np.eye(len(own)), self._feedback[:start, start:end].T).astype(np.float32)
        return np.asarray(self._matrix[start:end] + owed @ self._errors[:start], np.float32)

    def add(self, start: int, rounded: Array) -> None:
        """Notes the errors of the rows from `start` on."""
        end = start + len(rounded)
        self._errors[start:end] = self._matrix[start:end] - rounded


def _feedback(covariance: Array, share: float) -> Array:
    """Share of each weight's error that a later weight makes up for: [earlier weight, later weight].

    With covariance = (1 + U) D (1 + U)^T, U strictly upper triangular and D diagonal, the variance of the output's error
    is the sum over the columns of error (1 + U), squared, times D. Each term is as small as rounding allows if
    the weight takes the errors before it, times its column of U, on itself. `share` is the damping's.
    """
    # NumPy gives the lower factor; both axes reversed make it the upper one. The copy in order is several times as fast.
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


def _fit_with_feedback(matrix: Array, bits: int, block_size: int, feedback: Array) -> tuple[Array, Array]:
    """Signed whole values [rows, blocks, block_size] and scales [rows, blocks] of a matrix [rows, in]."""
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
        scale = _in_stored_precision(fit(block, bits)[1][:, 0])
        scale[scale == 0] = 1  # of a block of zeros
        for first in range(start, end, _COLUMNS_AT_ONCE):
            last = min(first + _COLUMNS_AT_ONCE, end)
            targets = wanted[first - start : last - start] + feedback[start:first, first:last].T @ errors[start:first]
            for column in range(first, last):
                target = targets[column - first] + feedback[first:column, column] @ errors[first:column]
                # np.clip takes several times as long on arrays this small.
                values[column] = np.minimum(np.maximum(np.rint(target / scale), low), high)
                errors[column] = columns[column] - values[column] * scale
        scales[:, start // block_size] = scale
    return values.T.reshape(rows, -1, block_size), scales


def _in_stored_precision(scales: npt.NDArray[np.float32]) -> Array:
    """Scales rounded to float16, as they are stored where they are in its range."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16).astype(np.float32)
    return np.where(np.abs(rounded - scales) <= 2**-11 * np.abs(scales), rounded, scales)
