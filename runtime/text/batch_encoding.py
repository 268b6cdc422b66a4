"""Texts as tokens in the form of transformers' tokenizers: padded, with a mask of the tokens that aren't padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2onnx.errors import OptionError, PromptError

from ...models.messages import shown

# Rows of token ids, or one.
Ids = Sequence[int] | Sequence[Sequence[int]]


class BatchEncoding(dict[str, Any]):
    """Tokens of texts: a dictionary with `input_ids` and `attention_mask`, 1 for a token and 0 for padding.

    Each has a list for every text; of a single text it is the list itself; as arrays they are int64 [texts, tokens].
    """

    @property
    def input_ids(self) -> Any:
        """The token ids."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 for a token, 0 for padding."""
        return self["attention_mask"]

    def padded(self, pad_token_id: int, side: str) -> "BatchEncoding":
        """All rows as long as the longest.

        Raises:
            OptionError: the side is neither left nor right.
        """
        if side not in ("left", "right"):
            raise OptionError(f"padding_side must be 'left' or 'right', not {shown(side)}")
        length = max(map(len, self.input_ids), default=0)

        def fill(row: list[int], value: int) -> list[int]:
            padding = [value] * (length - len(row))
            return padding + row if side == "left" else row + padding

        return BatchEncoding(
            input_ids=[fill(row, pad_token_id) for row in self.input_ids],
            attention_mask=[fill(row, 0) for row in self.attention_mask],
        )

    def arrays(self, kind: str) -> "BatchEncoding":
        """The rows as arrays.

        Raises:
            OptionError: the kind isn't "np", or rows have different lengths.
        """
        if kind != "np":
            raise OptionError(
                f"return_tensors must be 'np' or left out, not {shown(kind)}: generate takes lists and arrays"
            )
        if len({len(row) for row in self.input_ids}) > 1:
            raise OptionError("texts of different lengths make no array: padding=True fills them up")
        return BatchEncoding({name: np.array(rows, np.int64) for name, rows in self.items()})


def listed_prompts(prompts: Any, given: dict[str, Any]) -> tuple[Sequence[Any], bool]:
    """The prompts as a list, without padding, and whether a single one was given.

    Args:
        prompts: a text, token ids, or several of them; None where `input_ids` are given.
        given: arguments, from which `input_ids` and `attention_mask` are taken.

    Raises:
        OptionError: not one of prompts and ids is given, or the mask has another shape.
    """
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if (prompts is None) == (ids is None):
        raise OptionError("give prompts or input_ids, one of them")
    prompts = ids if prompts is None else prompts
    if not isinstance(prompts, Sequence | np.ndarray) or not getattr(prompts, "ndim", 1):
        raise PromptError(f"prompts are a text, token ids, or a list of such, not {shown(prompts)}")
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
    if single:
        prompts, mask = [prompts], None if mask is None else [mask]
    return prompts if mask is None else _without_padding(prompts, mask), single


def _without_padding(prompts: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> list[list[int]]:
    try:
        if not any(isinstance(ids, str) for ids in prompts):
            return [
                [token for token, kept in zip(ids, row, strict=True) if kept]
                for ids, row in zip(prompts, mask, strict=True)
            ]
    except (TypeError, ValueError):
        pass
    raise OptionError(
        "attention_mask must have 0 or 1 for each token id of the prompts: give both as the tokenizer returns them"
    )
