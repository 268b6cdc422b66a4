"""llama.cpp's names for GPT-2.

https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py
"""

import re
from collections.abc import Mapping
from typing import Any

from gpt2onnx.errors import CheckpointError

from ....models.messages import shown
from ..formats.gguf_file import ARCHITECTURE
from ..weight import Weight
from .tensors import Tensors

EMBEDDING, _POSITIONS = "token_embd.weight", "position_embd.weight"

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")
_IN_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_OUTSIDE = {
    EMBEDDING: "wte.weight",
    _POSITIONS: "wpe.weight",
    "output_norm.weight": "ln_f.weight",
    "output_norm.bias": "ln_f.bias",
    "output.weight": "lm_head.weight",
}


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Renames the weights, and transposes the matrices of the blocks; the settings tell the architecture."""
    settings = tensors.settings
    if (kind := settings.get(ARCHITECTURE)) not in (None, "gpt2"):
        raise CheckpointError(f"{tensors.path} is no GPT-2: its architecture is {shown(kind)}")
    weights = {}
    for name, array in tensors.arrays.items():
        if name in _OUTSIDE:
            weights[_OUTSIDE[name]] = Weight((array,))
        elif (match := _BLOCK.fullmatch(name)) and match[2] in _IN_BLOCK:
            ours = f"h.{int(match[1])}.{_IN_BLOCK[match[2]]}.{match[3]}"
            weights[ours] = Weight((array,), transposed=len(array.shape) == 2)
    ends = {
        f"{role}_token_id": index
        for role in ("bos", "eos")
        if (index := settings.get(f"tokenizer.ggml.{role}_token_id")) is not None
    }
    full = tensors.config(
        EMBEDDING,
        _POSITIONS,
        "blk.",
        settings.get("gpt2.attention.head_count"),
        config,
        n_inner=settings.get("gpt2.feed_forward_length"),
        layer_norm_epsilon=settings.get("gpt2.attention.layer_norm_epsilon", 1e-5),
        **ends,
    )
    return full, weights
