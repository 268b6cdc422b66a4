"""What the command line prints, as scripts rely on it."""

import ast
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine, at_a_terminal, run, start
from support.reference import Reference
from support.systems import posix
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.models.bundle import MANIFEST, Bundle
from gpt2onnx.models.tales import FOLDER

PROMPT = "Once upon a time"
# An export that is as fast as it can be.
UNCHECKED = ["--no-calibrate", "--no-quality", "--no-parity"]
SHORT = ["--max-new-tokens", 12]


def without_seconds(line: str) -> dict[str, Any]:
    """A result line, without the one value that differs from run to run."""
    record = json.loads(line)
    assert isinstance(record.pop("seconds", 0.0), float)
    return record


def test_export_then_generate(command_line: CommandLine, tmp_path: Path, tales_model: gpt2onnx.Model) -> None:
    done = command_line("export", "tales", tmp_path / "new" / "bundle", "--no-parity")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    assert "28." in done.out
    done = command_line("generate", PROMPT, "-m", tmp_path / "new" / "bundle")
    assert (done.code, done.err) == (0, "")
    assert done.out == tales_model.generate(PROMPT, max_new_tokens=64).text + "\n"


def test_export_json_is_the_manifest(command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line(
        "export", "tales", tmp_path / "bundle", "--dtype", "int8", "--block-size", 32, "--json", *UNCHECKED
    )
    manifest = json.loads(done.out)
    assert manifest == json.loads((tmp_path / "bundle" / MANIFEST).read_text("utf-8"))
    assert (manifest["dtype"], manifest["block_size"], manifest["source"]) == ("int8", 32, "tales")
    assert (done.code, done.err) == (0, "")


def test_export_replaces_a_bundle_only_by_force(command_line: CommandLine, tmp_path: Path) -> None:
    assert command_line("export", "tales", tmp_path / "bundle", "--dtype", "int8", *UNCHECKED).code == 0
    refused = command_line("export", "tales", tmp_path / "bundle")
    assert (refused.code, "--force" in refused.err) == (1, True)
    assert command_line("export", "no-such-model", tmp_path / "bundle", "--force").code == 1
    assert Bundle.open(tmp_path / "bundle").manifest.dtype == "int8"
    assert command_line("export", "tales", tmp_path / "bundle", "--force", "--no-parity").code == 0
    assert Bundle.open(tmp_path / "bundle").manifest.dtype == "fp32"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_generate_json(command_line: CommandLine, tales_bundle: Path, tales_reference: Reference) -> None:
    done = command_line("generate", PROMPT, "-m", tales_bundle, "--json", *SHORT)
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    assert list(record) == ["prompt", "prompt_ids", "sequences", "seed", "request_hash", "usage", "seconds", "energy"]
    assert record["prompt"] == PROMPT
    (sequence,) = record["sequences"]
    assert list(sequence) == ["text", "token_ids", "finish_reason", "logprobs", "score"]
    assert (sequence["finish_reason"], sequence["logprobs"], record["energy"]) == ("length", None, None)
    assert record["usage"] == {"prompt_tokens": len(record["prompt_ids"]), "completion_tokens": 12}
    assert 0 < record["seconds"] < 60
    (expected,) = tales_reference.tokens(record["prompt_ids"], max_new_tokens=12)
    assert_same_tokens(sequence["token_ids"], expected)


def test_several_sequences(command_line: CommandLine, tales_bundle: Path, tales_reference: Reference) -> None:
    options = ["-m", tales_bundle, "--num-return-sequences", 3, "--seed", 7, *SHORT]
    record = json.loads(command_line("generate", PROMPT, "--json", *options).out)
    expected = tales_reference.tokens(
        record["prompt_ids"], 7, do_sample=True, num_return_sequences=3, max_new_tokens=12
    )
    for sequence, tokens in zip(record["sequences"], expected, strict=True):
        assert_same_tokens(sequence["token_ids"], tokens)
    assert record["usage"]["completion_tokens"] == 36
    text = command_line("generate", PROMPT, *options).out
    assert text == "\n---\n".join(sequence["text"] for sequence in record["sequences"]) + "\n"


def test_prompts_come_from_argument_ids_file_or_standard_input(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    ids = tales_model.tokenizer.encode(PROMPT)
    common = ["-m", tales_bundle, "--json", *SHORT]
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n")
    records = [
        without_seconds(done.out)
        for done in (
            command_line("generate", PROMPT, *common),
            command_line("generate", *common, stdin=PROMPT),
            command_line("generate", *common, stdin=f"{PROMPT}\n"),
            command_line("generate", *common, "--file", tmp_path / "prompt.txt"),
            command_line("generate", *common, "--file", "-", stdin=f"{PROMPT}\n"),
            command_line("generate", "--prompt-ids", ",".join(map(str, ids)), *common),
        )
    ]
    assert records[-1].pop("request_hash") != records[0]["request_hash"], "another request, with the same result"
    assert records[:-1] == [records[0]] * 5
    assert records[0].pop("request_hash")
    assert records[-1] == records[0]
    assert records[0]["prompt_ids"] == ids


def test_echo_and_streaming_change_no_text(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    text = tales_model.generate(PROMPT, max_new_tokens=12).text
    common = ["generate", PROMPT, "-m", tales_bundle, *SHORT]
    for ways in ([], ["--stream"], ["--no-stream", "--no-echo"]):
        assert command_line(*common, *ways).out == f"{text}\n"
    for way in ("--stream", "--no-stream"):
        assert command_line(*common, way, "--echo").out == f"{PROMPT}{text}\n"


def test_options_that_are_lists(command_line: CommandLine, tales_bundle: Path, tales_reference: Reference) -> None:
    given = {
        "sequence_bias": "[[[262],2.5],[[290,258],-1]]", "begin_suppress_tokens": "306,262",
        "forced_eos_token_id": "13,14", "exponential_decay_length_penalty": "3,1.3",
    }  # fmt: skip
    arguments = [part for name, text in given.items() for part in (f"--{name.replace('_', '-')}", text)]
    record = json.loads(command_line("generate", PROMPT, "-m", tales_bundle, "--json", *SHORT, *arguments).out)
    options = {name: list(ast.literal_eval(text)) for name, text in given.items()}
    options["sequence_bias"] = [[ids, float(bias)] for ids, bias in options["sequence_bias"]]
    (expected,) = tales_reference.tokens(record["prompt_ids"], max_new_tokens=12, **options)
    assert_same_tokens(record["sequences"][0]["token_ids"], expected, "lists")


def test_sampling_is_another_each_time_and_can_be_switched_off(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    common = ["generate", PROMPT, "-m", tales_bundle, "--json", "--temperature", 0.7]
    first, second = (json.loads(command_line(*common, "--max-new-tokens", 40).out) for _ in range(2))
    assert first["sequences"] != second["sequences"]
    plain = json.loads(command_line(*common, "--no-do-sample", *SHORT).out)
    assert plain["sequences"] == tales_model.generate(PROMPT, max_new_tokens=12).to_dict()["sequences"]


def test_lengths_stops_and_end_tokens(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    def generate(*options: object, prompt: tuple[object, ...] = (PROMPT,)) -> dict[str, Any]:
        record = json.loads(command_line("generate", *prompt, "-m", tales_bundle, "--json", *options).out)
        return record["sequences"][0]

    plain = tales_model.generate(PROMPT, max_new_tokens=64).sequences[0]
    assert generate()["token_ids"] == plain.token_ids
    prompt_length = len(tales_model.tokenizer.encode(PROMPT))
    assert generate("--max-length", prompt_length + 5)["token_ids"] == plain.token_ids[:5]
    fourth = plain.token_ids[3]
    ended = generate("--eos-token-id", fourth)
    assert ended["token_ids"] == plain.token_ids[: plain.token_ids.index(fourth) + 1]
    assert ended["finish_reason"] == "stop"
    stopped = generate("--stop", "never to be found", "--stop", plain.text[10:14])
    assert stopped["text"] == plain.text[: plain.text.index(plain.text[10:14])]
    assert stopped["finish_reason"] == "stop"
    ids = [300] * 480
    long = generate("--max-new-tokens", 600, "--eos-token-id", 0, prompt=("--prompt-ids", ",".join(map(str, ids))))
    assert long["finish_reason"] == "context"
    # The last token is chosen from the logits of the last position and needs none itself.
    assert len(long["token_ids"]) == 512 + 1 - len(ids)


def test_logprobs(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line("generate", PROMPT, "-m", tales_bundle, "--json", "--logprobs", 2, "--max-new-tokens", 3)
    (sequence,) = json.loads(done.out)["sequences"]
    assert [entry["token_id"] for entry in sequence["logprobs"]] == sequence["token_ids"]
    for entry in sequence["logprobs"]:
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]], "greedy decoding takes the likeliest"
        assert entry["top"][1][1] < entry["logprob"] < 0


def test_none_switches_an_option_off(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    """On the command line, and null in a request line: here the default of the 50 likeliest tokens."""
    expected = tales_model.generate(PROMPT, seed=4, max_new_tokens=12, top_k=None).sequences[0].token_ids
    assert expected != tales_model.generate(PROMPT, seed=4, max_new_tokens=12).sequences[0].token_ids
    done = command_line("generate", PROMPT, "-m", tales_bundle, "--json", "--seed", 4, "--top-k", "none", *SHORT)
    assert json.loads(done.out)["sequences"][0]["token_ids"] == expected
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": PROMPT, "seed": 4, "max_new_tokens": 12, "top_k": None}))
    done = command_line("generate", "-m", tales_bundle, "--input", requests)
    assert json.loads(done.out)["sequences"][0]["token_ids"] == expected


REQUESTS = [
    {"id": "a", "prompt": PROMPT, "max_new_tokens": 7},
    {"id": 2, "prompt_ids": [80, 300, 5], "max_new_tokens": 3, "do_sample": True, "seed": 11, "top_k": 10},
    "this is not JSON",
    {"id": {"any": "thing"}, "prompt": "The king", "num_beams": 2, "max_new_tokens": 4},
    {"id": "wrong", "prompt": "The king", "temprature": 1},
    {"id": "cold", "prompt": "The king", "temperature": -1},
    {"id": "empty", "prompt": "", "max_new_tokens": 3},
    {"prompt": "The queen said", "max_new_tokens": 5, "temperature": 0},
]
NO_ERROR = [0, 1, 3, 6, 7]


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in REQUESTS]
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_file_of_requests(
    batch_size: int, requests: Path, command_line: CommandLine, tales_bundle: Path, tales_reference: Reference
) -> None:
    done = command_line("generate", "-m", tales_bundle, "--input", requests, "--batch-size", batch_size)
    assert done.code == 0
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["id"] for record in records] == [
        each.get("id") if isinstance(each, dict) else None for each in REQUESTS
    ]
    for index, (record, request) in enumerate(zip(records, REQUESTS, strict=True)):
        if index not in NO_ERROR:
            assert list(record) == ["id", "error"]
            assert "\n" not in record["error"]
            continue
        assert list(record) == [
            "id", "prompt", "prompt_ids", "sequences", "seed", "request_hash", "usage", "seconds", "energy",
        ]  # fmt: skip
        options = {name: value for name, value in request.items() if name not in ("id", "prompt", "prompt_ids", "seed")}
        if options.pop("temperature", None) == 0:  # greedy search, for which transformers has no temperature
            options["do_sample"] = False
        options = {"do_sample": False} | options
        (expected,) = tales_reference.tokens(record["prompt_ids"], request.get("seed"), **options)
        assert_same_tokens(record["sequences"][0]["token_ids"], expected, request)


def test_options_of_the_command_hold_for_every_line(
    requests: Path, command_line: CommandLine, tales_bundle: Path
) -> None:
    done = command_line("generate", "-m", tales_bundle, "--input", requests, "--max-new-tokens", 2)
    lengths = [json.loads(line).get("usage", {}).get("completion_tokens") for line in done.out.splitlines()]
    assert [lengths[index] for index in NO_ERROR] == [7, 3, 4, 3, 5], "a line's own options win"
    requests.write_text('{"prompt": "x"}\n', "utf-8")
    for output in ([], ["--output", "-"]):
        done = command_line("generate", "-m", tales_bundle, "--input", requests, "--max-new-tokens", 2, *output)
        assert json.loads(done.out)["usage"]["completion_tokens"] == 2


def test_text_streams_before_the_command_ends(tales_bundle: Path, tales_model: gpt2onnx.Model) -> None:
    command = ["generate", PROMPT, "-m", tales_bundle, "--threads", 1, "--max-new-tokens"]
    with start(*command, 100, text=False) as process:
        assert process.stdout
        first = os.read(process.stdout.fileno(), 10_000)
        rest, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    text = (first + rest).decode()
    assert text == tales_model.generate(PROMPT, max_new_tokens=100).text + "\n"
    assert 0 < len(first) < len(text.encode()) / 2


def test_a_reader_who_leaves_early_gets_no_complaint(tales_bundle: Path) -> None:
    command = ["generate", PROMPT, "-m", tales_bundle, "--threads", 1, "--max-new-tokens"]
    with start(*command, 400, text=False) as process:
        assert process.stdout
        assert process.stderr
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_help_of_every_command_shows_an_example(command_line: CommandLine) -> None:
    done = command_line("--help")
    assert done.code == 0
    commands = [line.split()[0] for line in done.out.split("Commands:")[1].splitlines() if line.strip()]
    assert {"export", "generate"} <= set(commands)
    for name in commands:
        done = command_line(name, "--help")
        assert (done.code, done.err) == (0, "")
        assert f"  gpt2onnx {name} " in done.out, name
    assert command_line("--version").out.startswith("gpt2onnx, version ")


def test_verbose_logs_to_standard_error_only(tales_bundle: Path) -> None:
    done = run("generate", PROMPT, "-m", tales_bundle, "-v", "--device", "auto", "--json", *SHORT)
    assert done.code == 0
    assert "gpt2onnx.runtime.ort.providers: " in done.err
    assert json.loads(done.out)["prompt"] == PROMPT


@posix
@pytest.mark.parametrize("quiet", [False, True])
def test_a_person_at_a_terminal_sees_progress(
    quiet: bool, command_line: CommandLine, tales_bundle: Path, tmp_path: Path
) -> None:
    """Bytes of an export and lines of a job on standard error, where that is a terminal; results stay without them."""
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "Once"}\n' * 3)
    commands = {
        "B/s": ("export", "tales", tmp_path / "bundle", "--no-parity"),
        "3 lines": ("generate", "-m", tales_bundle, "--input", requests, "--max-new-tokens", 2),
        "Exporting": ("tokens", "Once", "-m", shutil.copytree(FOLDER, tmp_path / "checkpoint")),
        "Checking": ("verify", tales_bundle),
        f"Checking {tales_bundle}": ("generate", "-m", tales_bundle, "Once", "--verify", "--max-new-tokens", 2),
    }
    for expected, arguments in commands.items():
        done = at_a_terminal(command_line, *arguments, *(["-q"] if quiet else []))
        assert done.code == 0
        assert (expected in done.err) == (not quiet), done.err
        assert "lines" not in done.out
        assert "B/s" not in done.out
