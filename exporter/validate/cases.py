"""Generation requests on which a bundle is compared with transformers: data only, for any vocabulary.

The options are transformers' own, except `seed`, which stands for torch.manual_seed right before generating. In float32
each case must give the very tokens of `transformers.generate`.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Options = dict[str, Any]
Suite = Literal["brief", "quick", "full"]

MIN_VOCAB_SIZE, MIN_POSITIONS = 30, 40  # of a model, for the cases to fit


@dataclass(frozen=True)
class Case:
    """A prompt and the options to continue it with."""

    name: str
    prompt_ids: list[int]
    options: Options


STRATEGIES: dict[str, Options] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "3 samples": {"do_sample": True, "num_return_sequences": 3},
    "2 beams": {"num_beams": 2},
    "3 beams, early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "4 beams, never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    "5 beams, length 0": {"num_beams": 5, "length_penalty": 0.0, "num_return_sequences": 5},
    "6 beams, length -1": {"num_beams": 6, "length_penalty": -1.0, "early_stopping": "never"},
    "4 beams, length 0.5": {"num_beams": 4, "length_penalty": 0.5, "num_return_sequences": 4},
    "2 beams sampled": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "4 beams sampled": {"do_sample": True, "num_beams": 4, "early_stopping": True},
    "6 beams sampled": {"do_sample": True, "num_beams": 6, "num_return_sequences": 6, "length_penalty": -0.5},
}  # fmt: skip

_BRIEF = ("greedy", "sampling", "3 beams, early", "4 beams sampled")

# Options that shape the distribution. Those of sampling must change nothing in other strategies, which is tested, too.
PROCESSORS: dict[str, Options] = {
    "plain": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "repetition reward": {"repetition_penalty": 0.8},
    "no 1-grams": {"no_repeat_ngram_size": 1},
    "no 2-grams": {"no_repeat_ngram_size": 2},
    "no 4-grams": {"no_repeat_ngram_size": 4},
    "bad words": {"bad_words_ids": [[3], [5, 7], [11, 2, 4], [9, 9]]},
    "suppressed": {"suppress_tokens": [0, 1, 2, 3, 20, 21]},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top-k 2": {"top_k": 2},
    "all tokens": {"top_k": 0},
    "top-p": {"top_k": 0, "top_p": 0.9},
    "top-p low": {"top_p": 0.2},
    "min-p": {"min_p": 0.1},
    "min-p 1": {"min_p": 1.0},
    "typical-p": {"top_k": 0, "typical_p": 0.8},
    "typical-p low": {"typical_p": 0.1},
    "of the prompt": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "biased": {"sequence_bias": [[[3], 2.5], [[11, 2, 4], 1.5], [[9, 9], -4.0]], "begin_suppress_tokens": [0, 5, 7, 21]},
    "forced": {"forced_bos_token_id": 6, "forced_eos_token_id": [9, 4]},
    "ever likelier to end": {"exponential_decay_length_penalty": [5, 1.4], "eos_token_id": [4, 9, 17]},
    "top-h": {"top_h": 0.6, "temperature": 1.4},
    "epsilon": {"top_k": 0, "epsilon_cutoff": 0.02},
    "eta, renormalized": {"eta_cutoff": 0.02, "renormalize_logits": True},
    "all together": {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[4], [6, 8]], "suppress_tokens": [1, 2],
        "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95,
    },
}  # fmt: skip


class _Change(NamedTuple):
    """A release since which transformers gives today's tokens for some options."""

    release: str
    concerns: Callable[[Options], bool]
    before: str


def _rows(options: Options) -> int:
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)


# From 4.57 on, the oldest supported release; read off the releases' source. There was no 5.18.
_CHANGES = [
    _Change("5.0", lambda options: options.get("top_h") is not None, "has no top_h"),
    _Change(
        "5.19",
        lambda options: options.get("encoder_repetition_penalty") not in (None, 1.0) and _rows(options) > 1,
        "applies encoder_repetition_penalty to the first sequence only",
    ),
    _Change(
        "5.19",
        lambda options: bool(
            options.get("exponential_decay_length_penalty")
            and (options.get("min_length") or options.get("min_new_tokens"))
        ),
        "makes NaN of a forbidden end token with exponential_decay_length_penalty",
    ),
    _Change(
        "5.24",
        lambda options: bool(options.get("do_sample")) and (options.get("num_beams") or 1) > 1,
        "doesn't sort what beam sampling draws",
    ),
]


# Releases since which the strategies that these options ask for are no longer in transformers itself.
_LEFT = {"num_beam_groups": "4.57", "penalty_alpha": "4.56"}


