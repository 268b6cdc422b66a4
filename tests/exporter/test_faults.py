"""An export that fails, is stopped or killed, or runs beside another: the target is the old bundle or the new one, whole.

`tests/support/fault_points.py` lets every step of a command fail, in a process of its own. How a folder is replaced:
tests/exporter/files/test_atomic.py.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import run, start
from support.paths import REPOSITORY
from support.systems import linux, posix

import gpt2onnx
from gpt2onnx.errors import BundleError, CheckpointError, OutputError
from gpt2onnx.exporter.files.archive import pack
from gpt2onnx.exporter.files.atomic import replacing
from gpt2onnx.models.bundle import MANIFEST, Bundle, Manifest

FAULT_POINTS = REPOSITORY / "tests" / "support" / "fault_points.py"
MOST = int(os.environ.get("GPT2ONNX_FAULTS", "16"))  # steps of each kind that are tried
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint) -> list[Path]:
    """Two that differ in all weights, and in nothing else."""
    return [make_checkpoint(weights_seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def sources(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two sources of each command."""
    folder = tmp_path_factory.mktemp("sources")
    bundles = [gpt2onnx.export(path, folder / path.name).folder for path in checkpoints]
    archives = [pack(path, folder / f"{path.name}.tar.gz").path for path in bundles]
    return {"export": checkpoints, "pack": bundles, "unpack": archives}


@pytest.fixture
def target(checkpoints: list[Path], tmp_path: Path) -> Path:
    """A bundle that is to survive."""
    return gpt2onnx.export(checkpoints[0], tmp_path / "folder" / "bundle").folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_export(checkpoint: Path, target: Path) -> subprocess.Popen[str]:
    return start("export", checkpoint, target, "--force", "--no-parity", env=ONE_THREAD)


def start_and_pause(checkpoints: list[Path], target: Path) -> subprocess.Popen[str]:
    """An export of the second checkpoint over the first that has begun to write, and stands still."""
    for _ in range(20):
        process = start_export(checkpoints[1], target)
        while process.poll() is None and not list(target.parent.glob("*/new/config.json")):
            pass
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if list(target.parent.glob("*/new/config.json")):
            return process
        # On a busy machine it was done before this process saw it begin.
        process.kill()
        process.communicate()
        gpt2onnx.export(checkpoints[0], target, force=True)
    raise AssertionError("no export stood still")


# Failures


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
def test_disk_full(target: Path, checkpoints: list[Path]) -> None:
    before = content(target)
    with full_disk(), pytest.raises(OutputError, match=r"can't write .*bundle: File too large") as caught:
        gpt2onnx.export(checkpoints[1], target, force=True)
    assert "\n" not in str(caught.value)
    assert content(target) == before
    assert list(target.parent.iterdir()) == [target]
    full = shutil.Error(
        [("here/a", "there/a", "[Errno 28] No space left on device"), ("here/b", "there/b", "the same")]
    )
    with (
        pytest.raises(OutputError, match=r"^can't write .*bundle: \[Errno 28\] No space left on device$"),
        replacing(target, lambda: None),
    ):
        raise full


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.001])
@pytest.mark.parametrize("begun", [False, True], ids=["before it is read", "while it is read"])
def test_truncated_checkpoint(begun: bool, kept: float, target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before, checkpoint = content(target), make_checkpoint(weights_seed=1)
    weights = checkpoint / "model.safetensors"
    size = int(weights.stat().st_size * kept)

    def truncate(done: int = 0, total: int = 0) -> None:
        os.truncate(weights, size)

    if not begun:
        truncate()
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        gpt2onnx.export(checkpoint, target, force=True, progress=truncate)
    assert "\n" not in str(caught.value)
    assert content(target) == before
    assert list(target.parent.iterdir()) == [target]


def test_target_that_appears_meanwhile_is_not_overwritten(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def another_is_faster(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / MANIFEST).write_text("{}")

    with pytest.raises(OutputError, match="already holds a bundle"):
        gpt2onnx.export(make_checkpoint(), target, progress=another_is_faster)
    assert content(target) == {MANIFEST: b"{}"}
    assert list(tmp_path.iterdir()) == [target]


def test_progress_counts_every_byte_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    gpt2onnx.export(
        make_checkpoint(), tmp_path / "bundle", dtype="int8", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


# Signals and faults


@posix
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(stop: signal.Signals, target: Path, checkpoints: list[Path]) -> None:
    before = content(target)
    for _ in range(3):
        process = start_and_pause(checkpoints, target)
        process.send_signal(stop)
        process.send_signal(signal.SIGCONT)
        out, message = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        # Python drops an exception that a signal's handler raises while a destructor runs. Then the export is whole.
        assert content(target) != before
        gpt2onnx.export(checkpoints[0], target, force=True)
    # The empty line ends the one on which a terminal shows ^C.
    assert (process.returncode, out, message) == (130, "", "\ngpt2onnx: interrupted\n")
    assert content(target) == before
    assert list(target.parent.iterdir()) == [target]


@posix
@pytest.mark.system
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("export", kind) for kind in ("kill", "terminate", "full", "io", "interrupt")),
        *((command, kind) for command in ("pack", "unpack") for kind in ("kill", "terminate", "io")),
    ],
)
def test_a_fault_at_any_step_leaves_a_whole_target(
    command: str, kind: str, sources: dict[str, list[Path]], tmp_path: Path
) -> None:
    arguments = [FAULT_POINTS, kind, command, *sources[command], tmp_path / "folder" / "target", "--most", str(MOST)]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ONE_THREAD, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"\w+: (\d+) of (\d+) steps tried, (\d+) left the old target, (\d+) the new one", done.stdout)
    assert found, done.stdout
    tried, steps, old, new = map(int, found.groups())
    assert tried == old + new >= min(MOST, steps) * 0.8
    assert old > 0
    assert new > 0


