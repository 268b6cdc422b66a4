"""Killed, interrupted, out of disk, or two at once: the target is the old bundle or the new one, whole.

Each step of an export is a point to fail at; `tests/support/fault_points.py` makes them fail, in a process of its own.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.paths import REPOSITORY
from support.systems import linux, posix

import gpt2onnx
from gpt2onnx.errors import BundleError, OutputError
from gpt2onnx.exporter.files import atomic
from gpt2onnx.exporter.files.archive import pack, unpack
from gpt2onnx.models.bundle import MANIFEST, Bundle, Manifest

FAULT_POINTS = REPOSITORY / "tests" / "support" / "fault_points.py"
# All of them, or so many of each kind where time is short.
MOST = int(os.environ.get("GPT2ONNX_FAULTS", "24"))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint) -> list[Path]:
    """Two that differ in all weights, and in nothing else."""
    return [make_checkpoint(weights_seed=seed) for seed in (1, 2)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_export(checkpoint: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt2onnx", "export", str(checkpoint), str(target), "--force", "--no-parity"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)


@posix
@pytest.mark.parametrize("kind", ["kill", "full", "io", "interrupt"])
def test_a_fault_at_any_step_leaves_a_whole_bundle(kind: str, checkpoints: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, FAULT_POINTS, kind, *checkpoints, tmp_path / "folder", "--most", str(MOST)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    found = re.match(r"\w+: (\d+) of (\d+) steps tried, (\d+) left the old bundle, (\d+) the new one", done.stdout)
    assert found, done.stdout
    tried, steps, old, new = map(int, found.groups())
    assert tried == old + new >= min(MOST, steps) * 0.9
    assert old > 0
    assert new > 0


@posix
def test_killed_at_any_time(checkpoints: list[Path], tmp_path: Path) -> None:
    """A process as users start it, and real time."""
    target = tmp_path / "folder" / "bundle"
    wholes = []
    for checkpoint in checkpoints:
        begin = time.monotonic()
        out, err = start_export(checkpoint, target).communicate(timeout=60)
        assert "MB" in out, err
        duration = time.monotonic() - begin
        wholes.append(content(target))
    generator = random.Random(1)
    for _ in range(max(6, MOST // 8)):
        process = start_export(checkpoints[wholes.index(content(target)) - 1], target)
        time.sleep(duration * generator.uniform(0.5, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert content(target) in wholes
    assert len(list(target.parent.iterdir())) <= 2
    gpt2onnx.export(checkpoints[0], target, force=True)
    assert list(target.parent.iterdir()) == [target]


@linux
def test_exports_of_one_target_at_once_do_not_mix(checkpoints: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "folder" / "bundle"
    wholes = []
    for checkpoint in checkpoints:
        gpt2onnx.export(checkpoint, target, force=True)
        wholes.append(content(target))
    for _ in range(max(1, MOST // 20)):
        processes = [start_export(checkpoint, target) for checkpoint in checkpoints * 2]
        # Whoever looks meanwhile finds a bundle, too; between two reads it may become another.
        while any(process.poll() is None for process in processes):
            with contextlib.suppress(BundleError):
                Bundle.open(target)
            assert target.is_dir()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), errors
        assert not any("Traceback" in error for error in errors)
        assert content(target) in wholes
        assert list(target.parent.iterdir()) == [target]


def test_the_first_of_two_wins_where_neither_may_replace(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, first, second = tmp_path / "bundle", tmp_path / "first", tmp_path / "second"
    gpt2onnx.export(checkpoints[0], first)
    flush = atomic._flush

    def another_was_faster(folder: Path, *, deep: bool = True) -> None:
        flush(folder, deep=deep)
        if deep:
            first.rename(target)

    monkeypatch.setattr(atomic, "_flush", another_was_faster)
    with pytest.raises(OutputError, match="already holds a bundle"):
        gpt2onnx.export(checkpoints[1], target)
    monkeypatch.undo()
    gpt2onnx.export(checkpoints[0], second)
    assert content(target) == content(second)


def test_what_another_export_replaces_at_once_was_made(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both an export and `unpack` say what they made, though its place holds something else by then."""
    target, other, archive = tmp_path / "bundle", tmp_path / "other", tmp_path / "bundle.tar.gz"
    gpt2onnx.export(checkpoints[0], other)
    pack(other, archive)
    flush = atomic._flush

    def another_is_faster(folder: Path, *, deep: bool = True) -> None:
        flush(folder, deep=deep)
        if not deep:
            shutil.rmtree(target / "onnx")  # as one that is being removed, or half read

    monkeypatch.setattr(atomic, "_flush", another_is_faster)
    made = gpt2onnx.export(checkpoints[1], target)
    assert made.folder == target
    assert made.manifest.source_sha256 != Bundle.open(other).manifest.source_sha256
    assert unpack(archive, target, force=True) == replace(Bundle.open(other), folder=target)


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


