"""Prompts, options, request lines, command lines and bundles that nobody would write: a result, or one clear line."""

import contextlib
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import bundles
from support.checkpoints import END_OF_TEXT, MakeCheckpoint
from support.fuzzing import damaged, ends_well, inputs, odd_values

import gpt2onnx
from gpt2onnx.cli import main as command_line
from gpt2onnx.errors import OptionError
from gpt2onnx.models.bundle import GENERATION_CONFIG, GRAPH, MANIFEST, WEIGHTS
from gpt2onnx.runtime import jobs
from gpt2onnx.runtime.jsontext import to_line
from gpt2onnx.runtime.options import BY_NAME
from gpt2onnx.runtime.requests import Result

OPTIONS = list(BY_NAME)
CONTEXT, VOCABULARY = 64, 257


@pytest.fixture(scope="module")
def bundle(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = make_checkpoint(n_embd=8, n_layer=1, n_head=1)
    return gpt2onnx.export(checkpoint, tmp_path_factory.mktemp("fuzz") / "bundle").folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> gpt2onnx.Model:
    return gpt2onnx.load(bundle, threads=1)


@pytest.fixture(scope="module")
def odd_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(bundle, tmp_path_factory.mktemp("fuzz") / "odd")


@contextlib.contextmanager
def replaced(folder: Path, name: str, content: bytes, *, sign: bool = True) -> Iterator[None]:
    """Replaces a file of a bundle for a while; signed, the manifest says that it belongs there."""
    before = {path: path.read_bytes() for path in (folder / name, folder / MANIFEST)}
    (folder / name).write_bytes(content)
    try:
        if sign:
            with contextlib.suppress(gpt2onnx.errors.BundleError):
                bundles.sign(folder)
        yield
    finally:
        for path, old in before.items():
            path.write_bytes(old)


def continued(folder: Path, **options: Any) -> Result:
    return gpt2onnx.load(folder, threads=1).generate("Once", max_new_tokens=3, **options)


# Halves of surrogate pairs, NULs, other scripts, letters of many code points, special tokens written as text, megabytes.
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Co", "Mn", "Zl", "Zp"]), max_size=20),
    st.sampled_from(
        [
            "", "\0", "\ud800", "\udfff\ud800", "a\0b", "\r\n", "\u2028", "\ufeff", "\u202e", "한국어", "العربية", "👩‍👩‍👧‍👦" * 5,
            END_OF_TEXT, END_OF_TEXT * 70, f"a{END_OF_TEXT}b", END_OF_TEXT[:-1], "<pad>", "[UNK]", "\x1b[31m", "%s{}$(id)",
        ]
    ),
)  # fmt: skip
IDS = st.lists(st.one_of(st.integers(0, VOCABULARY - 1), st.integers(-2, VOCABULARY + 2), odd_values), max_size=8)
NUMBERS = st.one_of(st.integers(-2, 6), st.floats(-2, 3), odd_values)
GIVEN = st.dictionaries(
    st.sampled_from(OPTIONS),
    st.one_of(
        NUMBERS, TEXTS, st.lists(TEXTS, max_size=2), IDS, st.lists(IDS, max_size=2), st.sampled_from(["never", True]),
        st.lists(st.tuples(IDS, NUMBERS), max_size=2), st.tuples(NUMBERS, NUMBERS),
    ),
    max_size=3,
)  # fmt: skip


def check_result(result: Any) -> None:
    """What a result promises, whatever was asked for."""
    if not isinstance(result, Result):
        return
    for sequence in result.sequences:
        assert len(result.prompt_ids) + len(sequence.token_ids) <= CONTEXT + 1
        assert all(0 <= token < VOCABULARY for token in sequence.token_ids)
        assert sequence.finish_reason in ("stop", "length", "context", "time")
        sequence.text.encode("utf-8")
    json.loads(to_line(result.to_dict()))


