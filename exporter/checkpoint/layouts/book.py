"""GPTModel of Sebastian Raschka's book "Build a Large Language Model (From Scratch)", and its variants.

https://github.com/rasbt/LLMs-from-scratch/blob/main/ch04/01_main-chapter-code/gpt.py
https://github.com/rasbt/LLMs-from-scratch/blob/main/pkg/llms_from_scratch/ch04.py (GPTModelFast: one matrix `qkv`, PyTorch's norms)
https://github.com/rasbt/LLMs-from-scratch/blob/main/pkg/llms_from_scratch/appendix_e.py (linear layers wrapped in LoRA)
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..adapter import MergedArray, as_alpha
from ..arrays import FLOATS, StoredArray, ZeroArray
from ..weight import Weight
from .tensors import Tensors

EMBEDDING = "tok_emb.weight"

_OUTSIDE = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
    "out_head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "norm1.scale": "ln_1.weight",
    "norm1.shift": "ln_1.bias",
    "att.out_proj.weight": "attn.c_proj.weight",
    "att.out_proj.bias": "attn.c_proj.bias",
    "norm2.scale": "ln_2.weight",
    "norm2.shift": "ln_2.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight",
    "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight",
    "ff.layers.2.bias": "mlp.c_proj.bias",
}
_QUERY_KEY_VALUE = ("att.W_query", "att.W_key", "att.W_value")
# Names of the fast variant.
_FAST_NORM, _FAST_PROJECTION = re.compile(r"((?:^|\.)(?:norm1|norm2|final_norm)\.)(weight|bias)$"), ".att.proj."
_NORMS = {"weight": "scale", "bias": "shift"}
_WRAPPED, _DOWN, _UP = ".linear.", ".lora.A", ".lora.B"

_log = logging.getLogger(__name__)


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Transposes the matrices of the blocks, and joins those of queries, keys and values; merges LoRA layers."""
    alpha = _alpha(tensors.settings, config or {})
    config = None if config is None else {name: value for name, value in config.items() if name != "lora_alpha"}
    tensors = replace(tensors, arrays={_plainly_named(name): array for name, array in tensors.arrays.items()})
    tensors = replace(tensors, arrays=_without_lora(tensors, alpha))
    (vocabulary, width), layers = tensors.matrix_shape(EMBEDDING), tensors.count_blocks("trf_blocks.")
    inner = tensors.matrix_shape("trf_blocks.0.ff.layers.0.weight")[0]
    saved = [each["n_heads"] for each in tensors.settings.values() if isinstance(each, dict) and "n_heads" in each]
    if (outputs := tensors.matrix_shape("out_head.weight")[0]) != vocabulary:
        raise CheckpointError(
            f"{tensors.path} is a classifier: out_head gives {outputs} numbers, not one for each of the {vocabulary} tokens, so it"
            " can't generate text"
        )
    if "out_head.bias" in tensors.arrays:
        raise CheckpointError(f"{tensors.path}: out_head has a bias, which GPT-2's output head can't have")
    weights = {ours: Weight((tensors.need(theirs),)) for theirs, ours in _OUTSIDE.items()}
    for layer in range(layers):
        theirs_of, ours_of = f"trf_blocks.{layer}.", f"h.{layer}."
        for theirs, ours in _IN_BLOCK.items():
            array = tensors.need(theirs_of + theirs)
            weights[ours_of + ours] = Weight((array,), transposed=len(array.shape) == 2)
        names = ("att.qkv",) if f"{theirs_of}att.qkv.weight" in tensors.arrays else _QUERY_KEY_VALUE
        matrices = tuple(tensors.need(f"{theirs_of}{name}.weight") for name in names)
        weights[f"{ours_of}attn.c_attn.weight"] = Weight(matrices, transposed=True)
        bias = f"{ours_of}attn.c_attn.bias"
        biases: tuple[StoredArray, ...] = (ZeroArray(tensors.path, bias, (3 * width,)),)  # built with qkv_bias=False
        if f"{theirs_of}{names[0]}.bias" in tensors.arrays:
            biases = tuple(tensors.need(f"{theirs_of}{name}.bias") for name in names)
        weights[bias] = Weight(biases)
    full = tensors.config(
        EMBEDDING, "pos_emb.weight", "trf_blocks.", saved[-1] if saved else None, config, n_inner=None if inner == 4 * width else inner
    )  # fmt: skip
    return full, weights


def _plainly_named(name: str) -> str:
    """A tensor's name in the plain model, whose norms and output projection the fast variant calls otherwise."""
    name = _FAST_NORM.sub(lambda match: match[1] + _NORMS[match[2]], name)
    return name.replace(_FAST_PROJECTION, ".att.out_proj.")


def _without_lora(tensors: Tensors, alpha: object) -> dict[str, StoredArray]:
    """The tensors of the plain model, each matrix with its LoRA layer merged."""
    arrays = {
        name.replace(_WRAPPED, "."): array for name, array in tensors.arrays.items() if not name.endswith((_DOWN, _UP))
    }
    ranks = set()
    for module in (name.removesuffix(_DOWN) for name in tensors.arrays if name.endswith(_DOWN)):
        base, down, up = (tensors.need(module + end) for end in (f"{_WRAPPED}weight", _DOWN, _UP))
        rank = down.shape[-1] if down.shape else 0
        for array, shape in ((down, (*base.shape[1:], rank)), (up, (rank, *base.shape[:1]))):
            if array.shape != shape or 0 in shape or array.dtype not in FLOATS:
                raise CheckpointError(
                    f"{array.path}: tensor {array.name} has shape {list(array.shape)} of {array.dtype}, not {list(shape)} of floats"
                )
        if (number := as_alpha(alpha)) is None:
            raise CheckpointError(
                f"{tensors.path} has LoRA layers, but doesn't tell their alpha ({shown(alpha)}): put a config.json with"
                ' {"lora_alpha": …} beside it, which is divided by the rank'
            )
        ranks.add(rank)
        change = partial(_with_lora, down, up, number / rank)
        arrays[f"{module}.weight"] = MergedArray(base.path, base.name, base.shape, Weight((base,)), change, base.dtype)
    for rank in sorted(ranks):
        _log.warning(
            "%s: LoRA layers are merged with the factor alpha / rank = %s / %d, as the book's repository has it; an earlier version of it multiplied by alpha alone",
            tensors.path, alpha, rank
        )  # fmt: skip
    return arrays


def _alpha(settings: Mapping[str, Any], config: Mapping[str, Any]) -> object:
    """LoRA's alpha: of a config.json, or saved beside the weights."""
    places = [config, settings, *(each for each in settings.values() if isinstance(each, dict))]
    return next((place["lora_alpha"] for place in places if "lora_alpha" in place), None)


def _with_lora(
    down: StoredArray, up: StoredArray, scale: float, weight: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    product = np.asarray(down.read(), np.float32) @ np.asarray(up.read(), np.float32)  # [in, out]
    return weight + np.float32(scale) * product.T
