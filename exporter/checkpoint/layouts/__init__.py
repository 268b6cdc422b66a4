"""Naming schemes of checkpoints: how the tensors of each become the weights of GPT2LMHeadModel.

A new scheme is one file here with a function `arrange`, and one entry in LAYOUTS.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpt2onnx.errors import CheckpointError

from ....models.config import without_gptq
from ..formats import SavedWeights
from ..weight import Weight
from . import book, gptq, hugging_face, keras_hub, llama_cpp, megatron, mingpt, mlx, nanogpt, openai, tensorflow_flax
from .tensors import Tensors


@dataclass(frozen=True)
class Layout:
    """A naming scheme.

    Attributes:
        name: as errors call it.
        embedding: name of the token embedding.
        arrange: takes the tensors, and the content of the checkpoint's config.json, None if it has none; gives a config.json,
            and the weights by their names in GPT2LMHeadModel. Raises CheckpointError where a tensor is missing, or the
            architecture can't be known.
        recognises: whether tensors have this scheme's names and shapes; by default whether the embedding is one of them.
    """

    name: str
    embedding: str
    arrange: Callable[[Tensors, Mapping[str, Any] | None], tuple[dict[str, Any], dict[str, Weight]]]
    recognises: Callable[[Tensors], bool] | None = None


# The first that recognises a checkpoint reads it.
LAYOUTS = (
    Layout("minGPT's", mingpt.EMBEDDING, mingpt.arrange, mingpt.recognises),
    Layout("GPTModel's", book.EMBEDDING, book.arrange),
    Layout("OpenAI's", "model/wte", openai.arrange),
    Layout("llama.cpp's", llama_cpp.EMBEDDING, llama_cpp.arrange),
    Layout("Megatron-LM's", megatron.EMBEDDING, megatron.arrange),
    Layout("nanoGPT's", nanogpt.EMBEDDING, nanogpt.arrange, nanogpt.recognises),
    Layout("Hugging Face's", hugging_face.EMBEDDING, hugging_face.arrange),
    Layout(
        "transformers' in TensorFlow or Flax", "wte/embeddings:0", tensorflow_flax.arrange, tensorflow_flax.recognises
    ),
    Layout("keras-hub's", keras_hub.EMBEDDING, keras_hub.arrange),
)

# Wrappers put a prefix before every name: torch.compile `_orig_mod.`, DistributedDataParallel `module.`, others the name of
# the attribute that holds the network. GPT2LMHeadModel puts `transformer.` before every name but its head's.
_TRANSFORMER = "transformer."
_HEAD = "lm_head.weight"
_EMBEDDINGS = "|".join(re.escape(layout.embedding) for layout in LAYOUTS)
_WRAPPED = re.compile(rf"^(.*?)(?:{re.escape(_TRANSFORMER)})?(?:{_EMBEDDINGS})$")


def arrange(saved: SavedWeights, config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Recognises the naming scheme of a checkpoint.

    Args:
        saved: the content of its weight files.
        config: the content of its config.json; None if it has none.

    Returns:
        A config.json for the checkpoint, and its weights by their names in GPT2LMHeadModel.

    Raises:
        CheckpointError: the scheme or the architecture isn't known.
    """
    quantiser = gptq if any(name.endswith(gptq.PACKED) for name in saved.arrays) else mlx
    plain = quantiser.dequantized(saved.arrays, config)
    config = config and without_gptq(config)
    prefix = next((match[1] for name in plain if (match := _WRAPPED.match(name))), "")
    arrays = {name.removeprefix(prefix).removeprefix(_TRANSFORMER): array for name, array in plain.items()}
    # A tied matrix may be saved by either name.
    if _HEAD in arrays and config and config.get("tie_word_embeddings", True):
        arrays.setdefault(hugging_face.EMBEDDING, arrays[_HEAD])
    tensors = Tensors(saved.path, arrays, saved.settings)
    for layout in LAYOUTS:
        fits = layout.recognises(tensors) if layout.recognises else layout.embedding in arrays
        if fits:
            return layout.arrange(tensors, config)
    some = ", ".join(sorted(saved.arrays)[:3]) or "nothing"
    known = ", ".join(f"{layout.embedding} ({layout.name})" for layout in LAYOUTS)
    raise CheckpointError(f"{saved.path} is no known GPT-2: its tensors are {some} …, and none of {known}")