def test_where_the_system_has_no_exchange(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder" / "bundle"
    wholes = []
    for checkpoint in checkpoints:
        gpt2onnx.export(checkpoint, target, force=True)
        wholes.append(content(target))
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    gpt2onnx.export(checkpoints[0], target, force=True)
    assert content(target) == wholes[0]
    rename = Path.rename

    def fail_once(path: Path, to: Path) -> Path:
        if path.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OutputError, match="Input/output error"):
        gpt2onnx.export(checkpoints[1], target, force=True)
    assert content(target) == wholes[0]
    assert list(target.parent.iterdir()) == [target]


def test_what_a_run_killed_after_the_change_left_is_removed(checkpoints: list[Path], tmp_path: Path) -> None:
    """Where the system has no exchange: the new bundle is in its place, the old one beside it."""
    target = tmp_path / "bundle"
    gpt2onnx.export(checkpoints[0], target)
    left = target.with_name(".bundle.0123abcd.old")
    shutil.copytree(target, left)
    gpt2onnx.export(checkpoints[1], target, force=True)
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_and_what_it_leads_to_is_replaced(checkpoints: list[Path], tmp_path: Path) -> None:
    gpt2onnx.export(checkpoints[0], tmp_path / "real" / "bundle")
    (tmp_path / "link").symlink_to("real/bundle")
    before = content(tmp_path / "link")
    gpt2onnx.export(checkpoints[1], tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real" / "bundle") == content(tmp_path / "link") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["bundle"]


def test_the_folder_that_one_is_in_is_not_replaced(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command_line("export", checkpoints[0], ".")
    assert (done.code, done.out) == (1, "")
    assert "the folder that you are in" in done.err
    assert list(tmp_path.iterdir()) == []


@linux
@pytest.mark.parametrize(
    "arguments",
    [["verify", "BUNDLE"], ["generate", "-m", "BUNDLE", "x"], ["export", "SOURCE", "made", "--no-parity"], ["--help"]],
)
def test_output_that_cannot_be_written(arguments: list[str], checkpoints: list[Path], tmp_path: Path) -> None:
    bundle = gpt2onnx.export(checkpoints[0], tmp_path / "bundle").folder
    places = {"BUNDLE": str(bundle), "SOURCE": str(checkpoints[0])}
    command = [sys.executable, "-m", "gpt2onnx", *(places.get(word, word) for word in arguments)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, cwd=tmp_path, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("gpt2onnx: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "No space left" in done.stderr


@posix
def test_without_standard_streams(checkpoints: list[Path], tmp_path: Path) -> None:
    """As some service managers start programs: what is opened next must not take the streams' place."""
    command = f"{sys.executable} -m gpt2onnx export {checkpoints[0]} made --no-parity <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ONE_THREAD, check=False).returncode == 0
    Bundle.open(tmp_path / "made").verify()
