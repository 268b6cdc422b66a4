"""OpenAI's own GPT-2, whose TensorFlow checkpoints gpt-2-simple and other fine-tuning scripts write, too.

https://github.com/openai/gpt-2/blob/master/src/model.py
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..arrays import without_first_axis
from ..weight import Weight
from .tensors import Tensors

# Of a weight; what follows such a name belongs to the optimizer.
_NAME = re.compile(
    r"model/(wte|wpe|(?:h(\d{1,4})/)?(ln_1|ln_2|ln_f|attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj)/([gwb]))"
)
_KINDS = {"g": "weight", "w": "weight", "b": "bias"}


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Renames the weights, and takes the first axis, of length 1, off the matrices; hparams.json tells the heads."""
    arrays = {}
    for name, array in tensors.arrays.items():
        if not (match := _NAME.fullmatch(name)):
            continue
        whole, layer, module, kind = match.groups()
        if kind == "w":
            array = without_first_axis(array, 2)
        place = "" if layer is None else f"h.{int(layer)}."
        ours = f"{whole}.weight" if kind is None else f"{place}{module.replace('/', '.')}.{_KINDS[kind]}"
        arrays[ours] = array
    named = replace(tensors, arrays=arrays)
    weights = {name: Weight((array,)) for name, array in arrays.items()}
    return named.config("wte.weight", "wpe.weight", "h.", named.setting("hparams", "n_head"), config), weights