@inputs(few=100)
@given(st.one_of(TEXTS, IDS), st.integers(1, 3))
@example("\ud800", 1)
@example([math.nan], 1)
@example([True], 1)
@example([10**30], 1)
def test_prompts(model: gpt2onnx.Model, prompt: Any, length: int) -> None:
    check_result(ends_well(lambda: model.generate(prompt, max_new_tokens=length)))
    ends_well(lambda: "".join(model.stream(prompt, max_new_tokens=length)).encode("utf-8"))
    ends_well(lambda: model.score(prompt).perplexity)


@pytest.mark.parametrize(
    "prompt", ["a" * 5_000_000, "한" * 1_000_000, END_OF_TEXT * 100_000, "\0" * 1_000_000, [1] * 1_000_000]
)
def test_prompts_of_megabytes(prompt: str | list[int], model: gpt2onnx.Model) -> None:
    for action in (lambda: model.generate(prompt), lambda: model.score(prompt)):
        assert "shorten" in str(ends_well(action)) or "context" in str(ends_well(action))


@inputs(few=200)
@given(GIVEN, st.integers(1, 4))
@example({"top_k": 10**400}, 1)
@example({"max_new_tokens": 10**18}, 1)
@example({"no_repeat_ngram_size": 2**63}, 1)
@example({"prompt_lookup": 2**63}, 1)
@example({"logprobs": 10**400}, 1)
@example({"stop": ["x" * 10**6]}, 1)
@example({"seed": 10**400}, 1)
@example({"min_length": 10**400}, 1)
@example({"bad_words_ids": [[1] * 1000]}, 1)
def test_options(model: gpt2onnx.Model, given_options: dict[str, Any], length: int) -> None:
    options = {"max_new_tokens": length} | given_options
    check_result(ends_well(lambda: model.generate("Once", **options)))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_length": 2}, "max_length"),
        ({"bad_words_ids": [[VOCABULARY]]}, "bad_words_ids"),
        ({"sequence_bias": [[[VOCABULARY], 1.0]]}, "sequence_bias"),
        ({"forced_eos_token_id": VOCABULARY}, "forced_eos_token_id"),
    ],
)
def test_options_that_the_model_refuses_are_named(options: dict[str, Any], name: str, model: gpt2onnx.Model) -> None:
    with pytest.raises(OptionError, match=name):
        model.generate("Once", **options)


LINES = st.one_of(
    st.text(max_size=60),
    st.builds(
        lambda fields, prompt: json.dumps(fields | prompt),
        st.dictionaries(st.one_of(st.sampled_from([*OPTIONS, "id", "prompt", "prompt_ids"]), st.text(max_size=4)), st.one_of(NUMBERS, TEXTS, IDS), max_size=3),
        st.one_of(st.just({}), st.fixed_dictionaries({"prompt": TEXTS, "max_new_tokens": st.just(2)})),
    ),
    damaged(b'{"id": 1, "prompt": "Once", "max_new_tokens": 2, "seed": 3}').map(lambda line: line.decode("utf-8", "replace")),
    st.sampled_from(["[" * 100_000, '{"prompt": ' + "[" * 900 + "]" * 900 + "}", '{"id": NaN, "prompt": "a"}', '{"id": ' + "9" * 5000 + ', "prompt": "a"}', "null", '""', "{}"]),
)  # fmt: skip


@inputs(few=75)
@given(st.lists(LINES, max_size=4), st.integers(1, 3))
@example(['{"prompt": "a", "max_new_tokens": 2, "id": {"a": ' + "[" * 500 + "]" * 500 + "}}"], 1)
def test_request_lines(model: gpt2onnx.Model, lines: list[str], batch_size: int) -> None:
    options = model.generation_config.merged({"max_new_tokens": 2})
    records = ends_well(lambda: list(jobs.run(model, lines, options, batch_size)))
    assert isinstance(records, list), records
    assert len(records) == len(lines)
    for record in records:
        line = to_line(record)
        assert "\n" not in line
        json.loads(line)
        assert ("error" in record) != ("sequences" in record)


