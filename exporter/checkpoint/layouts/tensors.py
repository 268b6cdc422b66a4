"""Tensors of a checkpoint by their names in its own scheme, and an architecture derived from their shapes."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from gpt2onnx.errors import CheckpointError

from ....models.config import ALIASES, GPT2Config
from ..arrays import StoredArray
from ..formats.saved import SavedWeights

_log = logging.getLogger(__name__)
_HEAD_SIZE = 64  # of GPT-2's four sizes
_WIDTHS = (768, 1024, 1280, 1600)
GPT2_VOCABULARY = GPT2Config.vocab_size
_GPT2_END = GPT2_VOCABULARY - 1
# Other names in a configuration: transformers' general ones, the book's and nanoGPT's.
_OTHER_NAMES = ALIASES | {
    "context_length": "n_positions",
    "block_size": "n_positions",
    "emb_dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
}


class Tensors(SavedWeights):
    """Tensors of a checkpoint by their names in its scheme, without a wrapper's prefix."""

    def need(self, name: str) -> StoredArray:
        """A tensor; CheckpointError if it is missing."""
        if name not in self.arrays:
            raise CheckpointError(f"{self.path}: the weights lack tensor {name}")
        return self.arrays[name]

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """The shape of a matrix; CheckpointError if it is missing, or not a matrix."""
        shape = self.need(name).shape
        if len(shape) != 2:
            raise CheckpointError(f"{self.path}: tensor {name} has shape {list(shape)}, but should be a matrix")
        return shape[0], shape[1]

    def count_blocks(self, prefix: str) -> int:
        """The number of transformer blocks: one more than the highest N of the names `<prefix>N.…`."""
        block = re.compile(rf"^{re.escape(prefix)}(\d{{1,4}})\.")
        return 1 + max((int(match[1]) for name in self.arrays if (match := block.match(name))), default=-1)

    def setting(self, group: str, name: str) -> Any:
        """A setting of a group that was saved in the same file; None if it wasn't."""
        settings = self.settings.get(group)
        return settings.get(name) if isinstance(settings, dict) else None

    def config(
        self,
        embedding: str,
        positions: str,
        blocks: str,
        n_head: object | None,
        given: Mapping[str, Any] | None,
        **told: Any,
    ) -> dict[str, Any]:
        """A config.json of the tensors' shapes, and of what was saved or put beside them.

        Args:
            embedding: name of the tokens' embedding.
            positions: name of the positions' embedding.
            blocks: beginning of the blocks' names, up to their number.
            n_head: number of attention heads as saved beside the weights; None if it wasn't.
            given: a config.json that the user put beside the file; its fields come before all others.
            told: fields that come before what is read off the tensors named here.

        Raises:
            CheckpointError: a tensor is missing, or the number of heads can't be known.
        """
        vocabulary, width = self.matrix_shape(embedding)
        architecture = {
            "vocab_size": vocabulary,
            "n_positions": self.matrix_shape(positions)[0],
            "n_embd": width,
            "n_layer": self.count_blocks(blocks),
            "activation_function": "gelu_new",
            **told,
        }
        end = _GPT2_END if architecture["vocab_size"] >= GPT2_VOCABULARY else None
        heads = n_head
        if heads is None and width % _HEAD_SIZE == 0:
            heads = width // _HEAD_SIZE
            if width not in _WIDTHS and "n_head" not in (given or {}):
                _log.warning(
                    "%s doesn't tell the number of attention heads: %d are taken, of %d each, as in GPT-2; give --n-head if"
                    " it was trained with others", self.path, heads, _HEAD_SIZE
                )  # fmt: skip
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": end,
            "eos_token_id": end,
            **architecture,
            **({} if heads is None else {"n_head": heads}),
            **{_OTHER_NAMES.get(name, name): value for name, value in (given or {}).items()},
        }
        if "n_head" not in config:
            raise CheckpointError(
                f"{self.path}: the number of attention heads can't be read off the weights (width {width}):"
                ' give --n-head, or put a config.json with {"n_head": …} beside it'
            )
        return config
