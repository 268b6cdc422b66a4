"""Files without end, in every place where a command reads one: a limit, in one line, in bounded time."""

import os
from pathlib import Path

import pytest
from support.commands import run
from support.fuzzing import ASKED, SECONDS
from support.systems import posix

ZERO = Path("/dev/zero")
# Commands, and what the message has to say.
READERS: dict[str, str] = {
    "serve --port 0 --chat-template /dev/zero": "more than 1,048,576 bytes",
    "generate a --energy /dev/zero": "has other columns",
    "serve --port 0 --api-key-file /dev/zero": "more than 1,048,576 bytes",
    "unpack /dev/zero target": "not made by 'gpt2onnx pack'",
    "export /dev/zero target": "no checkpoint",
    "generate --file /dev/zero": "more than 268,435,456 bytes",
    "generate": "more than 268,435,456 bytes",
    "eval /dev/zero": "more than 268,435,456 bytes",
    "tokens": "more than 268,435,456 bytes",
    "next": "more than 268,435,456 bytes",
    "generate a --tokenizer /dev/zero": "has no tokenizer",
    "generate a --draft-model /dev/zero": "/dev/zero",
    "generate --input /dev/zero --fail-on-error": "1 of 1 request",
}
# The others take hundreds of megabytes, or have tests of their own.
FEW = 1


@posix
@pytest.mark.parametrize("command", list(READERS) if ASKED else list(READERS)[:FEW])
def test_files_without_end(command: str, tales_bundle: Path, tmp_path: Path) -> None:
    name, *arguments = command.split()
    model = [] if name in ("unpack", "export") else ["-m", tales_bundle]
    begin = os.times()
    with ZERO.open("rb") as endless:
        done = run(name, *model, *arguments, stdin=endless, cwd=tmp_path, seconds=6 * SECONDS)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert READERS[command] in last
    assert len(done.err.splitlines()) == 1 + ("--input" in command)
    spent = os.times()
    # Of the processor: others may be busy.
    assert spent.children_user + spent.children_system < begin.children_user + begin.children_system + SECONDS
