"""What a call of generate may say besides the options of a strategy: an empty prompt, a seed for each prompt, a time."""

from time import sleep
from typing import Any

import numpy as np
import pytest
from support.golden import Golden
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError


@pytest.mark.parametrize("prompt", ["", np.zeros(0, np.int64)], ids=["text", "ids"])
def test_an_empty_prompt_begins_with_the_bos_token(
    tales_model: gpt2onnx.Model, tales_reference: Reference, golden: Golden, prompt: Any
) -> None:
    def transformers() -> list[int]:
        return tales_reference.model.generate(max_new_tokens=8)[0].tolist()

    result = tales_model.answer([prompt], tales_model.generation_config.merged({"max_new_tokens": 8}))[0]
    assert_same_tokens(result.prompt_ids + result.sequences[0].token_ids, golden.answer("no prompt", transformers))
    assert result.prompt_ids == [8191]
    with pytest.raises(gpt2onnx.errors.PromptError, match="nothing to score"):
        tales_model.score("")


@pytest.mark.parametrize("prompts", [5, {"a": 1}, np.array(3), None], ids=str)
def test_what_is_no_prompt_is_said(tales_model: gpt2onnx.Model, prompts: Any) -> None:
    with pytest.raises(gpt2onnx.errors.Gpt2OnnxError, match="prompts"):
        tales_model.generate(prompts, max_new_tokens=1)
    with pytest.raises(gpt2onnx.errors.PromptError, match="has 600,000 tokens"):
        tales_model.generate([1] * 600_000, max_new_tokens=1)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"num_beams": 2}], ids=str)
def test_a_seed_for_each_prompt(tales_model: gpt2onnx.Model, options: dict[str, Any]) -> None:
    prompts, seeds = ["Once", "Once", "The king"], [3, 4, 3]
    found = tales_model.generate(prompts, seed=seeds, max_new_tokens=8, **options)
    alone = [
        tales_model.generate(each, seed=seed, max_new_tokens=8, **options)
        for each, seed in zip(prompts, seeds, strict=True)
    ]
    assert [one.sequences for one in found] == [one.sequences for one in alone]
    assert [one.seed for one in found] == seeds
    assert found[0].text != found[1].text
    one, other = tales_model.generate(prompts[:2], seed=3, max_new_tokens=8, **options)
    assert one.sequences == other.sequences, "one seed for all: equal prompts give equal rows"
    for wrong in ([3, 4], []):
        with pytest.raises(
            gpt2onnx.errors.OptionError, match=f"seed has {len(wrong)} entries, but there are 3 prompts"
        ):
            tales_model.generate(prompts, seed=wrong)
    with pytest.raises(gpt2onnx.errors.OptionError, match="seed must be a whole number"):
        tales_model.generate(prompts, seed=[1, 2, -3])


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}, {"num_beams": 2}, {"prompt_lookup": 3}],
    ids=str,
)
def test_max_time(tales_model: gpt2onnx.Model, tales_reference: Reference, options: dict[str, Any]) -> None:
    prompt = tales_model.prompt_ids("Once upon a time").tolist()
    theirs = {name: value for name, value in options.items() if name != "prompt_lookup"}
    expected = tales_reference.tokens(prompt, max_new_tokens=9, max_time=0.0, **theirs)
    found = tales_model.generate(prompt, max_new_tokens=9, max_time=0, **options).sequences
    assert [one.token_ids for one in found] == expected
    assert {one.finish_reason for one in found} == {"time"}
    plain = tales_model.generate(prompt, max_new_tokens=9, **options).sequences
    assert tales_model.generate(prompt, max_new_tokens=9, max_time=1e6, **options).sequences == plain

    def slow(_: np.ndarray, scores: np.ndarray) -> np.ndarray:
        sleep(0.1)
        return scores

    found = tales_model.generate(prompt, max_new_tokens=9, max_time=0.25, logits_processor=[slow], **options).sequences
    assert all(1 <= len(one.token_ids) <= 3 for one in found)
    assert {one.finish_reason for one in found} == {"time"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pad_token_id": 0}, "pad_token_id isn't needed here: leave it out"),
        ({"use_cache": True}, "use_cache isn't needed here"),
        ({"generation_config": {"num_beams": 2}}, "generation_config must be a gpt2onnx.GenerationConfig"),
        ({"batch_size": None}, "batch_size must be a whole number, at least 1, not None"),
        ({"batch_size": "8"}, "batch_size must be a whole number, at least 1, not '8'"),
    ],
)
def test_what_callers_of_transformers_bring(tales_model: gpt2onnx.Model, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tales_model.generate("Once", **given)
