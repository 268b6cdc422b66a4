"""Prompts and stop strings on the command line: escapes, dashes."""

import json
from pathlib import Path

import pytest
from support.commands import CommandLine

import gpt2onnx
from gpt2onnx.cli.prompt_options import unescape

SHORT = ["--max-new-tokens", 12]


def test_stop_strings_with_escapes(command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model) -> None:
    def sequence(*arguments: object) -> dict[str, object]:
        done = command_line("generate", *arguments, "-m", tales_bundle, "--json", "--max-new-tokens", 60)
        return json.loads(done.out)["sequences"][0]

    prompt = "The old king"
    expected = tales_model.generate(prompt, stop="\n", max_new_tokens=60).sequences[0]
    assert (expected.finish_reason, "\n" in expected.text) == ("stop", False)
    assert sequence(prompt, "-e", "--stop", r"\n")["token_ids"] == expected.token_ids
    assert sequence(prompt, "--stop", "\n")["token_ids"] == expected.token_ids
    assert sequence(prompt, "--stop", r"\n")["finish_reason"] == "length", "without -e it is a backslash and an n"
    several = ["--escape", "--stop", r"\t", "--stop", r"\x0a"]
    assert sequence(prompt, *several)["token_ids"] == expected.token_ids
    lines = tales_model.generate("Once\nupon \\ a", max_new_tokens=60).sequences[0]
    assert sequence(r"Once\nupon \\ a", "-e")["token_ids"] == lines.token_ids


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"a\nb\rc\td", "a\nb\rc\td"),
        (r"\'\"\\n", "'\"\\n"),
        (r"\\\n", "\\\n"),
        (r"\x41\xc3\xA9\xe2\x80\x9c", "Aé“"),
        (r"\q\u00e9\x4", r"\q\u00e9\x4"),
        ("é\\", "é\\"),
    ],
)
def test_escapes_are_those_of_llama_cpp(escaped: str, text: str) -> None:
    """Its README lists them; an unknown one stays as it is."""
    assert unescape(escaped) == text


@pytest.mark.parametrize("command", ["generate", "tokens", "next"])
def test_a_prompt_may_be_an_item_of_a_list(command: str, command_line: CommandLine, tales_bundle: Path) -> None:
    common = [command, "-m", tales_bundle, "--json", *(SHORT if command == "generate" else [])]
    expected = command_line(*common, stdin="- one thing")
    for arguments in (["- one thing"], ["-q", "- one thing"], ["--", "- one thing"]):
        done = command_line(*common, *arguments)
        assert (done.code, done.err) == (0, "")
        alike = [json.loads(each) for each in (done.out, expected.out)]
        for record in alike:
            record.pop("seconds", None)
        assert alike[0] == alike[1]
    before = command_line(command, "- one thing", *common[1:])
    assert before.code == 0
    assert command_line(*common, "- one thing", "- another").code == 2


def test_the_value_of_an_option_may_be_one_too(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    done = command_line("generate", "- milk\n- eggs\n", "--stop", "- ", "-m", tales_bundle, "--json", *SHORT)
    expected = tales_model.generate("- milk\n- eggs\n", stop="- ", max_new_tokens=12)
    assert json.loads(done.out)["sequences"] == expected.to_dict()["sequences"]
