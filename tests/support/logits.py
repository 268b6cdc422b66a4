"""Logits to try processors and warpers on, and transformers' own of the same job."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2onnx.runtime.options import GenerationConfig

SIZE = 60
INF = float("inf")


def _hand_made() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 3, SIZE)
    one = np.full(SIZE, -INF)
    one[17] = 0.5
    two = one.copy()
    two[40] = 0.5
    few = np.where(rng.random(SIZE) < 0.9, -INF, plain)
    few[[3, 5]] = 2.0, 1.0
    peak = np.zeros(SIZE)
    peak[30] = 40.0
    return {
        "plain": plain,
        "flat": plain * 0.05,
        "ties": np.round(plain),
        "many ties": np.sign(plain),
        "all equal": np.full(SIZE, 1.25),
        "zeros": np.zeros(SIZE),
        "one survivor": one,
        "two equal survivors": two,
        "many -inf": few,
        "peak": peak,
        "huge": plain * 1e4,
    }


SMALL = {name: values.astype(np.float32) for name, values in _hand_made().items()}
LARGE = {
    f"random {seed}": np.random.default_rng(seed).normal(0, scale, 1500).astype(np.float32)
    for seed, scale in enumerate((0.5, 1, 2, 4, 8))
}
# Enough entries that not all are sorted, many of which tie, some forbidden.
LARGE |= {
    f"many with ties, {kinds} a unit": np.where(
        np.arange(1500) % 7, np.round(LARGE["random 2"] * kinds) / kinds, np.float32(-INF)
    )
    for kinds in (1, 4, 16)
}
LOGITS = SMALL | LARGE
# In golden files, for what a processor leaves as it was: most entries, which so need no room.
SAME = np.finfo(np.float32).max


def reference(name: str, *arguments: Any, **options: Any) -> Any:
    """An instance of one of transformers' processors and warpers. Arrays among the arguments become tensors."""
    import torch
    from transformers.generation import logits_process

    arguments = tuple(torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in arguments)
    return getattr(logits_process, name)(*arguments, **options)


def apply_reference(processor: Any, tokens: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """What one of transformers' processors makes of scores [vocab] after some tokens."""
    import torch

    return processor(torch.tensor([list(tokens)]), torch.from_numpy(scores.copy())[None])[0].numpy()


def coded(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Scores for a golden file."""
    return np.where(after == before, SAME, after)


def decoded(before: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Scores from a golden file."""
    return np.where(stored == SAME, before, stored)


def assert_same(actual: np.ndarray, expected: np.ndarray, label: str) -> None:
    """Exact equality, infinities included: each processor does the same float32 arithmetic as its counterpart."""
    assert actual.shape == expected.shape, label
    differing = np.flatnonzero(actual != expected)
    if len(differing):
        first = int(differing[0])
        raise AssertionError(
            f"{label}: {len(differing)} of {len(actual)} differ, first at {first}: {actual[first]} not {expected[first]}"
        )


@functools.cache
def _smallest_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_positions=8, n_embd=8, n_layer=1, n_head=1))


def reference_chain(options: dict[str, Any], prompt: Sequence[int]) -> list[Any]:
    """transformers' own processors and warpers for these options of generation, in its order."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(**options)
    config._eos_token_tensor = torch.tensor(options["eos_token_id"])
    chain = _smallest_model()._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([list(prompt)]), device="cpu"
    )
    return list(chain)


# Temperature aside, what the next token can be chosen with.
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 50},
    {"top_k": 7, "top_p": 0.8},
    {"top_p": 0.5},
    {"min_p": 0.05, "top_k": 30},
    {"typical_p": 0.6, "top_p": 0.9},
    {"top_h": 0.7, "top_k": 20},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.05},
    {"penalties": 1.3, "top_k": 20, "top_p": 0.9},
]
# transformers' own steps, by our names for them, in the order in which it applies them.
_STEPS = {
    "penalties": "RepetitionPenaltyLogitsProcessor",
    "temperature": "TemperatureLogitsWarper",
    "top_h": "TopHLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}


def options_of(values: dict[str, Any]) -> GenerationConfig:
    """Options that ask for some steps."""
    options = {"repetition_penalty" if name == "penalties" else name: value for name, value in values.items()}
    return GenerationConfig(**{"do_sample": True, "top_k": 0} | options)


def reference_steps(values: dict[str, Any], ids: Sequence[int], logits: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Names and scores of transformers' steps, the logits first."""
    way = [("logits", logits)]
    for name in _STEPS:
        if name in values:
            way.append((name, apply_reference(reference(_STEPS[name], values[name]), ids, way[-1][1])))
    return way


def softmax_of_torch(scores: np.ndarray) -> np.ndarray:
    """Probabilities in PyTorch's float32."""
    import torch

    return torch.from_numpy(scores).softmax(-1).numpy()
