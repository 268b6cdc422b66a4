"""Naming schemes of checkpoints: how the tensors of each become the weights of GPT2LMHeadModel.

A new scheme is one file here, which has the parts of `Layout`, and one entry in LAYOUTS.
"""

import re
from collections.abc import Mapping
from typing import Any, Protocol

from gpt2onnx.errors import CheckpointError

from ....models.config import without_gptq
from ..formats import SavedWeights
from ..weight import Weight
from . import book, gptq, hugging_face, keras_hub, llama_cpp, megatron, mingpt, mlx, nanogpt, openai, tensorflow_flax
from .tensors import Tensors


class Layout(Protocol):
    """A naming scheme.

    Attributes:
        NAME: as errors call it.
        EMBEDDING: name of the token embedding.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802  # a module's constant
    @property
    def EMBEDDING(self) -> str: ...  # noqa: N802

    def recognises(self, tensors: Tensors) -> bool:
        """Whether the tensors have this scheme's names and shapes."""
        ...

    def arrange(
        self, tensors: Tensors, config: Mapping[str, Any] | None
    ) -> tuple[Mapping[str, Any], Mapping[str, Weight]]:
        """A config.json, and the weights by their names in GPT2LMHeadModel.

        Args:
            tensors: of the checkpoint.
            config: the content of its config.json; None if it has none.

        Raises:
            CheckpointError: a tensor is missing, or the architecture can't be known.
        """
        ...


# The first that recognises a checkpoint reads it.
LAYOUTS: tuple[Layout, ...] = (
    mingpt,
    book,
    openai,
    llama_cpp,
    megatron,
    nanogpt,
    hugging_face,
    tensorflow_flax,
    keras_hub,
)

# Wrappers put a prefix before every name: torch.compile `_orig_mod.`, DistributedDataParallel `module.`, others the name of
# the attribute that holds the network. GPT2LMHeadModel puts `transformer.` before every name but its head's.
_TRANSFORMER = "transformer."
_EMBEDDINGS = "|".join(re.escape(layout.EMBEDDING) for layout in LAYOUTS)
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
    plain = quantiser.dequantised(saved.arrays, config)
    config = config and without_gptq(config)
    prefix = next((match[1] for name in plain if (match := _WRAPPED.match(name))), "")
    arrays = {name.removeprefix(prefix).removeprefix(_TRANSFORMER): array for name, array in plain.items()}
    tensors = Tensors(saved.path, arrays, saved.settings)
    for layout in LAYOUTS:
        if layout.recognises(tensors):
            full, weights = layout.arrange(tensors, config)
            return dict(full), dict(weights)
    some = ", ".join(sorted(saved.arrays)[:3]) or "nothing"
    known = ", ".join(f"{layout.EMBEDDING} ({layout.NAME})" for layout in LAYOUTS)
    raise CheckpointError(f"{saved.path} is no known GPT-2: its tensors are {some} …, and none of {known}")
