"""Request files: one result a line, in order, whatever the lines hold and however often the job is cut off."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

import gpt2onnx
from gpt2onnx.runtime import jobs
from gpt2onnx.runtime.jsontext import to_line
from gpt2onnx.runtime.text import text_input

GOOD = '{"id": "good", "prompt": "Once upon a time", "max_new_tokens": 2}'
BAD = {
    "no JSON": '{"id": 1, "prompt": "Once',
    "a list": '["Once upon a time"]',
    "a number": "5",
    "no prompt": '{"id": 1}',
    "both": '{"prompt": "a", "prompt_ids": [1]}',
    "prompt of a wrong type": '{"prompt": 5}',
    "ids of a wrong type": '{"prompt_ids": "abc"}',
    "half a token": '{"prompt_ids": [1, 2.5]}',
    "no token": '{"prompt_ids": [true]}',
    "token outside": '{"prompt_ids": [99999]}',
    "huge token": '{"prompt_ids": [' + "9" * 40 + "]}",
    "negative token": '{"prompt_ids": [-1]}',
    "too long": json.dumps({"prompt_ids": [1] * 600}),
    "unknown option": '{"prompt": "a", "top_q": 1}',
    "option of a wrong type": '{"prompt": "a", "num_beams": "4"}',
    "contradiction": '{"prompt": "a", "num_beams": 2, "num_return_sequences": 3}',
    "NaN": '{"prompt": "a", "temperature": NaN}',
    "infinity": '{"prompt": "a", "length_penalty": -Infinity}',
    "too large for a float": '{"prompt": "a", "temperature": 1e999}',
    "huge number": '{"prompt": "a", "num_beams": ' + "9" * 30 + "}",
    "thousands of digits": '{"prompt": "a", "top_k": ' + "9" * 6000 + "}",
    "thousands of digits of a token": '{"prompt": "a", "logit_bias": {"' + "9" * 6000 + '": 1}}',
    "deep nesting": '{"a":' * 50_000,
    "deep list": "[" * 100_000,
    "bad word outside": '{"prompt": "a", "bad_words_ids": [[99999]]}',
    "no room": '{"prompt_ids": [1, 2, 3], "max_length": 3}',
    "streamed nothing": '{"prompt": "a", "stop": [""]}',
}


def run(model: gpt2onnx.Model, lines: list[str], batch_size: int = 3, **options: Any) -> list[dict[str, Any]]:
    file = io.BytesIO("\n".join(lines).encode())
    records = list(
        jobs.run(model, text_input.lines(file, "requests"), model.generation_config.merged(options), batch_size)
    )
    for record in records:
        json.loads(to_line(record), parse_constant=pytest.fail)
        assert "\n" not in to_line(record)
    return records


@pytest.mark.parametrize("name", BAD)
def test_bad_line_stops_nothing(tales_model: gpt2onnx.Model, name: str) -> None:
    first, bad, last = run(tales_model, [GOOD, BAD[name], GOOD], 2)
    assert set(bad) == {"id", "error"}
    assert bad["error"]
    assert "\n" not in bad["error"]
    assert len(bad["error"]) < 300
    assert first["sequences"] == last["sequences"] != []


def test_a_bad_line_can_be_found_by_its_error(tales_model: gpt2onnx.Model) -> None:
    lines = [
        '{"id": 2, "prompt": "x"',
        '{"id": "p", "prompt": "x", "temperature": NaN}',
        "[]",
        '{"id": 1e400, "prompt": "x"}',
    ]
    brace, number, array, infinite = run(tales_model, lines)
    assert (infinite["id"], "1e400 is not JSON" in infinite["error"]) == (None, True)
    assert lines[0] in brace["error"]
    assert "Expecting ',' delimiter" in brace["error"]
    assert (number["id"], "NaN is not JSON" in number["error"]) == ("p", True)
    assert "the line '[]' is not a JSON object" in array["error"]


def test_order_and_ids(tales_model: gpt2onnx.Model) -> None:
    ids: list[Any] = ["a", 1, None, {"x": [1]}, "a", True, 2.5, "\ud800"]
    lines = [
        json.dumps({"id": name, "prompt": "The cat" if index % 3 else 7, "max_new_tokens": 1 + 5 * (index % 2)})
        for index, name in enumerate(ids)
    ]
    lines[3:3] = ["", "   "]  # passed over
    for batch_size in (1, 3, 8):
        records = run(tales_model, lines, batch_size)
        assert [record["id"] for record in records] == ids
        assert [index for index, record in enumerate(records) if "error" in record] == [0, 3, 6]


def test_options_of_a_line(tales_model: gpt2onnx.Model) -> None:
    requests: list[dict[str, Any]] = [
        {"stop": ["."]}, {"stop": "."}, {"logprobs": 3}, {"do_sample": True, "seed": 7}, {"num_beams": 3, "early_stopping": "never"},
        {"temperature": 0.5, "top_k": 3, "seed": 4}, {"temperature": 0, "top_k": 3},
        {"eos_token_id": [262, 13], "min_new_tokens": 3}, {"bad_words_ids": [[262], [13, 14]], "suppress_tokens": [5]},
        {"sequence_bias": [[[262], 2.5]], "forced_eos_token_id": [13], "exponential_decay_length_penalty": [3, 1.5]},
        {"do_sample": True, "seed": 2, "top_h": 0.5, "eta_cutoff": 0.01, "renormalize_logits": True},
    ]  # fmt: skip
    lines = [json.dumps({"prompt": "Once upon a time", "max_new_tokens": 12} | one) for one in requests]
    for request, record in zip(requests, run(tales_model, lines), strict=True):
        expected = tales_model.generate("Once upon a time", max_new_tokens=12, **request)
        (sequence,), (alone,) = record["sequences"], expected.to_dict()["sequences"]
        for one, other in zip(sequence.pop("logprobs") or [], alone.pop("logprobs") or [], strict=True):
            assert one["token_id"] == other["token_id"]
            assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
            assert [token for token, _ in one["top"]] == [token for token, _ in other["top"]]
        assert sequence.pop("score") == pytest.approx(alone.pop("score"), abs=1e-5)
        assert sequence == alone, request
        assert record["prompt_ids"] == expected.prompt_ids
        assert record["usage"] == expected.usage


@pytest.mark.parametrize(
    ("command", "line", "sampled"),
    [
        ({}, {"temperature": 0.8}, True),
        ({}, {"seed": 3}, True),
        ({}, {"top_k": 5, "num_beams": 2}, True),
        ({"min_p": 0.1}, {}, True),
        ({"seed": 3}, {"num_beams": 2}, True),
        ({"do_sample": False}, {"top_p": 0.8}, True),
        ({"temperature": 0}, {"top_p": 0.8}, True),
        ({"temperature": 0.8}, {"do_sample": False}, False),
        ({"temperature": 0.8}, {"temperature": 0}, False),
        ({"temperature": 0.8, "do_sample": False}, {}, False),
        ({}, {"temperature": 0.8, "seed": 3, "do_sample": False}, False),
        ({}, {"top_k": None}, False),
        ({}, {"num_beams": 2, "repetition_penalty": 1.2}, False),
    ],
)
def test_a_sampling_option_turns_sampling_on_unless_do_sample_is_false(
    tales_model: gpt2onnx.Model, command: dict[str, Any], line: dict[str, Any], sampled: bool
) -> None:
    (record,) = run(tales_model, [json.dumps({"prompt": "Once", "max_new_tokens": 6} | line)], **command)
    assert (record["seed"] is not None) == sampled
    # As if the line itself had asked for it.
    options = {"temperature": 1.0} | command | line
    options |= {"do_sample": sampled, "seed": record["seed"], "temperature": options["temperature"] or 1.0}
    expected = tales_model.generate("Once", max_new_tokens=6, **options)
    assert record["sequences"] == expected.to_dict()["sequences"]


def test_lines_are_read_as_there_is_room(tales_model: gpt2onnx.Model) -> None:
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for index in range(10_000):
            read += 1
            yield "{" if index % 3 == 0 else GOOD

    batch_size = 4
    for done, _ in enumerate(jobs.run(tales_model, lines(), tales_model.generation_config, batch_size), 1):
        # Those in the batch, with the bad ones between them, and those that wait for an earlier one.
        assert read - done <= 3 * batch_size
        if done == 60:
            break


def test_impossible_log_probability_is_null(tales_model: gpt2onnx.Model) -> None:
    everything = list(range(8192))
    line = json.dumps({"prompt": "a", "suppress_tokens": everything, "max_new_tokens": 1, "logprobs": 1})
    ((record),) = run(tales_model, [line])
    assert json.loads(to_line(record))["sequences"][0]["logprobs"][0]["processed_logprob"] is None
