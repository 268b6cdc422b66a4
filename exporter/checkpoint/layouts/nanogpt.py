"""nanoGPT's GPT, and build-nanogpt's, which differs in its activation and in how it is saved.

https://github.com/karpathy/nanoGPT/blob/master/model.py
https://github.com/karpathy/build-nanogpt/blob/master/train_gpt2.py
"""

from collections.abc import Mapping
from typing import Any

from ....models.config import GPT2Config
from ....models.shapes import weight_shapes
from ..arrays import ZeroArray
from ..weight import Weight
from .tensors import Tensors

EMBEDDING = "wte.weight"


def recognises(tensors: Tensors) -> bool:
    """Whether it has Hugging Face's names, with matrices [out, in]."""
    first = tensors.arrays.get("h.0.attn.c_attn.weight")
    return (
        EMBEDDING in tensors.arrays and first is not None and len(first.shape) == 2 and first.shape[0] > first.shape[1]
    )


def arrange(tensors: Tensors, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Transposes the matrices of the blocks; a network built with bias=False gets biases of 0."""
    n_head = tensors.setting("model_args", "n_head") or tensors.setting("config", "n_head")
    activation = _activation(tensors, config or {})
    full = tensors.config(EMBEDDING, "wpe.weight", "h.", n_head, config, activation_function=activation)
    weights = {
        name: Weight((array,), transposed=name.startswith("h.") and len(array.shape) == 2)
        for name, array in tensors.arrays.items()
    }
    if "ln_f.bias" not in weights:
        for name, shape in weight_shapes(GPT2Config.from_dict(full), tied=True).items():
            if name.endswith(".bias"):
                weights.setdefault(name, Weight((ZeroArray(tensors.path, name, shape),)))
    return full, weights


def _activation(tensors: Tensors, config: Mapping[str, Any]) -> str:
    """What a network has whose config.json names none.

    nanoGPT has the exact GELU, the others its approximation: build-nanogpt and llm.c, which save no model_args, and minGPT.

    Networks with masks, alone in a file, are minGPT's: nanoGPT has had none since before it took the exact one.
    """
    if config.get("model_type") == "gpt2":  # by MLX, with transformers' config.json
        return "gelu_new"
    saved = {name for name in ("model_args", "config") if isinstance(tensors.settings.get(name), dict)}
    approximate = "h.0.attn.bias" in tensors.arrays if not saved else "model_args" not in saved
    return "gelu_pytorch_tanh" if approximate else "gelu"
