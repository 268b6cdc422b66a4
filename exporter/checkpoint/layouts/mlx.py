"""Weights that MLX quantised: each matrix [out, in] as packed whole numbers with a scale and an offset for each group of inputs.

Number = scale * q + bias; q has `bits` bits, one behind another from the lowest on.
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/models/gpt2.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..arrays import FLOATS, DerivedArray, StoredArray
from .packed import unpacked

_PACKED, _SCALES, _OFFSETS = ".weight", ".scales", ".biases"
_BITS = range(1, 9)


@dataclass(frozen=True)
class QuantizedArray(DerivedArray):
    """A quantised matrix, read in float32; what is stored are its packed numbers."""

    scales: StoredArray
    offsets: StoredArray
    bits: int

    @property
    def dtype(self) -> str:
        return "float32"

    def read(self) -> npt.NDArray[np.generic]:
        numbers = unpacked(self.stored.read(), self.bits)
        groups = numbers.reshape(*self.scales.shape, -1)
        groups *= np.asarray(self.scales.read(), np.float32)[..., None]
        groups += np.asarray(self.offsets.read(), np.float32)[..., None]
        return numbers


def dequantized(arrays: Mapping[str, StoredArray], config: Mapping[str, Any] | None) -> dict[str, StoredArray]:
    """The arrays with one for each quantised matrix.

    Args:
        arrays: of a checkpoint.
        config: its config.json, whose `quantization` tells the bits.

    Raises:
        CheckpointError: they are quantised in another way, or don't fit together.
    """
    plain = dict(arrays)
    settings = (config or {}).get("quantization")
    for scales_name in [name for name in arrays if name.endswith(_SCALES)]:
        module = scales_name.removesuffix(_SCALES)
        scales, packed, offsets = (
            plain.pop(scales_name),
            arrays.get(module + _PACKED),
            plain.pop(module + _OFFSETS, None),
        )
        own = settings.get(module, settings) if isinstance(settings, dict) else None
        own = own if isinstance(own, dict) else {}
        bits, mode = own.get("bits"), own.get("mode", "affine")
        if packed is None or offsets is None or not isinstance(bits, int) or bits not in _BITS:
            raise CheckpointError(
                f"{scales.path}: {module} is quantised in a way that can't be read (bits {shown(bits)}, mode"
                f" {shown(mode)}): export the checkpoint that it was made from"
            )
        plain[module + _PACKED] = _checked(packed, scales, offsets, bits)
    return plain


def _checked(packed: StoredArray, scales: StoredArray, offsets: StoredArray, bits: int) -> QuantizedArray:
    """The quantised matrix, whose parts are proven to fit together."""
    whole = packed.dtype == "U32" and len(packed.shape) == len(scales.shape) == 2 and scales.shape == offsets.shape
    if whole and scales.dtype in FLOATS and offsets.dtype in FLOATS and 0 not in scales.shape:
        rows, inputs = packed.shape[0], packed.shape[1] * 32 // bits
        if rows == scales.shape[0] and packed.shape[1] * 32 == inputs * bits and inputs % scales.shape[1] == 0 < inputs:
            return QuantizedArray(packed, (rows, inputs), scales, offsets, bits)
    raise CheckpointError(
        f"{packed.path}: tensor {packed.name} of {packed.dtype} {list(packed.shape)} doesn't fit its scales {list(scales.shape)} and"
        f" {bits} bits: fetch or save it again"
    )
