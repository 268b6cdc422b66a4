"""Diverse beam search against the last transformers that has it in its core: see the Makefile's `former`."""

from itertools import pairwise
from typing import Any

import pytest
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.requests import GeneratedSequence

PROMPT = [5, 60, 7, 31]
GROUPS: list[dict[str, Any]] = [
    {"num_beams": 4, "num_beam_groups": 4},
    {"num_beams": 6, "num_beam_groups": 2, "length_penalty": 0.0},
    {"num_beams": 6, "num_beam_groups": 3, "early_stopping": True},
    {"num_beams": 8, "num_beam_groups": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "num_beam_groups": 2, "early_stopping": "never", "length_penalty": -1.0},
]
ENDS = [-1, [7], [4, 9, 17, 30, 50, 61, 72, 88]]
OTHERS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4, "min_new_tokens": 5},
    {"no_repeat_ngram_size": 2, "sequence_bias": [[[3], 2.5], [[9, 9], -4.0]], "renormalize_logits": True},
]


def assert_as_transformers(
    model: gpt2onnx.Model, reference: Reference, prompt: list[int], options: dict[str, Any]
) -> None:
    options = options | {"num_return_sequences": options["num_beams"]}
    if reference.leaves_out(options):
        return
    result = model.generate(prompt, **options)
    expected = reference.tokens(prompt, **options)
    assert len(result.sequences) == len(expected)
    ends = model.generation_config.merged(options).eos_token_ids
    for sequence, tokens in zip(result.sequences, expected, strict=True):
        # transformers writes the first end token, whichever was chosen.
        ours = [ends[0] if token in ends else token for token in sequence.token_ids]
        assert_same_tokens(ours, tokens, options)


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_random_checkpoint(pair: tuple[gpt2onnx.Model, Reference], groups: dict[str, Any], ends: Any) -> None:
    for penalty in (0.1, 1.5, 100.0):
        for others in ({}, *OTHERS):
            given = {"diversity_penalty": penalty, "eos_token_id": ends, "max_new_tokens": 16}
            assert_as_transformers(*pair, PROMPT, groups | others | given)


def test_tales(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    prompt = tales_model.tokenizer.encode("Once upon a time there was a")
    for groups in GROUPS[1:]:
        options = groups | {"diversity_penalty": 0.8, "max_new_tokens": 30}
        assert_as_transformers(tales_model, tales_reference, prompt, options)


def test_no_penalty_worth_mentioning_is_beam_search(tales_model: gpt2onnx.Model) -> None:
    """The first group is a beam search by itself; the others follow it where nothing leads them away."""
    one = tales_model.generate("The king", num_beams=3, num_return_sequences=3, max_new_tokens=20)
    groups = {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 1e-30}
    two = tales_model.generate("The king", num_return_sequences=6, max_new_tokens=20, **groups)
    texts = [sequence.text for sequence in two.sequences]
    assert sorted(texts) == sorted(2 * [sequence.text for sequence in one.sequences])
    scores = [sequence.score for sequence in two.sequences]
    assert all(better >= worse for better, worse in pairwise(scores) if better and worse)


def test_beside_others(tales_model: gpt2onnx.Model) -> None:
    prompts = ["Once upon a time", "The king", "In the forest there lived", "He said: 'I am a very old"]
    end = tales_model.tokenizer.encode(".")
    given: dict[str, Any] = {
        "num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "num_return_sequences": 6, "eos_token_id": end,
        "max_new_tokens": 24, "logprobs": 1,
    }  # fmt: skip
    alone = [tales_model.generate(prompt, **given).sequences for prompt in prompts]
    for batch_size in (2, 8):
        together = tales_model.generate(prompts, batch_size=batch_size, **given)
        assert [_tokens(result.sequences) for result in together] == list(map(_tokens, alone))
    for sequence in (each for sequences in alone for each in sequences):
        assert sequence.logprobs is not None
        total = sum(one.processed_logprob for one in sequence.logprobs)
        assert sequence.score == pytest.approx(total / len(sequence.token_ids), abs=1e-5)


def _tokens(sequences: list[GeneratedSequence]) -> list[tuple[list[int], str | None]]:
    return [(sequence.token_ids, sequence.finish_reason) for sequence in sequences]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beams 4 can't be divided into 3"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0}, "num_beams 1 can't be divided into 2"),
        ({"num_beams": 4, "num_beam_groups": 2}, "go together"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "go together"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "aren't sampled"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "guidance_scale": 2.0}, "can't be guided"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "stop": "x"}, "end by end tokens only"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty must be a number from 0"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(tales_model: gpt2onnx.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        tales_model.generate("The king", **options)
    assert "\n" not in str(error.value)
