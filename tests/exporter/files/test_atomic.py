"""A folder is replaced whole or not at all, and only files of the run and of the bundle are ever removed.

Faults at every step of real commands: tests/exporter/test_faults.py.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.systems import posix

import gpt2onnx
from gpt2onnx.errors import OutputError
from gpt2onnx.exporter.files.archive import pack, unpack
from gpt2onnx.exporter.files.atomic import replacing
from gpt2onnx.exporter.files.target import check_target
from gpt2onnx.models.bundle import MANIFEST


def accept() -> None:
    pass


def refuse() -> None:
    raise OutputError("refused")


def write(target: Path, text: str, check: Callable[[], None] = accept) -> None:
    with replacing(target, check) as folder:
        (folder / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    write(path, "old")
    (path / "another").write_text("old")
    return path


def test_the_new_folder_takes_the_place_of_the_old(target: Path) -> None:
    write(target, "new")
    assert names(target) == ["file"]
    assert (target / "file").read_text() == "new"
    write(target.parent / "a" / "b", "new")
    assert names(target.parent) == ["a", "target"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError(), KeyboardInterrupt()])
def test_a_failure_leaves_the_target_as_it_was(failure: BaseException, target: Path) -> None:
    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):  # noqa: PT012, SIM117
        with replacing(target, accept) as folder:
            (folder / "file").write_text("half")
            raise failure
    with pytest.raises(OutputError, match="refused"):
        write(target, "new", refuse)
    assert names(target) == ["another", "file"]
    assert (target / "file").read_text() == "old"
    assert names(target.parent) == ["target"]


def test_the_old_folder_returns_if_the_new_one_can_t_be_renamed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match=r"can't write .*target: Input/output error"):
        write(target, "new")
    assert (target / "file").read_text() == "old"
    assert names(target.parent) == ["target"]


def test_of_two_runs_the_last_stays_or_the_first_where_neither_may_replace(tmp_path: Path) -> None:
    with replacing(tmp_path / "target", accept) as folder:
        write(tmp_path / "target", "first")  # which leaves the workspace of a running process alone
        (folder / "file").write_text("last")
    assert (tmp_path / "target" / "file").read_text() == "last"

    other = tmp_path / "other"
    other.mkdir()

    def check() -> None:
        if any(other.iterdir()):
            raise OutputError("already there")
        write(other, "first")  # the other run is done right after this one's check

    with pytest.raises(OutputError, match="already there"):
        write(other, "last", check)
    assert (other / "file").read_text() == "first"
    assert names(tmp_path) == ["other", "target"]


@posix
@pytest.mark.parametrize("moved", [False, True], ids=["while it writes", "between the two renames"])
def test_the_next_run_clears_up_after_a_killed_one(moved: bool, target: Path) -> None:
    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        rename = Path.rename
        Path.rename = lambda path, to: (kill if path.name == "new" else rename)(path, to)  # type: ignore[assignment, func-returns-value, method-assign, return-value]
        try:
            write(target, "new", accept if moved else kill)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert target.exists() is not moved
    assert len(names(target.parent)) == 1 + (not moved)
    with pytest.raises(OutputError, match="refused"):
        write(target.parent / "another", "new", refuse)
    assert names(target) == ["another", "file"]
    assert names(target.parent) == ["target"]


def test_hidden_folders_of_the_user_stay(target: Path) -> None:
    mine = [".target.2024-05.new", ".target.mine.old", ".gpt2onnx-0123456789abcdef", ".b.old"]
    for name in mine:
        write(target.parent / name, "mine")
    target.rename(target.parent / "moved")
    write(target.parent / "b", "new")
    with pytest.raises(OutputError, match="refused"):
        write(target, "new", refuse)
    assert names(target.parent) == sorted([*mine, "b", "moved"])
    assert all((target.parent / name / "file").read_text() == "mine" for name in mine)


def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(target: Path) -> None:
    link = target.parent / "links" / "link"
    link.parent.mkdir()
    link.symlink_to("../target")
    write(link, "new")
    assert link.is_symlink()
    assert names(target) == ["file"]
    assert (names(target.parent), names(link.parent)) == (["links", "target"], ["link"])


def test_the_folder_that_one_is_in_is_not_replaced(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target)
    for path in (target, Path(), target.parent):
        with pytest.raises(OutputError, match="the folder that you are in"):
            write(path, "new")
    assert names(target) == ["another", "file"]


# Bundles


@pytest.fixture
def bundle(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    return gpt2onnx.export(make_checkpoint(), tmp_path / "bundle").folder


def test_force_drops_no_file_of_the_user(bundle: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    archive = pack(bundle, tmp_path / "bundle.tar.gz").path
    checkpoint = shutil.copytree(make_checkpoint(), bundle / "checkpoint")
    (tmp_path / "elsewhere").mkdir()

    def assert_refused(name: str) -> None:
        for run in (
            lambda: gpt2onnx.export(checkpoint if checkpoint.exists() else "tales", bundle, force=True),
            lambda: unpack(archive, bundle, force=True),
        ):
            with pytest.raises(OutputError, match=rf"bundle also holds {name}, .*: move it elsewhere") as caught:
                run()
            assert "\n" not in str(caught.value)

    assert_refused("checkpoint/config.json")  # its own source
    checkpoint.rename(tmp_path / "elsewhere" / "checkpoint")
    for path in (bundle / "notes.txt", bundle / "onnx" / "notes.txt"):
        path.write_text("mine")
        assert_refused(path.relative_to(bundle).as_posix())
        path.unlink()
    (bundle / "link").symlink_to(tmp_path / "elsewhere")
    assert_refused("link")
    (bundle / "link").unlink()
    unpack(archive, bundle, force=True)


def test_a_file_that_comes_while_the_bundle_is_made_stays(bundle: Path, make_checkpoint: MakeCheckpoint) -> None:
    def note(done: int, total: int) -> None:
        (bundle / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="also holds notes"):
        gpt2onnx.export(make_checkpoint(weights_seed=1), bundle, force=True, progress=note)
    assert (bundle / "notes.txt").read_text() == "mine"


def test_force_replaces_a_bundle_whose_manifest_can_t_be_read(bundle: Path) -> None:
    (bundle / MANIFEST).write_text("{}")
    check_target(bundle, force=True)
    with pytest.raises(OutputError, match="--force"):
        check_target(bundle, force=False)
    (bundle / "notes.txt").touch()
    with pytest.raises(OutputError, match="also holds notes"):
        check_target(bundle, force=True)


def test_a_target_that_is_no_bundle_is_never_replaced(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).unlink()
    for place in (bundle, bundle / "config.json"):
        with pytest.raises(OutputError, match="exists and is not a"):
            check_target(place, force=True)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nothing", tmp_path / ("long" * 1000)):
        check_target(place, force=False)
