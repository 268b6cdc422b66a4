"""Encodings of what goes into commands and comes out: every one gives what UTF-8 gives."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine, Finished, run
from support.systems import posix

from gpt2onnx.cli.main import main

TEXT = "The old king said: «Zoë, it is late.»\nAnd so she went home.\n"
Encoded = tuple[bytes, list[str]]
WAYS: dict[str, Callable[[str], Encoded]] = {
    "CRLF": lambda text: (text.replace("\n", "\r\n").encode(), []),
    "UTF-8 with its mark": lambda text: (text.encode("utf-8-sig"), []),
    "UTF-16": lambda text: (text.replace("\n", "\r\n").encode("utf-16"), []),
    "UTF-16 without its mark": lambda text: (text.encode("utf-16-le"), ["--encoding", "utf-16-le"]),
    "Latin-1": lambda text: (text.encode("latin-1"), ["--encoding", "latin-1"]),
    "cp1252": lambda text: (text.replace("\n", "\r\n").encode("cp1252"), ["--encoding", "cp1252"]),
}
# Commands that read a prompt, and such that read a text file.
PROMPTS = [("tokens",), ("generate", "--max-new-tokens", "4"), ("next", "--top", "3")]
FILES = [("eval", "--context", "8"), ("generate", "--max-new-tokens", "4", "--file")]


def timeless(text: str) -> list[Any]:
    """JSON lines without what differs from run to run, or with the file's name."""
    records = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in each.items() if name not in ("seconds", "text_file")} for each in records]


# Every way with one command, and every command with a way that is found out and with one that is named.
PAIRS = [(way, PROMPTS[0]) for way in WAYS] + [(way, each) for each in PROMPTS[1:] for way in ("UTF-16", "cp1252")]
FILE_PAIRS = [(way, each) for each in FILES for way in ("UTF-16", "cp1252")]


@pytest.mark.parametrize(("way", "command"), PAIRS)
def test_prompts(way: str, command: tuple[str, ...], command_line: CommandLine, tales_bundle: Path) -> None:
    content, options = WAYS[way](TEXT)
    common = [*command, "-m", tales_bundle, "--json"]
    done = command_line(*common, *options, stdin=content)
    assert (done.code, done.err) == (0, "")
    assert timeless(done.out) == timeless(command_line(*common, stdin=TEXT).out)


@pytest.mark.parametrize(("way", "command"), FILE_PAIRS)
def test_texts(
    way: str, command: tuple[str, ...], command_line: CommandLine, tales_bundle: Path, tmp_path: Path
) -> None:
    content, options = WAYS[way](TEXT)
    plain, encoded = tmp_path / "plain.txt", tmp_path / "encoded.txt"
    plain.write_bytes(TEXT.encode())
    encoded.write_bytes(content)
    common = ["-m", tales_bundle, "--json"]
    expected = timeless(command_line(*command, plain, *common).out)
    assert timeless(command_line(*command, encoded, *common, *options).out) == expected
    assert timeless(command_line(*command, "-", *common, *options, stdin=content).out) == expected


