"""Guidance by a negative prompt: transformers' tokens, whoever decodes beside it."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine
from support.reference import Reference, assert_as_transformers

import gpt2onnx
from gpt2onnx.errors import OptionError

PROMPT = [5, 60, 7, 31]
NEGATIVES: list[list[int] | None] = [None, [9], [9, 40, 3, 3, 77, 12, 5]]
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "sequence_bias": [[[3], 2.5], [[9, 9], -4.0]]},
    {"renormalize_logits": True, "suppress_tokens": [1, 2, 17]},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "num_return_sequences": 3, "top_p": 0.9, "eos_token_id": [7, 8, 9, 10]},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "do_sample": True, "seed": 1, "eos_token_id": [4, 50]},
]


def assert_guided(
    model: gpt2onnx.Model, reference: Reference, prompt: list[int], negative: list[int] | None, options: dict[str, Any]
) -> None:
    theirs = {} if negative is None else {"negative_prompt_ids": negative}
    options = {"do_sample": False} | options
    assert_as_transformers(model, reference, prompt, options | theirs, options | {"negative_prompt": negative})


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
@pytest.mark.parametrize("negative", NEGATIVES, ids=str)
def test_random_checkpoint(
    pair: tuple[gpt2onnx.Model, Reference], negative: list[int] | None, options: dict[str, Any]
) -> None:
    for scale in (0.0, 1.5, 4.0):
        assert_guided(*pair, PROMPT, negative, options | {"guidance_scale": scale, "max_new_tokens": 16})


@pytest.mark.parametrize("negative", [None, "Sadly, the old king"])
def test_tales(tales_model: gpt2onnx.Model, tales_reference: Reference, negative: str | None) -> None:
    ids = negative and tales_model.tokenizer.encode(negative)
    prompt = tales_model.tokenizer.encode("Once upon a time there was a")
    for options in ({}, {"do_sample": True, "seed": 2, "top_k": 40}, {"num_beams": 4}):
        options = options | {"guidance_scale": 2.0, "max_new_tokens": 40}
        assert_guided(tales_model, tales_reference, prompt, ids, options)
        by_text = tales_model.generate(prompt, negative_prompt=negative, **options)
        assert by_text.sequences == tales_model.generate(prompt, negative_prompt=ids, **options).sequences


def test_beside_others_and_streamed(tales_model: gpt2onnx.Model) -> None:
    """Batches of several sizes give what each prompt gives alone; so do streams, stop strings and drafts."""
    prompts = ["Once upon a time", "The king", "In the forest there lived", "He said: 'I am a very old"]
    given: dict[str, Any] = {"guidance_scale": 1.8, "negative_prompt": "Sadly, ", "max_new_tokens": 24}
    for options, batch_sizes in (
        ({}, (2, 3, 8)),
        ({"stop": [" the"]}, (2,)),
        ({"do_sample": True, "seed": 9}, (3,)),
        ({"prompt_lookup": 4}, (8,)),
    ):
        alone = [tales_model.generate(prompt, **given, **options).sequences for prompt in prompts]
        for batch_size in batch_sizes:
            together = tales_model.generate(prompts, batch_size=batch_size, **given, **options)
            assert [result.sequences for result in together] == alone
        for prompt, sequences in zip(prompts, alone, strict=True):
            stream = tales_model.stream(prompt, **given, **options)
            assert "".join(stream) == sequences[0].text
            assert stream.result.sequences == sequences
    assert tales_model.generate(prompts[0], **given).text != tales_model.generate(prompts[0], max_new_tokens=24).text


def test_a_scale_of_1_is_no_guidance(tales_model: gpt2onnx.Model) -> None:
    plain = tales_model.generate("The king", max_new_tokens=12)
    one = tales_model.generate("The king", max_new_tokens=12, guidance_scale=1, negative_prompt="Sadly, ")
    assert one.sequences == plain.sequences


def test_the_longer_prompt_fills_the_window(pair: tuple[gpt2onnx.Model, Reference]) -> None:
    model, _ = pair
    context, none = model.config.n_positions, {"max_new_tokens": 200, "eos_token_id": -1, "guidance_scale": 2.0}
    for prompt, negative in (([5] * 9, [3] * 2), ([5] * 2, [3] * 9)):
        (sequence,) = model.generate(prompt, negative_prompt=negative, **none).sequences
        assert (sequence.finish_reason, len(sequence.token_ids)) == ("context", context + 1 - 9)


@pytest.mark.parametrize(
    ("negative", "message"),
    [([5] * 65, "negative_prompt: the prompt has 65 tokens"), ([97], "negative_prompt: 97 is no token id"), (7, "negative_prompt must be a text or a list of token ids")],
)  # fmt: skip
def test_refused(pair: tuple[gpt2onnx.Model, Reference], negative: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pair[0].generate(PROMPT, guidance_scale=2.0, negative_prompt=negative)


@pytest.mark.parametrize(("text", "meant"), [("Sadly, the", "Sadly, the"), ("2020", "2020"), ("5,7", [5, 7])])
def test_the_command(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model, text: str, meant: str | list[int]
) -> None:
    options = ["--guidance-scale", "2.5", "--negative-prompt", text, "--max-new-tokens", "12", "--no-stream"]
    done = command_line("generate", "The king", "-m", str(tales_bundle), *options)
    expected = tales_model.generate("The king", guidance_scale=2.5, negative_prompt=meant, max_new_tokens=12)
    assert done.out.strip() == expected.text.strip()
