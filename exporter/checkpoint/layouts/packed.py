"""Whole numbers of a few bits, packed one behind another from the lowest bit of 32 on."""

import numpy as np
import numpy.typing as npt

_ROWS = 256  # unpacked at once: a bit takes a byte then


def unpacked(words: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.float32]:
    """The numbers of each row.

    Args:
        words: [rows, words], of 32 bits.
        bits: of a number; they divide those of a row.

    Returns:
        [rows, numbers].
    """
    packed = np.ascontiguousarray(words).view(np.uint8)
    numbers = np.empty((len(packed), packed.shape[1] * 8 // bits), np.float32)
    values = (1 << np.arange(bits)).astype(np.float32)
    for begin in range(0, len(packed), _ROWS):
        rows = np.unpackbits(packed[begin : begin + _ROWS], axis=1, bitorder="little")
        numbers[begin : begin + _ROWS] = rows.reshape(len(rows), -1, bits) @ values
    return numbers
