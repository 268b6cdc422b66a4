"""GGUF, the file of llama.cpp: weights in any of its types, settings and the tokenizer.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ....models.bundle import CHAT_TEMPLATE, TOKENIZER_CONFIG
from ....models.messages import one_line
from ..arrays import StoredArray
from .saved import SavedWeights

ARCHITECTURE = "general.architecture"
_TOKENS, _MERGES, _TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
# How a text is cut before merges: GPT-2's way. Files from before 2024 don't say.
_CUT, _LIKE_GPT2 = "tokenizer.ggml.pre", ("gpt-2", "default", None)
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class GGUFArray:
    """An array of a GGUF file, in float32 or rounded in one of llama.cpp's ways; read in float32.

    Attributes:
        offset: of its first byte in the file.
        size: bytes.
        kind: number of its type, gguf.GGMLQuantizationType.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    kind: int
    dtype: str = "float32"

    def read(self) -> npt.NDArray[np.generic]:
        from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(self.kind)
        try:
            raw = np.fromfile(self.path, np.uint8, self.size, offset=self.offset)
            stored = raw.reshape(quant_shape_to_byte_shape(self.shape, kind))
            with np.errstate(all="ignore"):  # of scales that are infinite
                array: npt.NDArray[np.generic] = dequantize(stored, kind).reshape(self.shape)
        except OSError as error:
            raise CheckpointError(f"{self.path}: can't read tensor {self.name}: {error.strerror or error}") from error
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{self.path}: can't read tensor {self.name} in {kind.name}: {error}") from error
        return array


def open_gguf(path: Path) -> SavedWeights:
    """The arrays of a file, its settings and its tokenizer.

    Raises:
        CheckpointError: the file is damaged or truncated.
        MissingExtraError: the package gguf isn't installed.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtraError("Reading a GGUF file", "gguf", "formats") from error

    class Reader(GGUFReader):
        """Ends at the end of the file, behind which the package finds empty values, as many as a damaged file asks for."""

        def _get(
            self, offset: Any, dtype: npt.DTypeLike, count: Any = 1, *others: Any, **more: Any
        ) -> npt.NDArray[Any]:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends inside a value")
            return super()._get(offset, dtype, count, *others, **more)

    try:
        reader = Reader(path)
        arrays: dict[str, StoredArray] = {
            each.name: GGUFArray(
                path, each.name, tuple(int(size) for size in reversed(each.shape)), int(each.data_offset), int(each.n_bytes),
                each.tensor_type.value,
            )
            for each in reader.tensors
        }  # fmt: skip
        settings = {name: value.contents() for name, value in reader.fields.items()}
        tokenizer_files = _tokenizer_files(settings)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except Exception as error:  # the package raises any type
        raise CheckpointError(f"{path} is not a whole GGUF file: {one_line(error)}") from error
    if any(math.prod(array.shape) == 0 for array in arrays.values()):
        raise CheckpointError(f"{path} is not a whole GGUF file: a tensor is empty")
    return SavedWeights(path, arrays, settings, tokenizer_files)


def _tokenizer_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokenizer among the settings, as the files that other checkpoints have; none if it isn't one like GPT-2's."""
    tokens, merges = settings.get(_TOKENS), settings.get(_MERGES)
    if not isinstance(tokens, list) or not isinstance(merges, list) or settings.get(_CUT) not in _LIKE_GPT2:
        return {}
    types = settings.get(_TOKEN_TYPES) or [0] * len(tokens)
    added = {
        str(index): {"content": token, "special": kind == _CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    }
    roles = {
        f"{role}_token": tokens[index]
        for role in ("bos", "eos")
        if isinstance(index := settings.get(f"tokenizer.ggml.{role}_token_id"), int) and 0 <= index < len(tokens)
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": added,
        "add_bos_token": bool(settings.get("tokenizer.ggml.add_bos_token")),
        **roles,
    }
    template = settings.get(_CHAT_TEMPLATE)
    return ({CHAT_TEMPLATE: template} if isinstance(template, str) else {}) | {
        "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        TOKENIZER_CONFIG: json.dumps(config),
    }
