"""An export that fails or is stopped leaves its target as it was, nothing beside it, and says why in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.systems import posix

import gpt2onnx
from gpt2onnx.errors import CheckpointError, OutputError
from gpt2onnx.models.bundle import MANIFEST

SLOW_EXPORT = """
import sys, time
from gpt2onnx.cli.main import commands, main
from gpt2onnx.exporter import export
original = export.write_graphs
def slow(*arguments, **options):
    print("started", flush=True)
    time.sleep(60)
    return original(*arguments, **options)
export.write_graphs = slow
sys.argv = ["gpt2onnx", "export", *sys.argv[1:]]
main()
"""


@pytest.fixture
def target(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A bundle that is to survive."""
    return gpt2onnx.export(make_checkpoint(), tmp_path / "folder" / "bundle").folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_slow_export(checkpoint: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_EXPORT, str(checkpoint), str(target), "--force"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@posix
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(stop: signal.Signals, target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before = content(target)
    process = start_slow_export(make_checkpoint(weights_seed=1), target)
    process.send_signal(stop)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 130
    assert message.strip() == "gpt2onnx: interrupted"
    assert content(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


@posix
def test_what_a_killed_export_left_is_removed_by_the_next(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before, checkpoint = content(target), make_checkpoint(weights_seed=1)
    process = start_slow_export(checkpoint, target)
    running = [path for path in target.parent.iterdir() if path != target]
    assert len(running) == 1

    # While it runs, another export of the same target leaves its folder alone.
    gpt2onnx.export(checkpoint, target, force=True)
    assert running[0].is_dir()
    assert content(target) != before

    process.kill()
    process.communicate(timeout=30)
    assert running[0].is_dir()
    gpt2onnx.export(checkpoint, target, force=True)
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_target_that_a_killed_export_had_moved_away_comes_back(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before = content(target)
    (target.parent / ".bundle.abc.new").mkdir()
    target.rename(target.parent / ".bundle.abc.old")
    with pytest.raises(OutputError, match="already holds a bundle"):
        gpt2onnx.export(make_checkpoint(), target)
    assert content(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_names_that_look_like_patterns_match_only_themselves(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    other = tmp_path / ".bxx.abc.new"
    other.mkdir()
    gpt2onnx.export(make_checkpoint(), tmp_path / "b*")
    assert other.is_dir()


@posix
def test_disk_full(target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before, checkpoint = content(target), make_checkpoint(weights_seed=1, vocab_size=5000)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OutputError, match=r"can't write .*bundle: File too large") as caught:
            gpt2onnx.export(checkpoint, target, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert content(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.001])
def test_truncated_checkpoint(kept: float, target: Path, make_checkpoint: MakeCheckpoint) -> None:
    before, checkpoint = content(target), make_checkpoint(weights_seed=1)
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * kept))
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        gpt2onnx.export(checkpoint, target, force=True)
    assert "\n" not in str(caught.value)
    assert content(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_checkpoint_truncated_while_it_is_read(
    target: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint

    def fail(self: Checkpoint, name: str) -> None:
        raise CheckpointError(f"can't read tensor {name}")

    before = content(target)
    monkeypatch.setattr(Checkpoint, "tensor", fail)
    with pytest.raises(CheckpointError):
        gpt2onnx.export(make_checkpoint(), target, force=True)
    assert content(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_target_that_appears_meanwhile_is_not_overwritten(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def someone_else_is_faster(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / MANIFEST).write_text("{}")

    with pytest.raises(OutputError, match="already holds a bundle"):
        gpt2onnx.export(make_checkpoint(), target, progress=someone_else_is_faster)
    assert content(target) == {MANIFEST: b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_progress_counts_every_byte_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    gpt2onnx.export(
        make_checkpoint(), tmp_path / "bundle", dtype="int8", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