# Others at the same time


@posix
@pytest.mark.system
def test_exports_of_one_target_at_once_do_not_mix(checkpoints: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "folder" / "bundle"
    wholes = []
    for checkpoint in checkpoints:
        gpt2onnx.export(checkpoint, target, force=True)
        wholes.append(content(target))
    for _ in range(max(1, MOST // 20)):
        processes = [start_export(checkpoint, target) for checkpoint in checkpoints * 2]
        # Others may look meanwhile.
        while any(process.poll() is None for process in processes):
            with contextlib.suppress(BundleError):
                Bundle.open(target)
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), errors
        assert not any("Traceback" in error for error in errors)
        assert content(target) in wholes
        assert list(target.parent.iterdir()) == [target]


@posix
def test_a_manifest_is_read_while_it_is_replaced(checkpoints: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    wholes = [gpt2onnx.export(checkpoint, folder, force=True).manifest for checkpoint in checkpoints]
    stop = threading.Event()

    def replace_it() -> None:
        while not stop.is_set():
            for number, manifest in enumerate(wholes):
                new = tmp_path / f"new{number}"
                new.mkdir(exist_ok=True)
                manifest.write(new)
                (new / MANIFEST).replace(folder / MANIFEST)

    with ThreadPoolExecutor(1) as pool:
        replaced = pool.submit(replace_it)
        try:
            read = {Manifest.read(folder).source_sha256 for _ in range(2000)}
        finally:
            stop.set()
        replaced.result()
    assert read == {manifest.source_sha256 for manifest in wholes}


# Streams


@linux
@pytest.mark.parametrize(
    "arguments",
    [["verify", "BUNDLE"], ["generate", "-m", "BUNDLE", "x"], ["export", "SOURCE", "made", "--no-parity"], ["--help"]],
)
def test_output_that_cannot_be_written(arguments: list[str], target: Path, checkpoints: list[Path]) -> None:
    places = {"BUNDLE": str(target), "SOURCE": str(checkpoints[0])}
    command = [places.get(word, word) for word in arguments]
    with Path("/dev/full").open("w") as full:
        done = run(*command, stdout=full, env=ONE_THREAD, cwd=target.parent)
    assert done.code == 1
    assert done.err.startswith("gpt2onnx: ")
    assert done.err.count("\n") == 1, done.err
    assert "No space left" in done.err


@posix
def test_without_standard_streams(checkpoints: list[Path], tmp_path: Path) -> None:
    """As some service managers start programs: no file may take the streams' descriptors."""
    command = f"{sys.executable} -m gpt2onnx export {checkpoints[0]} made --no-parity <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ONE_THREAD, check=False).returncode == 0
    Bundle.open(tmp_path / "made").verify()
