"""What tests share: models to test with, and transformers as the judge of them.

Tests take the fixtures by name, and import the plain functions: `from conftest import reference_tokens`.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# Read when huggingface_hub is imported, so it is set before transformers is.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from essentials import END_OF_TEXT as END_OF_TEXT
from essentials import byte_tokenizer, random_checkpoint

try:
    import torch
    import transformers
except ImportError:  # where the lowest versions are tested, which those would not go with
    torch = None

import gpt2onnx
from gpt2onnx.cli.main import main
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime import devices, providers

ALL_BYTES_AND_END = 257  # entries of a byte-level vocabulary without merges

MakeCheckpoint = Callable[..., Path]

_NOT_RUN = pytest.StashKey[str]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that need a GPU where there is none: they are counted as deselected, and said so at the end."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    reason = "this onnxruntime was built without CUDA"
    if devices.CUDA in providers.available():
        reason = providers.why_not(devices.CUDA) or ""
    if reason:
        items[:] = [item for item in items if item not in gpu]
        config.hook.pytest_deselected(items=gpu)
        config.stash[_NOT_RUN] = f"{len(gpu)} tests need a GPU and were not run: {reason}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says which tests this machine could not run."""
    if _NOT_RUN in config.stash:
        terminalreporter.write_line(config.stash[_NOT_RUN], yellow=True)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


CommandLine = Callable[..., Finished]


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread for PyTorch, and a cache that no other program has written to."""
    if torch is not None:
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tales_checkpoint() -> Path:
    """The embedded checkpoint's folder."""
    return FOLDER


@pytest.fixture(scope="session")
def tales_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported in fp32."""
    return gpt2onnx.export("tales", tmp_path_factory.mktemp("tales") / "fp32").folder


@pytest.fixture(scope="session")
def tales_int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported in int8, without calibration, which takes longer than all else."""
    return gpt2onnx.export("tales", tmp_path_factory.mktemp("tales") / "int8", dtype="int8", calibrate=False).folder


@pytest.fixture(scope="session")
def tales_model(tales_bundle: Path) -> gpt2onnx.Model:
    """The embedded model in fp32, loaded."""
    return gpt2onnx.load(tales_bundle, threads=1)


@pytest.fixture(scope="session")
def tales_reference() -> transformers.GPT2LMHeadModel:
    """The embedded model in transformers, float32."""
    return load_reference(FOLDER)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a small random GPT-2 checkpoint with a byte-level tokenizer and returns its folder.

    Takes fields of transformers' GPT2Config, and `weights_seed`. All tensors are random, biases and norms
    too, so that none can be left out unnoticed; the weights are so large that the likeliest tokens lie far apart.
    """

    def make(*, weights_seed: int = 0, **config_overrides: Any) -> Path:
        small = {"vocab_size": ALL_BYTES_AND_END, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        settings = small | {"initializer_range": 0.3} | config_overrides
        end = min(settings["vocab_size"], ALL_BYTES_AND_END) - 1
        settings = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None} | settings
        if torch is None:
            return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", settings, weights_seed)
        config = transformers.GPT2Config(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            model = transformers.GPT2LMHeadModel(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        byte_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture
def wide_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives small networks a second graph, too, so that tests of that needn't be large."""
    monkeypatch.setattr(import_module("gpt2onnx.exporter.export"), "_WIDE_WIDTH", 0)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs the command line in this process: command_line("generate", "Once", stdin="")."""

    def run(*arguments: object, stdin: str = "") -> Finished:
        monkeypatch.setattr(sys, "argv", ["gpt2onnx", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Finished(int(exit_.value.code or 0), out, err)

    return run


def heed_interrupts() -> None:
    """For a Popen's preexec_fn: what runs in a shell's background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load_reference(folder: Path) -> transformers.GPT2LMHeadModel:
    """A checkpoint in transformers, float32, without dropout."""
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def reference_tokens(
    reference: transformers.GPT2LMHeadModel, prompt_ids: Sequence[int], seed: int | None = None, **options: Any
) -> list[list[int]]:
    """The new tokens of each sequence that transformers.generate returns for one prompt, up to their end token.

    Args:
        reference: from `load_reference` or `tales_reference`.
        prompt_ids: tokens of the prompt.
        seed: for torch.manual_seed, right before generating.
        options: for `generate`.
    """
    prompt = torch.tensor([list(prompt_ids)])
    ends = options.get("eos_token_id", reference.generation_config.eos_token_id)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        padding = {"pad_token_id": ends[0]} if ends else {}
        output = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **padding | options)
    sequences = [row[len(prompt_ids) :].tolist() for row in output]
    return [_up_to_end(tokens, ends) for tokens in sequences]


def _up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding that follows an end token."""
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Fails where a condition doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.005)


def assert_same_tokens(actual: Sequence[int], expected: Sequence[int], label: object = "") -> None:
    """Fails with the first token that differs."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        assert one == other, f"{label}: token {index} is {one}, expected {other}"
    assert len(actual) == len(expected), f"{label}: {len(actual)} tokens, expected {len(expected)}"
