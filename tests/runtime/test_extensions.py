"""The caller's own functions in decoding, against the same functions in transformers; and the examples of docs/extend.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.golden import Golden
from support.paths import DOCS
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError

PROMPT = [446, 306, 258, 573]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 40, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def favour_even(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Makes even tokens likelier, the more the longer the sequence is."""
    even = (np.arange(scores.shape[-1]) % 2 == 0).astype(np.float32)
    return scores + np.float32(0.1 * input_ids.shape[1]) * even


def ban_seen(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Forbids every token that the sequence holds."""
    scores = scores.copy()
    for row, ids in zip(scores, input_ids, strict=True):
        row[ids] = -np.inf
    return scores


def sum_is_divisible(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return input_ids[:, len(PROMPT) :].sum(-1) % 7 == 0


def near_the_last(index: int, input_ids: np.ndarray) -> list[int]:
    last = int(input_ids[-1])
    return [token for token in range(max(0, last - 300), last + 300) if token != last]


FUNCTIONS: dict[str, dict[str, Any]] = {
    "processors": {"logits_processor": [favour_even, ban_seen]},
    "criterion": {"stopping_criteria": [sum_is_divisible]},
    "allowed": {"prefix_allowed_tokens_fn": near_the_last},
}


def in_torch(functions: dict[str, Any]) -> dict[str, Any]:
    """The functions for transformers, which calls them with PyTorch's tensors."""
    import torch

    def processor(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ids, scores: torch.from_numpy(np.asarray(function(ids.numpy(), scores.numpy())))

    given = dict(functions)
    if "logits_processor" in given:
        given["logits_processor"] = [processor(each) for each in given["logits_processor"]]
    if "stopping_criteria" in given:
        given["stopping_criteria"] = [
            lambda ids, scores, each=each: torch.from_numpy(each(ids.numpy(), None))
            for each in given["stopping_criteria"]
        ]
    if "prefix_allowed_tokens_fn" in given:
        given["prefix_allowed_tokens_fn"] = lambda batch, ids: functions["prefix_allowed_tokens_fn"](batch, ids.numpy())
    return given


@pytest.mark.parametrize("functions", FUNCTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_functions_do_what_they_do_in_transformers(
    functions: str, strategy: str, tales_model: gpt2onnx.Model, tales_reference: Reference, golden: Golden
) -> None:
    options = STRATEGIES[strategy] | {"max_new_tokens": 12, "eos_token_id": 13}
    if tales_reference.leaves_out(options):
        pytest.skip("this transformers is no judge of it")

    def expected() -> list[list[int]]:
        return tales_reference._generate(PROMPT, 5, options | in_torch(FUNCTIONS[functions]))

    theirs = golden.answer([functions, strategy], expected)
    given = {"seed": 5} | options if options.get("do_sample") else options
    ours = tales_model.generate(PROMPT, **given, **FUNCTIONS[functions])
    assert len(ours.sequences) == len(theirs)
    for sequence, tokens in zip(ours.sequences, theirs, strict=True):
        # transformers pads a sequence that a criterion has ended.
        assert_same_tokens(sequence.token_ids, tokens[: len(sequence.token_ids)])
        assert set(tokens[len(sequence.token_ids) :]) <= {13}


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_batches_streams_and_speculation_change_nothing(functions: str, tales_model: gpt2onnx.Model) -> None:
    options = {"max_new_tokens": 16, "do_sample": True, "seed": 2}
    prompts = [PROMPT, [*PROMPT, 262, 14, 262], PROMPT[:2]]
    alone = [tales_model.generate(prompt, **options, **FUNCTIONS[functions]).sequences for prompt in prompts]
    together = tales_model.generate(prompts, **options, **FUNCTIONS[functions])
    assert [result.sequences for result in together] == alone
    speculated = [
        tales_model.generate(prompt, prompt_lookup=5, **options, **FUNCTIONS[functions]).sequences for prompt in prompts
    ]
    assert speculated == alone
    stream = tales_model.stream(PROMPT, **options, **FUNCTIONS[functions])
    assert ("".join(stream), stream.result.sequences) == (alone[0][0].text, alone[0])


def test_speculated_tokens_come_one_by_one(tales_model: gpt2onnx.Model) -> None:
    lengths: list[int] = []

    def watch(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        lengths.append(input_ids.shape[1])
        return scores

    prompt = [5, 6, 7, 8] * 5
    tales_model.generate(prompt, max_new_tokens=10, prompt_lookup=6, logits_processor=[watch])
    assert lengths == list(range(20, 30))


def test_allowed_tokens_are_asked_for_by_prompt(tales_model: gpt2onnx.Model) -> None:
    def only(index: int, input_ids: np.ndarray) -> Sequence[int]:
        return [100 + index]

    results = tales_model.generate([PROMPT, PROMPT[:1], [9]], max_new_tokens=2, prefix_allowed_tokens_fn=only)
    assert [result.sequences[0].token_ids for result in results] == [[100, 100], [101, 101], [102, 102]]


def test_a_function_that_fails_says_so(tales_model: gpt2onnx.Model) -> None:
    with pytest.raises(OptionError, match=r"a logits processor returned shape \[1, 5\], not \[1, 8192\]"):
        tales_model.generate(PROMPT, logits_processor=[lambda ids, scores: scores[:, :5]])
    for wrong in (np.nan, np.inf):
        for options in ({}, {"seed": 1}, {"num_beams": 2}):
            with pytest.raises(OptionError, match="a logits processor returned NaN or infinity"):
                tales_model.generate(
                    PROMPT, logits_processor=[lambda ids, scores, wrong=wrong: scores + wrong], **options
                )
    with pytest.raises(OptionError, match="prefix_allowed_tokens_fn allows no token"):
        tales_model.generate(PROMPT, prefix_allowed_tokens_fn=lambda index, ids: [])
    with pytest.raises(ZeroDivisionError):
        tales_model.generate(PROMPT, stopping_criteria=[lambda ids, scores: 1 // 0])
    assert tales_model.generate(PROMPT, max_new_tokens=2).usage["completion_tokens"] == 2


def test_none_switches_functions_off(tales_model: gpt2onnx.Model) -> None:
    none: dict[str, Any] = {"logits_processor": None, "stopping_criteria": None, "prefix_allowed_tokens_fn": None}
    assert (
        tales_model.generate(PROMPT, max_new_tokens=4, **none).text
        == tales_model.generate(PROMPT, max_new_tokens=4).text
    )


def test_a_generation_config_takes_the_place_of_the_bundles(tales_model: gpt2onnx.Model) -> None:
    config = gpt2onnx.GenerationConfig(max_new_tokens=3, num_beams=2)
    assert tales_model.generate(PROMPT, generation_config=config).usage["completion_tokens"] == 3
    longer = tales_model.generate(PROMPT, generation_config=config, max_new_tokens=5)
    assert longer.usage["completion_tokens"] == 5


def test_a_generation_config_leaves_the_ends_of_texts_to_the_bundle(
    tales_model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers. Without them a text would go on behind its end."""
    (comma,) = tales_model.tokenizer.encode(",")
    monkeypatch.setattr(
        tales_model, "generation_config", gpt2onnx.GenerationConfig(eos_token_id=comma, max_new_tokens=9)
    )
    alone = tales_model.generate(PROMPT, max_new_tokens=60).sequences
    assert alone[0].finish_reason == "stop"
    config = gpt2onnx.GenerationConfig(max_new_tokens=60)
    assert tales_model.generate(PROMPT, generation_config=config).sequences == alone
    config = gpt2onnx.GenerationConfig(max_length=len(PROMPT) + 60)
    assert tales_model.generate(PROMPT, generation_config=config).sequences == alone
    assert tales_model.generate(PROMPT, generation_config=gpt2onnx.GenerationConfig(eos_token_id=0)).sequences != alone
    ends = gpt2onnx.GenerationConfig(stop=[" the"], eos_token_id=[comma, 0], num_beams=3, do_sample=True)
    plain = gpt2onnx.GenerationConfig(max_new_tokens=4)
    assert plain.ending_as(ends) == gpt2onnx.GenerationConfig(stop=[" the"], eos_token_id=[comma, 0], max_new_tokens=4)
    assert ends.ending_as(plain) == ends


def test_the_examples_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "extend.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(code, "extend.md", "exec"), names)
    plain, other, said, chosen, matched = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert " there" in plain
    assert " there" not in other
    assert re.search(r"[.!?]' stop$", said)
    assert chosen in (" princess", " shepherd", " fisherman's daughter")
    assert re.fullmatch(r" (one|two|three) (king|queen)s?, [a-z]{3,8}\.", matched)
