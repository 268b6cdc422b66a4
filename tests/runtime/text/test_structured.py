"""Structured output: texts that other libraries find valid, whatever chooses the tokens and whoever decodes beside it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.commands import CommandLine

import gpt2onnx
from gpt2onnx.errors import OptionError, install_command
from gpt2onnx.runtime import jobs

PROMPT = "Once upon a time there was a"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["old", "poor"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["a king", "a queen", 'a "line\nbreak"', "ein Kön"]
STRUCTURES: dict[str, Any] = {
    "json_schema": PERSON,
    "regex": "[A-Z][a-z]{2,9} [0-9]{3}",
    "choice": CHOICES,
    "grammar": 'start: "(" word ("," word)* ")"\nword: /[a-z]{1,4}/',
}
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"seed": 1},
    {"seed": 2, "num_return_sequences": 3, "temperature": 2.0},
    {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 3, "do_sample": True, "seed": 3},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"guidance_scale": 1.5},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
]


def check(name: str, text: str) -> None:
    """Raises if a complete text isn't what the option asks for, in the view of another library."""
    if name == "json_schema":
        jsonschema.validate(json.loads(text), PERSON)
    else:
        patterns = {"choice": "|".join(map(re.escape, CHOICES)), "grammar": r"\([a-z]{1,4}(,[a-z]{1,4})*\)"}
        assert re.fullmatch(patterns.get(name, STRUCTURES["regex"]), text), text


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_complete_texts_are_valid(tales_model: gpt2onnx.Model, name: str, options: dict[str, Any]) -> None:
    if name == "json_schema" and "no_repeat_ngram_size" in options:
        options = {"repetition_penalty": 1.3}  # JSON repeats its quotes
    result = tales_model.generate(PROMPT, **{name: STRUCTURES[name]}, max_new_tokens=100, **options)
    reasons = [sequence.finish_reason for sequence in result.sequences]
    assert "stop" in reasons or name == "grammar"
    for sequence in result.sequences:
        if sequence.finish_reason == "stop" and (sequence.score is None or sequence.score > -1e6):
            check(name, sequence.text)


@pytest.mark.parametrize("name", STRUCTURES)
def test_beside_others_streamed_and_drafted(tales_model: gpt2onnx.Model, name: str) -> None:
    prompts = [PROMPT, "The king", "In the forest there lived"]
    for options in ({}, {"seed": 9}):
        given = {name: STRUCTURES[name], "max_new_tokens": 60, **options}
        alone = [tales_model.generate(prompt, **given).sequences for prompt in prompts]
        assert [result.sequences for result in tales_model.generate(prompts, **given)] == alone
        assert [result.sequences for result in tales_model.generate(prompts, prompt_lookup=4, **given)] == alone
        for prompt, (sequence,) in zip(prompts, alone, strict=True):
            assert "".join(tales_model.stream(prompt, **given)) == sequence.text


def test_a_draft_model_keeps_to_it(tales_model: gpt2onnx.Model, tales_int8_bundle: Path) -> None:
    drafted = gpt2onnx.load(tales_model.bundle.folder, draft_model=tales_int8_bundle, draft_length=4)
    for options in ({}, {"seed": 5}):
        given = {"json_schema": PERSON, "max_new_tokens": 60, **options}
        assert drafted.generate(PROMPT, **given).sequences == tales_model.generate(PROMPT, **given).sequences


# Nothing is possible behind " see the", and everything behind " see that".
DEAD_END: dict[str, Any] = {"choice": [" see that ok", " see the~"], "suppress_tokens": [93], "max_new_tokens": 12}


def test_a_dead_end_harms_no_other_request(tales_model: gpt2onnx.Model) -> None:
    lines = [
        {"prompt": PROMPT, "max_new_tokens": 8},
        {"prompt": PROMPT, **DEAD_END, "choice": [" a~"]},
        {"prompt": "The"},
    ]
    alone = tales_model.generate(PROMPT, max_new_tokens=8).sequences[0].token_ids
    for batch_size in (1, 3):
        first, second, third = jobs.run(tales_model, map(json.dumps, lines), tales_model.generation_config, batch_size)
        assert second["error"] == "other options leave no token that choice allows"
        assert first["sequences"][0]["token_ids"] == alone
        assert third["sequences"][0]["text"]
    with pytest.raises(OptionError, match="leave no token that choice allows"):
        list(tales_model.stream(PROMPT, **{**DEAD_END, "choice": [" a~"]}))


