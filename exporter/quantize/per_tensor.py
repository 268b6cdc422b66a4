"""Choice of the layers whose input the second graph may quantise per tensor.

Where many tokens pass at once, DynamicQuantizeMatMul is about twice as fast as MatMulNBits. The error of its one scale depends
on the input's outliers, so a sample of the layer's input decides.
"""

import numpy as np

from ..graph.blocks import Array
from ..graph.input_rounding import Blockwise, InputRounding, PerTensor

# Error that rounding the input may add to the output, as a share of the output's energy: this much in any case, and this
# many times the error of block-wise rounding.
_HARMLESS_ERROR, _TIMES_BLOCKWISE = 1.5e-4, 2.0
# Rows are scaled up at most to this share of the median row's maximum, so that rows of zeros stay zeros.
_MIN_ROW_SHARE = 1 / 16


def choose(sample: Array, weight: Array, block_size: int) -> InputRounding:
    """The first of per-tensor, per-tensor with scaled rows and block-wise rounding whose error is small enough.

    Args:
        sample: inputs of the layer, float32 [rows, in].
        weight: float32 [in, out].
        block_size: numbers that share a scale in block-wise rounding.
    """
    blockwise = Blockwise(block_size)

    def energy(x: Array) -> float:
        return float(np.square(x @ weight, dtype=np.float64).mean())

    whole = energy(sample)
    if not 0 < whole < np.inf:
        return blockwise

    def error(rounding: InputRounding) -> float:
        return energy(rounding.rounded(sample) - sample) / whole

    allowed = max(_HARMLESS_ERROR, _TIMES_BLOCKWISE * error(blockwise))
    candidates = [PerTensor()]
    min_row_scale = _MIN_ROW_SHARE * float(np.median(sample.max(-1)))
    if min_row_scale > 0:
        candidates.append(PerTensor(min_row_scale))
    return next((each for each in candidates if error(each) <= allowed), blockwise)