GENERATION_CONFIGS = st.dictionaries(
    st.sampled_from([*OPTIONS, "stop_strings", "transformers_version", "_from_model_config"]),
    st.one_of(NUMBERS, IDS, TEXTS),
    max_size=3,
).map(lambda content: json.dumps(content).encode())


@inputs(few=80)
@given(st.data())
def test_bundles(bundle: Path, odd_bundle: Path, data: st.DataObject) -> None:
    """A file is damaged, and its manifest may have been written anew by whoever did it: a graph then reaches ONNX Runtime."""
    files = [path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()]
    name = data.draw(st.sampled_from(sorted([*files, GRAPH, GRAPH, GENERATION_CONFIG, GENERATION_CONFIG])))
    content = damaged((bundle / name).read_bytes())
    if name == GENERATION_CONFIG:
        content = st.one_of(content, GENERATION_CONFIGS)
    options = {"do_sample": data.draw(st.booleans()), "num_beams": data.draw(st.integers(1, 2))}
    with replaced(odd_bundle, name, data.draw(content), sign=data.draw(st.integers(0, 3)) > 0):
        check_result(ends_well(lambda: continued(odd_bundle, **options)))


@pytest.mark.parametrize("pattern", ["nan", "infinity", "zeros", "ones"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 1},
        {"num_beams": 3},
        {"logprobs": 2},
        {"do_sample": True, "top_p": 0.5, "top_k": 3},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "min_p": 0.5, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_weights_that_are_no_numbers(pattern: str, options: dict[str, Any], odd_bundle: Path) -> None:
    """A network that was destroyed in training still gives tokens, or says what is wrong."""
    fill = {"nan": np.nan, "infinity": np.inf, "zeros": 0, "ones": 1}[pattern]
    size = (odd_bundle / WEIGHTS).stat().st_size
    weights = np.full(size // 4, fill, np.float32).tobytes().ljust(size, b"\0")
    with replaced(odd_bundle, WEIGHTS, weights):
        result = ends_well(lambda: continued(odd_bundle, **options))
    if pattern in ("nan", "infinity"):
        assert "not a number" in str(result)
    else:
        json.loads(to_line(result.to_dict()))


ARGUMENTS = st.one_of(
    st.sampled_from(["--" + name.replace("_", "-") for name in OPTIONS] + ["--json", "--stream", "--echo", "--no-stream", "-q", "--prompt-ids", "--batch-size", "--resume", "--verify", "--threads", "--device", "--help"]),
    st.sampled_from(["0", "1", "-1", "nan", "inf", "1e999", "9" * 5000, "", "[[1]]", "[" * 2000, "{}", "1,2,3", "1,,2", "true", "never", "cpu"]),
    st.text(max_size=5),
)  # fmt: skip


@inputs(few=125)
@given(
    st.sampled_from(["generate", "generate", "generate", "verify", "tokens", "next", "inspect", "export"]),
    st.lists(ARGUMENTS, max_size=4),
)
@example("generate", ["--prompt-ids", "9" * 5000])
@example("generate", ["--bad-words-ids", "[" * 2000])
@example("generate", ["\ud800", "--echo"])
def test_command_lines(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, command: str, arguments: list[str]
) -> None:
    """What `main` doesn't turn into a line and an exit code would end with a traceback."""
    if sys.getfilesystemencoding() != "utf-8":  # then a command line holds no other letters than those of its encoding
        assume(all(letter.isascii() for argument in arguments for letter in argument))
    source = ["--model", str(bundle)] if command in ("generate", "tokens", "next") else []
    length = ["--max-new-tokens", "2"] if command == "generate" else []
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    place = tmp_path_factory.getbasetemp() / "odd_place"
    place.mkdir(exist_ok=True)
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place), streams[0], streams[1]:
        patch.setattr(sys, "argv", ["gpt2onnx", command, *source, *length, *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once")))
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
    err.seek(0)
    said = err.read()
    assert exit_.value.code in (0, 1, 2), said
    assert "Traceback" not in said
    if exit_.value.code:
        assert said.count("\n") == 1, said
        assert said.startswith("gpt2onnx: ")
        assert click.unstyle(said) == said
