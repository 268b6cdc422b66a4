"""transformers' GPT-2 in TensorFlow (TFGPT2LMHeadModel) and in Flax (FlaxGPT2LMHeadModel).

https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/modeling_tf_pytorch_utils.py
https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/gpt2/modeling_flax_gpt2.py
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..arrays import StoredArray, without_first_axis
from ..weight import Weight
from . import hugging_face
from .tensors import Tensors

_EMBEDDING = re.compile(r"(?:.*/)?wte/(?:weight|embeddings?)(?::0)?")
_NAME = re.compile(
    r"(?:.*/)?(wte|wpe|ln_f|lm_head|(?:h_\._|h/)(\d{1,4})/(ln_1|ln_2|attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj))/(\w+)(?::0)?"
)
_BIASES = {"bias", "beta"}
_TRANSPOSED = "kernel"  # Flax's matrices, [out, in]; its head is [in, out], which GPT2LMHeadModel has [out, in]


def recognises(tensors: Tensors) -> bool:
    """Whether it has the token embedding's name."""
    return any(map(_EMBEDDING.fullmatch, tensors.arrays))


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Renames the weights; takes the first axis, of length 1, off TensorFlow's biases; transposes Flax's matrices."""
    arrays, transposed = dict[str, StoredArray](), set[str]()
    for name, array in tensors.arrays.items():
        if not (match := _NAME.fullmatch(name)):
            continue
        place = match[1] if match[2] is None else f"h.{int(match[2])}.{match[3].replace('/', '.')}"
        ours = f"{place}.{'bias' if match[4] in _BIASES else 'weight'}"
        arrays[ours] = without_first_axis(array, 1) if match[4] == "bias" and len(array.shape) == 2 else array
        if match[4] == _TRANSPOSED:
            transposed.add(ours)
    full, weights = hugging_face.arrange(replace(tensors, arrays=arrays), config)
    return full, {name: replace(weight, transposed=name in transposed) for name, weight in weights.items()}
