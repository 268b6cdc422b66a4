"""Text that grows token by token, and stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.requests import Request
from gpt2onnx.runtime.tokenizer import find_stop

PROMPT = "Once upon a time"
OPTIONS = [{}, {"do_sample": True, "seed": 1, "temperature": 1.4}, {"do_sample": True, "seed": 2, "top_k": 0, "prompt_lookup": 4}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_streamed_is_whole(tales_model: gpt2onnx.Model, options: dict) -> None:
    whole = tales_model.generate(PROMPT, max_new_tokens=40, **options).sequences[0]
    stream = tales_model.stream(PROMPT, max_new_tokens=40, **options)
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert stream.result.sequences[0] == whole


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(0, 8191), max_size=30), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_tokens_streamed_are_their_text(tales_model: gpt2onnx.Model, tokens: list[int], stop: list[str]) -> None:
    tokenizer = tales_model.tokenizer
    stream = tokenizer.stream(stop)
    text = "".join([stream.push(token) for token in tokens] + [stream.finish()])
    whole = tokenizer.decode(tokens)
    assert text == whole[: find_stop(whole, stop)]


@settings(deadline=None, max_examples=12)
@given(begin=st.integers(0, 120), length=st.integers(1, 12))
def test_stop_string_never_shows(tales_model: gpt2onnx.Model, begin: int, length: int) -> None:
    plain = tales_model.generate(PROMPT, max_new_tokens=40).sequences[0].text
    stop = plain[begin : begin + length]
    if not stop:
        return
    stream = tales_model.stream(PROMPT, max_new_tokens=40, stop=[stop])
    shown = ""
    for piece in stream:
        shown += piece
        assert stop not in shown
        assert plain.startswith(shown)
    assert shown == plain[: plain.index(stop)]
    sequence = stream.result.sequences[0]
    assert (sequence.text, sequence.finish_reason) == (shown, "stop")
    assert tales_model.generate(PROMPT, max_new_tokens=40, stop=stop).sequences[0] == sequence
    # Not a token more than the stop string takes.
    assert stop not in tales_model.tokenizer.decode(sequence.token_ids[:-1])


def test_stop_string_in_the_prompt_does_not_count(tales_model: gpt2onnx.Model) -> None:
    assert tales_model.generate(PROMPT, max_new_tokens=3, stop=["upon"]).sequences[0].finish_reason == "length"


def test_left_early(tales_model: gpt2onnx.Model) -> None:
    whole = tales_model.generate(PROMPT, max_new_tokens=40).sequences[0]
    stream = tales_model.stream(PROMPT, max_new_tokens=40)
    for _ in range(5):
        next(stream)
    partial = stream.result.sequences[0]
    assert partial.finish_reason is None
    assert 5 <= len(partial.token_ids) < 40
    assert partial.token_ids == whole.token_ids[: len(partial.token_ids)]
    del stream
    assert tales_model.generate(PROMPT, max_new_tokens=40).sequences[0] == whole


def test_read_on_after_another_generation(tales_model: gpt2onnx.Model) -> None:
    """A stream that is read on after another generation still gives its own text."""
    whole = tales_model.generate(PROMPT, max_new_tokens=20).sequences[0].text
    other = tales_model.generate("The dog", max_new_tokens=20).sequences[0].text
    stream = tales_model.stream(PROMPT, max_new_tokens=20)
    shown = next(stream) + next(stream)
    assert tales_model.generate("The dog", max_new_tokens=20).sequences[0].text == other
    shown += "".join(stream)
    assert shown == whole


def test_beams_cannot_be_streamed(tales_model: gpt2onnx.Model) -> None:
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(OptionError, match="streamed"):
            tales_model.open_stream(Request(PROMPT, tales_model.options(options)))
