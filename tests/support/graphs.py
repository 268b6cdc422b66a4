"""A bundle's graph against transformers, for every configuration that transformers runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gpt2onnx.models.bundle import RAGGED_GRAPH, Bundle
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.runtime.engine.runner import Runner

from .golden import assert_close
from .reference import Reference

TOLERANCE = 1e-4
TOKENS = 12

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "n_inner narrow": {"n_inner": 20},
    "n_inner odd": {"n_inner": 99},
    "epsilon large": {"layer_norm_epsilon": 0.1},
    "epsilon tiny": {"layer_norm_epsilon": 1e-12},
    "unscaled attention": {"scale_attn_weights": False, "initializer_range": 0.1},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "only scaled by layer": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "n_layer": 3,
        "initializer_range": 0.1,
    },
    "upcast attention": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "untied head": {"tie_word_embeddings": False},
    "vocabulary of 97": {"vocab_size": 97},
    "vocabulary of 50263": {"vocab_size": 50263, "n_embd": 8, "n_head": 1},
    "13 positions": {"n_positions": 13},
    "1 layer": {"n_layer": 1},
    "1 head": {"n_head": 1},
    "1 wide": {"n_embd": 1, "n_head": 1, "initializer_range": 1.0},
    "48 wide": {"n_embd": 48, "n_head": 3},
    "100 wide, heads of 20": {"n_embd": 100, "n_head": 5},
    "60 wide, heads of 12": {"n_embd": 60, "n_head": 5},
    "35 wide, heads of 5": {"n_embd": 35, "n_head": 7, "scale_attn_by_inverse_layer_idx": True},
    "heads of 1": {"n_embd": 6, "n_head": 6, "tie_word_embeddings": False},
}


def random_tokens(config: GPT2Config, rows: int) -> np.ndarray:
    """int64 [rows, TOKENS]."""
    return np.random.default_rng(1).integers(config.vocab_size, size=(rows, TOKENS))


def logits_of_prompt(bundle: Bundle, tokens: np.ndarray) -> np.ndarray:
    """float32 [1, length, vocab] of tokens [1, length], computed in one forward pass."""
    runner = Runner(bundle, threads=1)
    return runner.forward(runner.new_cache(1, tokens.shape[1]), slice(0, 1), tokens, logits="all")[None].copy()


def expected_logits(reference: Reference, config: GPT2Config) -> np.ndarray:
    """float32 [2, TOKENS, vocab]: transformers' answer to `random_tokens`; NaN where it isn't known."""
    expected = reference.logits(random_tokens(config, 2))
    assert np.nanmax(np.abs(expected)) > 0.1, "logits this small would hide an error"
    return expected


def assert_matches_pytorch(folder: Path, reference: Reference) -> None:
    """Compares a bundle's logits, however the tokens come through the network, with those of its checkpoint."""
    opened = Bundle.open(folder)
    tokens = random_tokens(opened.config, 2)
    expected = expected_logits(reference, opened.config)
    # As ONNX Runtime 1.32 runs it, and as older versions do.
    for bundle in (opened, opened.without(RAGGED_GRAPH)):
        _assert_passes_match(Runner(bundle, threads=1), tokens, expected)


# Passes over two rows: tokens of each. Prompts, parts of prompts and single tokens, one row idle, a past behind only one.
_PASSES = ((1, 0), (4, 2), (1, 1), (0, 5), (3, 1), (1, 0), (0, 1), (1, 1), (1, 1))


def _assert_passes_match(runner: Runner, tokens: np.ndarray, expected: np.ndarray) -> None:
    cache = runner.new_cache(1, TOKENS)
    whole = runner.forward(cache, slice(0, 1), tokens[:1], logits="all")
    assert_close(whole, expected[0], TOLERANCE, "whole")

    cache = runner.new_cache(1, TOKENS)
    for index in range(TOKENS):
        step = runner.forward(cache, slice(0, 1), tokens[:1, index : index + 1])
        assert_close(step[0], expected[0, index], TOLERANCE, f"step {index}")

    # Not on the first row, in a cache that is longer than they need.
    for logits in ("last", "all"):
        cache = runner.new_cache(3, TOKENS + 3)
        for pair in _PASSES:
            counts, past = np.array(pair), cache.lengths[1:].copy()
            padded = np.zeros((2, counts.max()), np.int64)
            places = [(row, past[row] + index) for row in range(2) for index in range(counts[row])]
            for row, place in places:
                padded[row, place - past[row]] = tokens[row, place]
            if logits == "last":
                places = [(row, past[row] + counts[row] - 1) for row in range(2) if counts[row]]
            found = runner.forward(cache, slice(1, 3), padded, counts, logits)
            assert_close(found, np.stack([expected[place] for place in places]), TOLERANCE, f"{logits} of {pair}")

    # Two prompts of unequal length in one pass, and the token that follows each.
    cache = runner.new_cache(2, TOKENS + 3)
    lengths = np.array([TOKENS - 4, TOKENS - 1])
    padded = np.where(np.arange(TOKENS - 1) < lengths[:, None], tokens[:, : TOKENS - 1], 0)
    together = runner.forward(cache, slice(0, 2), padded, lengths)
    assert_close(together, expected[[0, 1], lengths - 1], TOLERANCE, "prompts together")
    step = runner.forward(cache, slice(0, 2), tokens[[0, 1], lengths][:, None])
    assert_close(step, expected[[0, 1], lengths], TOLERANCE, "step after prompts together")
