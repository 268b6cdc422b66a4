"""A checkpoint in transformers: the judge of logits and tokens. Its answers are golden, so only `make reference` loads it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2onnx.exporter.validate.cases import why_left_out

from .golden import golden
from .tokens import assert_same_tokens

if TYPE_CHECKING:
    import transformers

    import gpt2onnx


class Reference:
    """One checkpoint, float32, without dropout.

    Args:
        folder: the checkpoint.
        name: what tells it from others in golden files: the folder's name by default, which says how it was made.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or folder.name

    @functools.cached_property
    def model(self) -> transformers.GPT2LMHeadModel:
        """The network: where PyTorch is installed."""
        return load_reference(self.folder)

    def leaves_out(self, options: dict[str, Any]) -> bool:
        """Whether the installed transformers is no judge of these options; golden answers are of one that is."""
        return golden.mode != "stored" and why_left_out(options, version("transformers")) is not None

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [length, vocab] of [length] tokens, or [rows, length, vocab]; of many, some are NaN: see golden.array."""
        ids = np.asarray(ids)
        return golden.array(["logits", self.name, ids.tolist()], lambda: self.live_logits(ids))

    def live_logits(self, ids: np.ndarray) -> np.ndarray:
        """All logits: where PyTorch is installed."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.from_numpy(ids)[None] if ids.ndim == 1 else torch.from_numpy(ids)).logits.numpy()
        return logits[0] if ids.ndim == 1 else logits

    def tokens(self, prompt_ids: Sequence[int], seed: int | None = None, **options: Any) -> list[list[int]]:
        """The new tokens of each sequence that transformers.generate returns for one prompt, up to their end token.

        Args:
            prompt_ids: tokens of the prompt.
            seed: for torch.manual_seed, right before generating.
            options: for `generate`.
        """
        question = ["tokens", self.name, list(map(int, prompt_ids)), seed, options]
        return golden.answer(question, lambda: self._generate(prompt_ids, seed, options))

    def _generate(self, prompt_ids: Sequence[int], seed: int | None, options: dict[str, Any]) -> list[list[int]]:
        import torch

        prompt = torch.tensor([list(prompt_ids)])
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        more: dict[str, Any] = {"pad_token_id": ends[0]} if ends else {}
        if "stop_strings" in options:
            more["tokenizer"] = self.tokenizer()
        if "negative_prompt_ids" in options:  # one for each row, which transformers doesn't see to
            rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
            more["negative_prompt_ids"] = torch.tensor([options["negative_prompt_ids"]] * rows)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            output = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options | more)
        sequences = [row[len(prompt_ids) :].tolist() for row in output]
        return [_up_to_end(tokens, ends) for tokens in sequences]

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """Its tokenizer: where transformers is installed."""
        import transformers

        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"))


def assert_as_transformers(
    model: gpt2onnx.Model,
    reference: Reference,
    prompt: list[int],
    options: dict[str, Any],
    own: dict[str, Any] | None = None,
) -> None:
    """Generates as transformers does, where that can judge; options have names of `own` for the model, if they differ."""
    if reference.leaves_out(options):
        return
    result = model.generate(prompt, **own or options)
    expected = reference.tokens(prompt, **options)
    assert len(result.sequences) == len(expected), options
    for index, (sequence, tokens) in enumerate(zip(result.sequences, expected, strict=True)):
        assert_same_tokens(sequence.token_ids, tokens, f"sequence {index}, {options}")


def load_reference(folder: Path) -> transformers.GPT2LMHeadModel:
    """A checkpoint in transformers, float32, without dropout."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # transformers 4's other attention implementations leave out scale_attn_by_inverse_layer_idx.
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").float().eval()


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding that follows an end token."""
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
