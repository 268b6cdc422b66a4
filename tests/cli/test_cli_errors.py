"""Wrong input: one line that helps, exit code 1 or 2, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine, Finished, run
from support.systems import linux, posix

import gpt2onnx

Snapshot = dict[str, int]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with an empty cache beside it."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


def snapshot(place: Path) -> Snapshot:
    """Everything in the folder and beside it, hidden files too."""
    return {
        str(path.relative_to(place.parent)): path.stat().st_mtime_ns if path.is_file() else -1
        for path in place.parent.rglob("*")
    }


def assert_one_line(done: Finished, code: int, hint: str) -> None:
    assert (done.code, done.out) == (code, ""), done.err
    assert done.err.startswith("gpt2onnx: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    assert hint in done.err


# What is done to a good checkpoint, and what the message has to name: what is read first, and what is read last.
# More: tests/exporter/checkpoint/test_broken_checkpoints.py.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a GPT-2": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "not a GPT-2"),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "broken options": (lambda folder: (folder / "generation_config.json").write_text("?"), "generation_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(
    damage: str, place: Path, command_line: CommandLine, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    spoil, hint = DAMAGE[damage]
    spoil(folder)
    before = snapshot(place)
    assert_one_line(command_line("export", folder, "bundle"), 1, hint)
    assert snapshot(place) == before
    assert_one_line(command_line("generate", "Once", "-m", folder), 1, hint)
    assert not [path for path in place.parent.rglob("*") if path.is_file()], "something is left in the cache"


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("no-such-model", "no checkpoint 'no-such-model'"),
        ("nobody/no-such-model", "nobody/no-such-model"),
        ("./nowhere", "./nowhere"),
        ("/nowhere/at/all", "/nowhere/at/all"),
        ("a/b/c", "a/b/c"),
        ("not an id!", "not an id!"),
        ("empty", "empty has no"),
        ("x" * 300, "xxx"),
    ],
)
def test_no_such_model(source: str, hint: str, place: Path, command_line: CommandLine) -> None:
    (place / "empty").mkdir()
    before = snapshot(place)
    assert_one_line(command_line("export", source, "bundle"), 1, hint)
    assert snapshot(place) == before
    for command in (["generate", "Once", "-m"], ["inspect"]):
        assert_one_line(command_line(*command, source), 1, hint)
    assert not [path for path in place.parent.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        pytest.param("/dev/null/bundle", "/dev/null", marks=posix),
        ("file", "not a folder"),
        ("file/bundle", "file"),
        ("full", "not a bundle"),
        ("x" * 300, "too long"),
        ("/proc/bundle", "/proc"),
    ],
)
def test_unwritable_targets(target: str, hint: str, place: Path, command_line: CommandLine) -> None:
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "file").write_text("mine")
    before = snapshot(place)
    for force in ([], ["--force"]):
        assert_one_line(command_line("export", "tales", target, *force), 1, hint)
        assert snapshot(place) == before


def test_a_bug_in_the_middle_leaves_nothing(place: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise ZeroDivisionError

    before = snapshot(place)
    with pytest.raises(ZeroDivisionError):
        gpt2onnx.export("tales", place / "bundle", progress=fail)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--dtype", "fp32", "--pure"], "pure"),
        (["--block-size", 32], "block_size"),
        (["--dtype", "int4", "--block-size", 48], "block_size"),
    ],
)
def test_export_options_that_contradict(
    arguments: list[object], hint: str, place: Path, command_line: CommandLine
) -> None:
    before = snapshot(place)
    assert_one_line(command_line("export", "tales", "bundle", *arguments), 1, hint)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["tale " * 600], "context window 512"),
        (["--prompt-ids", ",".join(["1"] * 513)], "513 tokens"),
        (["--prompt-ids", "1,8192"], "8192"),
        (["--prompt-ids=-1"], "-1"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "--max-length", 1], "max_length"),
        (["x", "--num-beams", 2, "--num-return-sequences", 3], "num_return_sequences"),
        (["x", "--num-beams", 2, "--stream"], "stream"),
        (["x", "--bad-words-ids", "[[9000]]"], "bad_words_ids"),
        (["x", "--sequence-bias", "[[5,1]]"], "sequence_bias"),
        (["--prompt-ids", "1", "--forced-bos-token-id", 9000], "forced_bos_token_id"),
        (["x", "--exponential-decay-length-penalty", "5,0"], "exponential_decay_length_penalty"),
        (["x", "--stop", ""], "stop"),
        (["x", "--device", "abacus"], "abacus"),
        (["x", "--truncate", "left", "--max-new-tokens", 512], "ask for fewer"),
        (["--file", "nothing.txt"], "can't read nothing.txt"),
        (["--file", "."], "can't read ."),
        (["--input", "nothing.jsonl"], "nothing.jsonl"),
        (["--input", "."], "."),
        (["--input", "some.jsonl", "--output", "nowhere/out.jsonl"], "nowhere/out.jsonl"),
        pytest.param(["--input", "some.jsonl", "--output", "/dev/full"], "/dev/full", marks=linux),
        (["--input", "some.jsonl", "--output", "../place/some.jsonl"], "is the input"),
        (["--input", "some.jsonl", "--output", "some.jsonl", "--resume"], "is the input"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_values_that_cannot_be_used(
    arguments: list[object], hint: str, place: Path, command_line: CommandLine, tales_bundle: Path
) -> None:
    """One of each kind: the ranges of all options are those of the table, which tests/runtime/test_options.py goes through."""
    (place / "some.jsonl").write_text('{"id": 1, "prompt": "x", "max_new_tokens": 1}\n')
    before = snapshot(place)
    assert_one_line(command_line("generate", "-m", tales_bundle, *arguments), 1, hint)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["frobnicate"], "frobnicate"),
        (["generat", "x"], "did you mean 'generate'?"),
        (["generate", "x", "--nonsense"], "--nonsense"),
        (["generate", "x", "--top-k", "many"], "many"),
        (["generate", "--prompt-ids", ""], "--prompt-ids"),
        (["generate", "--prompt-ids", "1,b"], "1,b"),
        (["generate", "x", "--bad-words-ids", "{"], "{"),
        (["generate", "x", "--early-stopping", "maybe"], "maybe"),
        (["generate", "x", "--prompt-ids", "1"], "--prompt-ids"),
        (["generate", "x", "--input", "f"], "--input"),
        (["generate", "x", "--file", "f"], "--file"),
        (["generate", "--file", "f", "--input", "f"], "--file"),
        (["generate", "x", "--fail-on-error"], "--input"),
        (["generate", "--input", "f", "--force"], "--output"),
        (["generate", "--input", "f", "--output", "g", "--force", "--resume"], "--force"),
        (["generate", "x", "--encoding", "base64"], "'base64' is no encoding"),
        (["tokens", "x", "--encoding", "klingon"], "'klingon' is no encoding"),
        (["generate", "-e", "x", "--stop", r"\xe9"], r"no UTF-8: \xHH is a byte"),
        (["generate", "-item of a list"], "behind '--'"),
        (["next", "--item of a list"], "behind '--'"),
        (["generate", "x", "--truncate", "right"], "right"),
        (["generate", "x", "--output", "f"], "--input"),
        (["generate", "--input", "f", "--output", "-", "--force"], "--output"),
        (["generate", "--input", "f", "--resume"], "--output"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else "",
)
def test_wrong_usage(arguments: list[object], hint: str, place: Path, command_line: CommandLine) -> None:
    before = snapshot(place)
    assert_one_line(command_line(*arguments), 2, hint)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["generate", "x", "--stream", "--json"], 2, "UsageError"),
        (["generate", "x", "-m", "no/model", "--json"], 1, "CheckpointError"),
        (["generate", "x", "--num-beams", 0, "--json"], 1, "OptionError"),
    ],
)
def test_an_error_under_json_is_json_as_well(
    arguments: list[object], code: int, kind: str, command_line: CommandLine
) -> None:
    done = command_line(*arguments)
    error = json.loads(done.out)["error"]
    assert (done.code, error["kind"]) == (code, kind)
    assert done.err == f"gpt2onnx: {error['message']}\n"


def test_no_prompt_and_no_token_to_begin_with(
    command_line: CommandLine, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    gpt2onnx.export(make_checkpoint(bos_token_id=None, eos_token_id=5), tmp_path / "bundle")
    for stdin in ("", "\n"):
        done = command_line("generate", "-m", tmp_path / "bundle", stdin=stdin)
        assert_one_line(done, 1, "names no bos_token_id to begin with: give at least one token")


@linux
def test_a_file_without_end(command_line: CommandLine, tales_bundle: Path) -> None:
    assert_one_line(command_line("eval", "-m", tales_bundle, "/dev/zero"), 1, "too many for a text")


@linux
def test_requests_without_end(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line("generate", "-m", tales_bundle, "--input", "/dev/zero")
    assert (done.code, list(json.loads(done.out))) == (0, ["id", "error"])
    assert "longer than" in json.loads(done.out)["error"]


@posix
def test_a_working_folder_that_was_deleted(place: Path, command_line: CommandLine) -> None:
    place.rmdir()
    assert_one_line(command_line("verify", "bundle"), 1, "bundle")
    assert_one_line(command_line("export", "tales", "bundle"), 1, "has been deleted")


@linux
@pytest.mark.parametrize("most", [50, 150])
def test_packages_that_do_not_fit_into_memory(most: int, tales_bundle: Path) -> None:
    command = f"ulimit -v {most}000; exec {sys.executable} -m gpt2onnx verify {tales_bundle}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    # Before ours, ONNX Runtime may print a line of its own.
    assert "enough memory" in done.stderr.splitlines()[-1]
    assert not any(words in done.stderr for words in ("pip install", "Traceback"))


@posix
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_packages_are_imported(stop: signal.Signals, tmp_path: Path) -> None:
    """Imports turn an interrupt into errors of their own."""
    (tmp_path / "onnx.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {stop.value})\n    while True: pass\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('a part is missing') from error\n"
    )
    done = run("export", "tales", tmp_path / "bundle", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done == Finished(130, "", "gpt2onnx: interrupted\n")


@posix
def test_a_cache_that_others_can_write_to(place: Path, command_line: CommandLine) -> None:
    cache = place.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert_one_line(command_line("generate", "x", "-m", "tales"), 1, "other users can write to the cache")
    assert list(cache.iterdir()) == []
    cache.rmdir()
    assert command_line("generate", "x", "-m", "tales", "--max-new-tokens", 1).code == 0
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_cache_below_a_file(place: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("GPT2ONNX_CACHE", str(place / "file" / "cache"))
    assert_one_line(command_line("generate", "x", "-m", "tales"), 1, "can't make the cache")


def test_names_do_not_steer_the_terminal(
    place: Path, command_line: CommandLine, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(json.dumps({"model_type": "\x1b[31mred\n\u202e\u2028"}))
    for named in (folder, Path("\x1b[31mred\udcff"), "\x1b]0;title\x07"):
        done = command_line("export", named, "bundle")
        assert_one_line(done, 1, "")
        assert done.err.rstrip("\n").isprintable()
        assert_one_line(command_line("verify", named), 1, "")


def test_one_line_also_from_a_process_of_its_own(place: Path) -> None:
    assert_one_line(run("verify", "no-such-bundle"), 1, "no-such-bundle")
