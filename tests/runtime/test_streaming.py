"""Text that grows token by token, and stop strings."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.reference import Reference

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.requests import Request
from gpt2onnx.runtime.text.stop_strings import StopStrings

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


@settings(max_examples=200)
@given(
    tokens=st.lists(st.integers(0, 8191), max_size=30),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    prompt=st.text(max_size=4),
)
@example([72], ["ab"], "a")
def test_any_tokens_streamed_are_their_text(
    tales_model: gpt2onnx.Model, tokens: list[int], stop: list[str], prompt: str
) -> None:
    tokenizer = tales_model.tokenizer
    stream = tokenizer.stream(StopStrings(stop, prompt))
    text = "".join([stream.push(token) for token in tokens] + [stream.finish()])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text == _before(stop, prompt, whole)


def _before(stop: list[str], prompt: str, text: str) -> str:
    """What a text behind a prompt has before the first stop string, which may begin in the prompt, but not end there."""
    places = [
        place - len(prompt)
        for string in stop
        for place in range(len(prompt + text))
        if (prompt + text).startswith(string, place) and place + len(string) > len(prompt)
    ]
    return text[: max(0, min(places, default=len(text)))]


@settings(max_examples=12)
@given(begin=st.integers(0, 120), length=st.integers(1, 12))
@example(95, 2)  # "e ", whose first letter is the prompt's last one
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
    assert shown == _before([stop], PROMPT, plain)
    sequence = stream.result.sequences[0]
    assert (sequence.text, sequence.finish_reason) == (shown, "stop")
    assert tales_model.generate(PROMPT, max_new_tokens=40, stop=stop).sequences[0] == sequence
    # Not a token more than the stop string takes.
    assert stop not in tales_model.tokenizer.decode(sequence.token_ids[:-1])


def test_stop_string_in_the_prompt_does_not_count(tales_model: gpt2onnx.Model) -> None:
    assert tales_model.generate(PROMPT, max_new_tokens=3, stop=["upon"]).sequences[0].finish_reason == "length"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup": 3}], ids=str)
def test_stop_string_that_begins_in_the_prompt_stops_as_in_transformers(
    tales_model: gpt2onnx.Model, tales_reference: Reference, options: dict
) -> None:
    plain = tales_model.generate(PROMPT, max_new_tokens=12, **options).text
    ids = tales_model.prompt_ids(PROMPT).tolist()
    theirs = {name: value for name, value in options.items() if name != "prompt_lookup"}
    for before, after in ((1, 1), (4, 9), (len(PROMPT), 20), (0, 9)):
        stop = PROMPT[len(PROMPT) - before :] + plain[:after]
        (expected,) = tales_reference.tokens(ids, max_new_tokens=12, stop_strings=[stop], **theirs)
        sequence = tales_model.generate(PROMPT, max_new_tokens=12, stop=stop, **options).sequences[0]
        assert sequence.token_ids == expected, stop
        if "num_beams" not in options:  # a beam that goes on may be better than one that stopped
            assert len(expected) < 12
            assert (sequence.text, sequence.finish_reason) == ("", "stop")
            assert list(tales_model.stream(PROMPT, max_new_tokens=12, stop=stop, **options)) == []


def test_text_that_only_begins_like_a_stop_string_is_shown(tales_model: gpt2onnx.Model) -> None:
    plain = tales_model.generate(PROMPT, max_new_tokens=12).text
    stream = tales_model.stream(PROMPT, max_new_tokens=12, stop=[PROMPT[-4:] + plain[:9] + "#"])
    assert "".join(stream) == stream.result.text == plain
    assert stream.result.sequences[0].finish_reason == "length"


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


def test_the_clock_starts_with_the_prompt_and_ends_with_the_text(tales_model: gpt2onnx.Model) -> None:
    stream = tales_model.stream(PROMPT, max_new_tokens=30, max_time=0.5)
    time.sleep(0.6)  # until somebody reads, nothing is computed
    started = time.perf_counter()
    assert "".join(stream)
    assert stream.result.seconds <= time.perf_counter() - started
    assert len(stream.result.sequences[0].token_ids) > 1
    left = tales_model.stream(PROMPT, max_new_tokens=30)
    next(left)
    left.close()
    seconds = left.result.seconds
    time.sleep(0.01)
    assert left.result.seconds == seconds > 0


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
            tales_model.open_stream(Request(PROMPT, tales_model.generation_config.merged(options)))