def test_a_dead_end_of_a_beam_or_a_draft_is_none_of_the_text(tales_model: gpt2onnx.Model) -> None:
    for beams in (
        {},
        {"num_beams": 2},
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1},
    ):
        assert tales_model.generate("I say you", **DEAD_END, **beams).text == " see that ok"
    drafting = gpt2onnx.load(tales_model.bundle.folder, draft_model=tales_model.bundle.folder, draft_length=4)
    network = drafting._scheduler._drafter._network  # type: ignore[union-attr]
    assert network is not None
    the = tales_model.tokenizer.encode(" see the")[-1]
    forward = network.forward
    network.forward = lambda *given: forward(*given) + 99 * (np.arange(8192) == the)  # type: ignore[method-assign]
    assert drafting.generate("I say you", **DEAD_END).text == " see that ok"


def test_a_line_without_its_extra_harms_no_other(tales_model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = gpt2onnx.load(tales_model.bundle.folder, threads=1)
    lines = [{"prompt": "a", "max_new_tokens": 2}, {"prompt": "a", "regex": "a"}, {"prompt": "b", "max_new_tokens": 2}]
    records = list(jobs.run(model, map(json.dumps, lines), model.generation_config))
    assert [install_command("structured") in record.get("error", "") for record in records] == [False, True, False]


def test_ends_with_the_text_and_not_before(tales_model: gpt2onnx.Model) -> None:
    cut = tales_model.generate(PROMPT, json_schema=PERSON, max_new_tokens=5).sequences[0]
    assert cut.finish_reason == "length"
    (whole,) = tales_model.generate(PROMPT, choice=["king"], max_new_tokens=30, eos_token_id=None).sequences
    assert (whole.text, whole.finish_reason) == ("king", "stop")
    longer = tales_model.generate(PROMPT, regex="(ha)+", max_new_tokens=6, eos_token_id=None).sequences[0]
    assert (re.fullmatch("(ha)+|(ha)*h", longer.text) is not None, longer.finish_reason) == (True, "length")


# llguidance follows references and levels by recursion, and a process ends where its stack does.
REFERENCES = {
    "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(1000)} | {"d1000": {"type": "integer"}},
    "$ref": "#/$defs/d0",
}
NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(2000):
    NESTED = {"items": NESTED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "regex can't be used: .*unclosed group"),
        ({"json_schema": REFERENCES}, "^json_schema can't be used: it has 1,001 references, more than the 500"),
        ({"json_schema": json.dumps(REFERENCES).replace("$ref", r"\u0024ref")}, "it has 1,001 references"),
        (
            {"json_schema": '{"items":' * 200 + "{}" + "}" * 200},
            "^json_schema can't be used: it is nested 201 levels deep",
        ),
        ({"json_schema": NESTED}, "^json_schema can't be used: it is nested too deep"),
        (
            {"grammar": "start: " + "(" * 2000 + '"x"' + ")" * 2000},
            "^grammar can't be used: it is nested 2,000 levels deep",
        ),
        (
            {"grammar": "\n".join(["start: r0", *(f"r{n}: r{n + 1}" for n in range(900)), 'r900: "x"'])},
            "it has 902 colons",
        ),
        ({"regex": "a?" * 20_000}, "^regex can't be used: it has 40,000 letters, more than the 32,768"),
        ({"regex": "a{1000000}"}, "^regex is too large: lexer error: too many expressions"),
        ({"regex": "a{1000000}", "num_beams": 2}, "^regex is too large: lexer error: too many expressions"),
        ({"json_schema": "[1"}, "json_schema can't be used: EOF"),
        ({"json_schema": {"type": "strng"}}, "json_schema can't be used: Invalid type: strng"),
        ({"grammar": "x{"}, "grammar can't be used: "),
        ({"choice": []}, "choice must be a list"),
        ({"regex": "a", "choice": ["b"]}, "regex excludes choice"),
        ({"choice": ["b"], "suppress_tokens": list(range(8192))}, "other options leave no token that choice allows"),
    ],
)
def test_refused_in_one_line(tales_model: gpt2onnx.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tales_model.generate(PROMPT, **options)


def test_command_line(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    command = ["generate", PROMPT, "-m", tales_bundle, "--max-new-tokens", 80]
    check("json_schema", command_line(*command, "--json-schema", schema).out.removesuffix("\n"))
    check("regex", command_line(*command, "--regex", STRUCTURES["regex"]).out.removesuffix("\n"))
    done = command_line(*command, "--choice", "yes", "--choice", "no", "--json")
    assert json.loads(done.out)["sequences"][0]["text"] in ("yes", "no")
    done = command_line(*command, "--json-schema", tmp_path / "none.json")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "none.json" in done.err


def test_needs_its_extra(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line("generate", "a", "-m", tales_bundle, "--regex", "a", without=("llguidance",))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert install_command("structured") in done.err