@pytest.mark.parametrize("way", WAYS)
def test_request_files(way: str, command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    prompts = ["Zoë said", "The king's café", "Once"]
    lines = [json.dumps({"id": index, "prompt": each}, ensure_ascii=False) for index, each in enumerate(prompts)]
    content, options = WAYS[way]("\n".join(lines) + "\n\n")
    file = tmp_path / "requests.jsonl"
    file.write_bytes(content)
    job = ["generate", "-m", tales_bundle, "--max-new-tokens", 3, "--input"]
    done = command_line(*job, file, *options)
    records = timeless(done.out)
    assert [record["prompt"] for record in records] == prompts
    assert timeless(command_line(*job, "-", *options, stdin=content).out) == records
    assert "3 done, 0 failed" in done.err


def test_what_is_not_in_the_encoding_is_refused(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"one\ncaf\xe9")
    for arguments, stdin in [
        (("generate",), b"one\ncaf\xe9"),
        (("generate", "--file", file), b""),
        (("tokens",), b"one\ncaf\xe9"),
        (("next",), b"one\ncaf\xe9"),
        (("eval", file), b""),
        (("eval", "-"), b"one\ncaf\xe9"),
    ]:
        done = command_line(*arguments, "-m", tales_bundle, stdin=stdin)
        assert (done.code, done.out) == (1, "")
        assert "line 2: byte 0xe9 is not UTF-8" in done.err
        assert "--encoding latin-1" in done.err
    requests = b'{"id": 1, "prompt": "Once"}\n\n{"id": 2, "prompt": "caf\xe9"}\n'
    done = command_line("generate", "-m", tales_bundle, "--max-new-tokens", 2, "--input", "-", stdin=requests)
    good, bad = timeless(done.out)
    assert (done.code, good["prompt"]) == (0, "Once")
    assert bad["error"].startswith("standard input, line 3: byte 0xe9 is not UTF-8")


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_grids(codec: str, command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    """`--print-grid > grid.toml` of an older PowerShell writes UTF-16."""
    grid = tmp_path / "grid.toml"
    grid.write_bytes('prompts = ["Zoë"]\r\n[[strategy]]\r\nname = "à la carte"\r\n'.encode(codec))
    done = command_line(
        "sweep", grid, "-m", tales_bundle, "--no-energy", "--max-new-tokens", 2, "--out", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    (run,) = json.loads(done.out)
    assert (run["prompt"], run["strategy"]) == ("Zoë", "à la carte")


@pytest.fixture
def in_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Runs a command whose standard streams have an encoding: in_encoding("cp1252", "tokens", stdin="Once")."""

    def run(encoding: str, *arguments: object, stdin: str = "") -> Finished:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        streams["stdin"] = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding)
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            patch.setattr(sys, "argv", ["gpt2onnx", *map(str, arguments)])
            with pytest.raises(SystemExit) as exit_:
                main()
            streams["stderr"].flush()
        # click writes UTF-8 where standard output is ASCII.
        reader = "utf-8" if encoding == "ascii" else encoding
        out, err = (streams[name].buffer.getvalue().decode(reader) for name in ("stdout", "stderr"))  # type: ignore[attr-defined]
        return Finished(int(exit_.value.code or 0), out, err)

    return run


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_is_json_in_any_encoding(
    encoding: str, in_encoding: Callable[..., Finished], tales_bundle: Path, tmp_path: Path
) -> None:
    prompt = "Zoë: “日本” 😀"
    file = tmp_path / "ä.jsonl"
    requests = [
        {"id": prompt, "prompt": prompt},
        {"id": "\ud800", "prompt": prompt},
        {"id": 3, "prompt": prompt, "né": 1},
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in requests))
    text = tmp_path / "ö.txt"
    text.write_text("It is a long text.", "utf-8")
    grid = tmp_path / "grid.toml"
    grid.write_text('[[strategy]]\nname = "né"\n', "utf-8")
    model = ["-m", tales_bundle]

    def load(*arguments: object, stdin: str = "") -> list[Any]:
        done = in_encoding(encoding, *arguments, stdin=stdin)
        assert done.code == 0, done.err
        assert encoding != "ascii" or done.out.isascii()
        return [json.loads(done.out)] if "--input" not in arguments else list(map(json.loads, done.out.splitlines()))

    (one,) = load("generate", "--json", "--max-new-tokens", 2, *model, stdin=prompt)
    assert one["prompt"] == prompt
    *done, failed = load("generate", "--input", file, "--max-new-tokens", 2, *model)
    assert [each["id"] for each in done] == [prompt, "\ud800"]
    assert [each["sequences"] for each in done] == [one["sequences"]] * 2
    assert "'né'" in failed["error"]
    assert load("tokens", "--json", *model, stdin=prompt)[0]["text"] == prompt
    assert load("next", "--json", *model, stdin=prompt)[0]["prompt"] == prompt
    assert load("eval", text, "--json", *model)[0]["text_file"] == str(text)
    sweep = ["sweep", grid, "--prompt", "Once", "--out", tmp_path / encoding, "--no-energy", "--max-new-tokens", 2]
    assert load(*sweep, "--json", *model)[0][0]["strategy"] == "né"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_text_never_raises(encoding: str, in_encoding: Callable[..., Finished], tales_bundle: Path) -> None:
    for arguments in (["generate", "--echo", "--max-new-tokens", 2], ["tokens"], ["next", "--top", 2]):
        done = in_encoding(encoding, *arguments, "-m", tales_bundle, stdin="Zoë: “日本” 😀")
        assert (done.code, done.err) == (0, "")
        assert done.out
    failed = in_encoding(encoding, "inspect", "nö-such-model-日")
    assert (failed.code, failed.err.count("\n"), "Traceback" in failed.err) == (1, 1, False)


def test_text_never_raises_in_a_process_of_its_own(tales_bundle: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
    done = run("tokens", "Zoë: “日本” 😀".encode(), "-m", tales_bundle, env=environment, text=False)
    assert (done.code, done.err) == (0, b"")


@posix
def test_arguments_are_bytes_of_an_encoding(command_line: CommandLine, tales_bundle: Path) -> None:
    command = ["tokens", "-m", tales_bundle, "--json", b"caf\xe9"]
    latin, named = (
        run(*command, *more, env=os.environ | {"PYTHONUTF8": "1"}, text=False)
        for more in ([], ["--encoding", "latin-1"])
    )
    assert latin.code == 1
    assert b"byte 0xe9 is not UTF-8" in latin.err
    assert json.loads(named.out) == json.loads(command_line("tokens", "-m", tales_bundle, "--json", "café").out)
