"""Options about text, not tokens: special tokens kept in texts, prompts cut on the left."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine
from support.golden import Golden
from support.reference import load_reference

import gpt2onnx
from gpt2onnx.errors import OptionError, PromptError
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime import jobs
from gpt2onnx.runtime.text import text_input

PROMPT = "Once upon a time"
END = 8191


@functools.cache
def _tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@functools.cache
def _pipeline() -> Any:
    import transformers

    return transformers.pipeline("text-generation", load_reference(FOLDER), tokenizer=_tokenizer())


def decoded(golden: Golden, ids: list[int]) -> str:
    """What transformers' tokenizer makes of tokens, special ones included."""
    text: str = golden.answer(["decode", ids], lambda: _tokenizer().decode(ids, skip_special_tokens=False))
    return text


def cut_by_the_pipeline(golden: Golden, text: str, new: int) -> str:
    """The continuation of transformers' pipeline that makes room for the new tokens on the left."""

    def answer() -> str:
        made = _pipeline()(
            text, handle_long_generation="hole", max_new_tokens=new, do_sample=False, return_full_text=False
        )
        return str(made[0]["generated_text"])

    question: list[Any] = ["pipeline", len(text), text[:20], new]
    continuation: str = golden.answer(question, answer)
    return continuation


def every_way(
    model: gpt2onnx.Model, bundle: Path, command_line: CommandLine, prompt: str, **options: Any
) -> list[dict[str, Any]]:
    """Results of Python, its stream, a request line and the command line, without what differs from run to run."""
    stream = model.stream(prompt, **options)
    pieces = "".join(stream)
    assert pieces == stream.result.text
    line = json.dumps({"prompt": prompt, **options})
    (record,) = jobs.run(model, text_input.lines(io.BytesIO(line.encode()), "f"), model.generation_config)
    assert record.pop("id") is None
    arguments = [
        ("--" if value is not False else "--no-")
        + name.replace("_", "-")
        + ("" if isinstance(value, bool) else f"={value}")
        for name, value in options.items()
    ]
    done = command_line("generate", "-m", bundle, "--json", *arguments, stdin=prompt)
    assert (done.code, done.err) == (0, "")
    printed = command_line("generate", "-m", bundle, "--no-echo", *arguments, stdin=prompt).out
    results = [model.generate(prompt, **options).to_dict(), stream.result.to_dict(), record, json.loads(done.out)]
    assert printed == results[0]["sequences"][0]["text"] + "\n"
    return [{name: value for name, value in each.items() if name != "seconds"} for each in results]


def test_special_tokens_are_kept(
    golden: Golden, tales_model: gpt2onnx.Model, tales_bundle: Path, command_line: CommandLine
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "forced_eos_token_id": END}
    plain = tales_model.generate(PROMPT, **options).sequences[0]
    assert plain.token_ids[-1] == END
    kept, *others = every_way(tales_model, tales_bundle, command_line, PROMPT, skip_special_tokens=False, **options)
    assert others == [kept] * 3
    (sequence,) = kept["sequences"]
    assert sequence["token_ids"] == plain.token_ids
    assert sequence["text"] == decoded(golden, plain.token_ids) != plain.text
    ids = [END, 2488, END, 704]
    result = tales_model.generate(ids, max_new_tokens=1, skip_special_tokens=False)
    assert result.prompt == decoded(golden, ids)


@pytest.mark.parametrize("new", [3, 64])
def test_a_long_prompt_is_cut_as_by_the_pipeline(
    golden: Golden, new: int, tales_model: gpt2onnx.Model, tales_bundle: Path, command_line: CommandLine
) -> None:
    text = " ".join(f"On day {number} the king went into the wood." for number in range(70))
    ids = tales_model.tokenizer.encode(text)
    assert len(ids) > 700
    cut, *others = every_way(tales_model, tales_bundle, command_line, text, truncate="left", max_new_tokens=new)
    assert others == [cut] * 3
    (sequence,) = cut["sequences"]
    assert sequence["text"] == cut_by_the_pipeline(golden, text, new)
    assert (cut["prompt"], cut["prompt_ids"]) == (text, ids[-(512 - new) :])
    assert sequence["finish_reason"] == "length"
    with pytest.raises(PromptError, match="context window 512"):
        tales_model.generate(text, max_new_tokens=new)
    # A prompt that leaves no room for all new tokens, though it fits itself.
    fits = tales_model.tokenizer.decode(ids[:500])
    assert tales_model.generate(fits, truncate="left", max_new_tokens=64).prompt_ids == ids[:500][-448:]
    assert tales_model.generate(fits, max_new_tokens=64).sequences[0].finish_reason == "context"


def test_what_fits_is_not_cut(tales_model: gpt2onnx.Model) -> None:
    for length in (1, 447, 448):
        ids = [262 + index % 50 for index in range(length)]
        cut = tales_model.generate(ids, truncate="left", max_new_tokens=64)
        assert cut.prompt_ids == ids
        assert cut.sequences == tales_model.generate(ids, max_new_tokens=64).sequences
    with pytest.raises(OptionError, match="512 new tokens leave no room"):
        tales_model.generate([1] * 5, truncate="left", max_new_tokens=512)
    with pytest.raises(PromptError, match="600 tokens, the context window 512"):
        tales_model.generate([1] * 600, truncate="left", max_length=100)


def test_long_texts_are_refused_before_they_are_cut_into_tokens(tales_model: gpt2onnx.Model) -> None:
    """Also those of few letters and many bytes."""
    for text in ("a" * 600_000, "😀" * 30_000):
        with pytest.raises(PromptError, match=f"has {len(text):,} letters") as caught:
            tales_model.prompt_ids(text)
        assert caught.value.too_long


def test_megabytes_are_cut_at_once(tales_model: gpt2onnx.Model) -> None:
    text = "Once upon a time there was a king. " * 200_000
    short = text[-4000:]
    assert tales_model.generate(text, truncate="left", max_new_tokens=4).sequences == (
        tales_model.generate(short, truncate="left", max_new_tokens=4).sequences
    )