def why_left_out(options: Options, version: str) -> str | None:
    """The reason why a version of transformers can't judge some options.

    Args:
        version: of transformers, such as "5.24.0".

    Returns:
        The reason; None if its tokens must be ours.
    """
    for change in _CHANGES:
        if change.concerns(options) and _release(version) < _release(change.release):
            return f"transformers before {change.release} {change.before}"
    for name, release in _LEFT.items():
        if name in options and _release(version) >= _release(release):
            return f"transformers from {release} on has no {name}"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def cases(vocab_size: int, n_positions: int, suite: Suite = "full") -> list[Case]:
    """The cases for a model of this size.

    Args:
        vocab_size: at least MIN_VOCAB_SIZE.
        n_positions: at least MIN_POSITIONS.
        suite: "full" for all, "quick" for a selection, "brief" for a few short ones.
    """
    if suite == "brief":
        prompt, options = _case("", 0, vocab_size, n_positions, {}).prompt_ids, {"max_new_tokens": 8, "seed": 1}
        return [Case(name, prompt, {"do_sample": False} | STRATEGIES[name] | options) for name in _BRIEF]
    product = [
        _case(f"{strategy}, {processor}", number, vocab_size, n_positions, STRATEGIES[strategy] | PROCESSORS[processor])
        for number, (strategy, processor) in enumerate((s, p) for s in STRATEGIES for p in PROCESSORS)
    ]
    if suite == "quick":
        product = product[::11]
    return product + _edges(vocab_size, n_positions)


def _case(name: str, number: int, vocab_size: int, n_positions: int, options: Options) -> Case:
    """A case whose prompt, lengths, seed and default end tokens are drawn by its number."""
    rng = random.Random(number)
    prompt = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 3, 8, 15)))]
    room = min(n_positions - len(prompt), 24)
    lengths: list[Options] = [
        {"max_new_tokens": room}, {"max_length": len(prompt) + room},
        {"max_new_tokens": room, "min_new_tokens": room // 2},
        {"max_new_tokens": room, "min_length": len(prompt) + room // 3},
    ]  # fmt: skip
    few, many = rng.sample(range(vocab_size), 3), rng.sample(range(vocab_size), min(vocab_size // 10, 20))
    ends: list[Options] = [{}, *({"eos_token_id": each} for each in (few, many, few[0], many))]
    # Explicit, since options of sampling would turn sampling on.
    chosen: dict[str, Any] = {"do_sample": False} | rng.choice(lengths) | rng.choice(ends) | options
    if chosen["do_sample"]:
        chosen["seed"] = rng.randrange(2**33)
    return Case(name, prompt, chosen)


def _edges(vocab_size: int, n_positions: int) -> list[Case]:
    """Edge cases that the product of strategies and processors rarely meets."""
    rng = random.Random(vocab_size)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    many = rng.sample(range(vocab_size), min(vocab_size // 2, 200))
    repeated = prompt(4) * 3
    edges: dict[str, tuple[list[int], Options]] = {
        "one token": (prompt(5), {"max_new_tokens": 1}),
        "one sampled token": (prompt(5), {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 4, "seed": 1}),
        "one token, beams": (prompt(5), {"max_new_tokens": 1, "num_beams": 5, "num_return_sequences": 5}),
        "up to the last position": (prompt(n_positions - 6), {"max_length": n_positions}),
        "up to the last position, beams": (prompt(n_positions - 6), {"max_length": n_positions, "num_beams": 3}),
        "many tokens end": (prompt(4), {"max_new_tokens": 12, "eos_token_id": many}),
        "many tokens end, sampling": (
            prompt(4), {"max_new_tokens": 12, "eos_token_id": many, "do_sample": True, "num_return_sequences": 6, "seed": 2},
        ),
        "many tokens end, beams": (prompt(4), {"max_new_tokens": 12, "eos_token_id": many, "num_beams": 3}),
        "most tokens end, beams": (
            prompt(4), {"max_new_tokens": 12, "eos_token_id": list(range(min(vocab_size - 3, 200))), "num_beams": 2},
        ),
        "no end token can come": (
            prompt(4), {"max_new_tokens": 16, "eos_token_id": many, "suppress_tokens": many, "num_beams": 3},
        ),
        "end token outside the vocabulary": (
            prompt(4), {"max_new_tokens": 8, "min_new_tokens": 4, "eos_token_id": [vocab_size + 5, 1], "num_beams": 2},
        ),
        "repeated prompt": (repeated, {"max_new_tokens": 16, "repetition_penalty": 1.5, "num_beams": 4}),
        "repeated prompt, no 3-grams": (repeated, {"max_new_tokens": 16, "no_repeat_ngram_size": 3, "num_beams": 4}),
    }  # fmt: skip
    # With fewer tokens than candidates, beam sampling also draws impossible tokens, in PyTorch's own order.
    for beams, k, length in ((3, 1, 2), (4, 2, 2), (6, 1, 4), (5, 3, 8), (6, 2, 3)):
        edges[f"{beams} beams sampled from {k} tokens"] = (
            prompt(3),
            {"max_new_tokens": length, "do_sample": True, "num_beams": beams, "top_k": k, "seed": beams,
             "num_return_sequences": beams},
        )  # fmt: skip
    for name, options in (
        ("greedy", {}),
        ("3 samples", {"do_sample": True, "num_return_sequences": 3, "seed": 5}),
        ("beams", {"num_beams": 3}),
    ):
        edges[f"guided, {name}"] = prompt(4), {"max_new_tokens": 12, "guidance_scale": 1.7} | options
    return [Case(name, tokens, options) for name, (tokens, options) in edges.items()]
