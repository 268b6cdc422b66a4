"""Fixtures that tests share: models to test with, and transformers as the judge of them."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when huggingface_hub is imported, so it is set before transformers is.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when NumPy is imported. Two files are tested at a time: BLAS threads of both would wait for each other's cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis
import pytest
from support.checkpoints import MakeCheckpoint, random_checkpoint
from support.commands import CommandLine, Finished
from support.fuzzing import ASKED
from support.golden import MODES, Golden, golden
from support.reference import Reference

import gpt2onnx
from gpt2onnx.cli.main import main
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.ort import devices, providers

_NOT_RUN = pytest.StashKey[str]()
collect_ignore = list[str]()
# A run repeats the last one's inputs, so that it tells what a change did; `make fuzz` tries others.
hypothesis.settings.register_profile("repeatable", derandomize=not ASKED, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--golden`: where answers of PyTorch and transformers come from."""
    parser.addoption("--golden", choices=MODES, default="stored", help="where answers of PyTorch come from")


def pytest_configure(config: pytest.Config) -> None:
    """Sets where answers come from; lets Ctrl-C reach what tests start, also where a shell's background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "not system" in config.option.markexpr:  # whole programs may have all cores
        _take_own_cores()
    golden.mode = config.getoption("golden")
    if golden.mode == "stored":
        collect_ignore.append("reference")


def _take_own_cores() -> None:
    """Gives each of several workers, and what it starts, cores of its own: threads that wait in loops take those of others."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count > 1 and hasattr(os, "sched_setaffinity"):
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        if mine := sorted(os.sched_getaffinity(0))[number::count]:
            os.sched_setaffinity(0, mine)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes golden files, where that was asked for; a module run in part keeps its other answers."""
    whole = not session.config.option.keyword and not any("::" in each for each in session.config.args)
    if golden.mode == "write" and not session.testsfailed:
        golden.finish(whole=whole)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that can't run here, or have nothing to ask: counted as deselected, and said at the end.

    The files whose few tests take long come first: begun last, they would leave one of two cores idle.
    """
    items.sort(key=lambda each: each.path.parent.name not in ("project", "fleet"))
    if golden.mode != "stored":
        asking = [
            each for each in items if "golden" in getattr(each, "fixturenames", ()) or "reference" in each.path.parts
        ]
        config.hook.pytest_deselected(items=[each for each in items if each not in asking])
        items[:] = asking
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


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that no other program has written to."""
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
def tales_twin_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in fp32 with a twin that drafts."""
    return gpt2onnx.export("tales", tmp_path_factory.mktemp("tales") / "twin", twin=True).folder


@pytest.fixture(scope="session")
def tales_model(tales_bundle: Path) -> gpt2onnx.Model:
    """The embedded model in fp32, loaded."""
    return gpt2onnx.load(tales_bundle, threads=1)


@pytest.fixture(scope="session", name="golden")
def _golden() -> Golden:
    """Answers of PyTorch and transformers: `make reference` runs the tests that take it."""
    return golden


@pytest.fixture(scope="session")
def tales_reference(golden: Golden) -> Reference:
    """The embedded model in transformers, float32."""
    return Reference(FOLDER)


@pytest.fixture(scope="session")
def reference_of(golden: Golden) -> type[Reference]:
    """Loads a checkpoint in transformers, float32."""
    return Reference


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a small random GPT-2 checkpoint and returns its folder: fields of its config.json, and `weights_seed`."""

    def make(*, weights_seed: int = 0, **settings: Any) -> Path:
        return random_checkpoint(tmp_path_factory.mktemp("checkpoint"), settings, weights_seed)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Tests of it are skipped where it, or playwright, isn't installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright (extra system) isn't installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no chromium on this machine")
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def second_graph_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives small networks a second graph, too, so that tests of that needn't be large; in fp32 on any processor."""
    monkeypatch.setattr("gpt2onnx.runtime.host.resources.has_avx512", lambda: True)
    monkeypatch.setattr("gpt2onnx.exporter.graph.second_graph.MIN_WIDTH", 0)


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs the command line in this process: command_line("generate", "Once", stdin="", without=("llguidance",)).

    Packages in `without` fail to be imported by functions, as if they weren't installed; modules may have them already.
    """

    def run(*arguments: object, stdin: str | bytes = "", without: tuple[str, ...] = ()) -> Finished:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gpt2onnx", *map(str, arguments)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            loaded = [name for name in sys.modules if name.partition(".")[0] in without]
            for name in (*without, *loaded):
                patch.setitem(sys.modules, name, None)
            with pytest.raises(SystemExit) as exit_:
                main()
        out, err = capfd.readouterr()
        return Finished(int(exit_.value.code or 0), out, err)

    return run
