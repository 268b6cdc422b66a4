"""Weights that AutoGPTQ, GPTQModel or optimum quantised with GPTQ: each matrix [in, out] as whole numbers, packed along its inputs.

Number = scale * (q - zero), rounded to the type of the scales, as these programs compute. `g_idx` tells an input's group, which
has one scale and one zero for each output. Zeros are packed along the outputs. All but the format `gptq_v2` store them less 1. A zero
point of 0 wraps: in AutoGPTQ within its own bits, in GPTQModel with a borrow from the next number. Read as GPTQModel does,
in 3 bits, whose numbers cross words, as AutoGPTQ.
https://github.com/AutoGPTQ/AutoGPTQ/blob/main/auto_gptq/nn_modules/qlinear/qlinear_cuda.py
https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/utils/model.py (convert_gptq_v1_to_v2_format_module)
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.config import read_if_there
from ..arrays import FLOATS, DerivedArray, StoredArray
from .packed import unpacked

PACKED = ".qweight"
_ZEROS, _SCALES, _GROUPS = ".qzeros", ".scales", ".g_idx"
_SETTINGS, _SETTINGS_FILE = "quantization_config", "quantize_config.json"
_BITS = (2, 3, 4, 8)
_INTEGERS = ("I32", "int32")  # as safetensors and PyTorch name them
_ROWS = 256  # made floating-point at once
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedArray(DerivedArray):
    """A quantised matrix, read in the type of its scales; what is stored are its packed numbers.

    Attributes:
        plain_zeros: whether the zeros are stored as they are (`gptq_v2`), not less 1.
    """

    zeros: StoredArray
    scales: StoredArray
    groups: StoredArray
    bits: int
    plain_zeros: bool

    @property
    def dtype(self) -> str:
        return self.scales.dtype

    def read(self) -> npt.NDArray[np.generic]:
        groups, scales = self.groups.read().astype(np.int64), self.scales.read()
        if not ((groups >= 0) & (groups < len(scales))).all():
            raise CheckpointError(f"{self.path}: tensor {self.groups.name} names a group that isn't there")
        zeros, numbers = self._zeros(), unpacked(self.stored.read().T, self.bits)
        matrix: npt.NDArray[np.generic] = np.empty(self.shape, scales.dtype)
        with np.errstate(all="ignore"):  # what isn't finite is refused later, by its name
            for begin in range(0, len(matrix), _ROWS):
                rows = slice(begin, begin + _ROWS)
                matrix[rows] = (numbers[:, rows].T - zeros[groups[rows]]) * scales[groups[rows]].astype(np.float32)
        return matrix

    def _zeros(self) -> npt.NDArray[np.float32]:
        stored = np.ascontiguousarray(self.zeros.read()).view(np.uint32)
        if self.plain_zeros:
            return unpacked(stored, self.bits)
        if 32 % self.bits:  # a number may lie in two words
            return (unpacked(stored, self.bits) + 1) % np.float32(2**self.bits)
        return unpacked(stored + np.uint32(sum(1 << place for place in range(0, 32, self.bits))), self.bits)


def dequantized(arrays: Mapping[str, StoredArray], config: Mapping[str, Any] | None) -> dict[str, StoredArray]:
    """The arrays with one for each quantised matrix.

    Args:
        arrays: of a checkpoint, at least one of them packed.
        config: its config.json, whose `quantization_config` tells the format; else quantize_config.json beside the weights does.

    Raises:
        CheckpointError: AWQ quantised them, or they don't fit together.
    """
    plain, bits = dict(arrays), set[int]()
    packed_names = [name for name in arrays if name.endswith(PACKED)]
    plain_zeros = _has_plain_zeros(arrays[packed_names[0]].path.parent, config)
    for packed_name in packed_names:
        module, packed = packed_name.removesuffix(PACKED), plain.pop(packed_name)
        zeros, scales, groups = (plain.pop(module + part, None) for part in (_ZEROS, _SCALES, _GROUPS))
        if groups is None:
            raise CheckpointError(
                f"{packed.path}: {packed_name} has no {_GROUPS[1:]}, so AWQ quantised it: export the checkpoint that it was made from"
            )
        if zeros is None or scales is None:
            raise CheckpointError(f"{packed.path}: tensor {packed_name} lacks its zeros or scales: fetch it again")
        matrix = _checked(packed, zeros, scales, groups, plain_zeros=plain_zeros)
        plain[f"{module}.weight"] = matrix
        bits.add(matrix.bits)
    _log.warning(
        "GPTQ rounded the weights to %s bits, and so they are read: the checkpoint that they were made from gives better texts",
        " and ".join(map(str, sorted(bits))),
    )
    return plain


def _has_plain_zeros(folder: Path, config: Mapping[str, Any] | None) -> bool:
    """Whether the format is gptq_v2."""
    settings = (config or {}).get(_SETTINGS)
    if not isinstance(settings, dict):
        settings = read_if_there(folder / _SETTINGS_FILE)
    return settings.get("checkpoint_format") == "gptq_v2"


def _checked(
    packed: StoredArray, zeros: StoredArray, scales: StoredArray, groups: StoredArray, *, plain_zeros: bool
) -> QuantizedArray:
    """The quantised matrix, whose parts are proven to fit together."""
    whole = all(part.dtype in _INTEGERS for part in (packed, zeros, groups)) and scales.dtype in FLOATS
    if whole and [len(part.shape) for part in (packed, zeros, scales, groups)] == [2, 2, 2, 1]:
        (words, outputs), (inputs,) = packed.shape, groups.shape
        for bits in _BITS:
            fits = (words * 32, zeros.shape[1] * 32) == (inputs * bits, outputs * bits) and inputs and outputs
            if fits and scales.shape == (zeros.shape[0], outputs):
                return QuantizedArray(packed, (inputs, outputs), zeros, scales, groups, bits, plain_zeros)
    raise CheckpointError(
        f"{packed.path}: tensor {packed.name} of {packed.dtype} {list(packed.shape)} doesn't fit its zeros {list(zeros.shape)},"
        f" scales {list(scales.shape)} and groups {list(groups.shape)} in 2, 3, 4 or 8 bits: fetch or save it again"
    )
