"""minGPT's GPT, with the names of 2020 or with those of 2022, which nanoGPT took over.

https://github.com/karpathy/minGPT/blob/bac7434/mingpt/model.py
https://github.com/karpathy/minGPT/blob/master/mingpt/model.py
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..arrays import without_first_axis
from ..weight import Weight
from . import nanogpt
from .tensors import Tensors

EMBEDDING, _POSITIONS = "tok_emb.weight", "pos_emb"

_OUTSIDE = {
    EMBEDDING: "wte.weight",
    _POSITIONS: "wpe.weight",
    "ln_f.weight": "ln_f.weight",
    "ln_f.bias": "ln_f.bias",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "ln_1": ("ln1",),
    "attn.c_attn": ("attn.query", "attn.key", "attn.value"),
    "attn.c_proj": ("attn.proj",),
    "ln_2": ("ln2",),
    "mlp.c_fc": ("mlp.0",),
    "mlp.c_proj": ("mlp.2",),
}
# Heads of the sizes that config.json names.
_HEADS = {
    "openai-gpt": 12, "gpt2": 12, "gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25, "gopher-44m": 8, "gpt-mini": 6, "gpt-micro": 4,
    "gpt-nano": 3,
}  # fmt: skip


def recognises(tensors: Tensors) -> bool:
    """Whether it has the names of 2020; or those of 2022 with masks among them, which nanoGPT saves beside its settings."""
    if "blocks.0.attn.query.weight" in tensors.arrays:
        return True
    return (
        nanogpt.recognises(tensors)
        and "h.0.attn.bias" in tensors.arrays
        and "h.0.mlp.c_proj.bias" in tensors.arrays
        and not tensors.settings.keys() & {"model_args", "config"}
    )


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Transposes the matrices of the blocks, and joins those of queries, keys and values; config.json, as minGPT writes it, tells the heads."""
    model = (config or {}).get("model")
    if isinstance(model, dict):  # beside `system`, `data` and `trainer`
        heads = model.get("n_head") or _HEADS.get(str(model.get("model_type")))
        config = {name: value for name, value in (config or {}).items() if name == "n_head"}
        tensors = replace(tensors, settings={"config": {"n_head": heads}} if heads else {})
    if EMBEDDING not in tensors.arrays:
        return nanogpt.arrange(tensors, config)
    layers = tensors.count_blocks("blocks.")
    positions = without_first_axis(tensors.need(_POSITIONS), 2)
    tensors = replace(tensors, arrays={**tensors.arrays, _POSITIONS: positions})
    weights = {ours: Weight((tensors.need(theirs),)) for theirs, ours in _OUTSIDE.items()}
    for layer in range(layers):
        for ours, theirs in _IN_BLOCK.items():
            for kind in ("weight", "bias"):
                arrays = tuple(tensors.need(f"blocks.{layer}.{name}.{kind}") for name in theirs)
                weights[f"h.{layer}.{ours}.{kind}"] = Weight(arrays, transposed=len(arrays[0].shape) == 2)
    heads = tensors.setting("config", "n_head")
    return tensors.config(EMBEDDING, _POSITIONS, "blocks.", heads, config, activation_function="gelu"), weights
