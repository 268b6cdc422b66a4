"""Exports that meet a fault at one chosen step; what is left is looked at from another process.

    python tests/support/fault_points.py KIND FIRST_CHECKPOINT SECOND_CHECKPOINT FOLDER --most 100

makes an export, each time with the fault at another step, replace a bundle; the kinds are

    kill       the process ends at once, as by SIGKILL, before a call that touches the file system
    full, io   such a call fails: no space left, input/output error
    interrupt  Ctrl-C, at any call of any function

It prints how many steps there are and how many were tried, and fails at the first that leaves less than a
whole bundle, more than one hidden folder, or a traceback. It runs in a process of its own: it forks.
"""

import argparse
import errno
import importlib
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gpt2onnx
from gpt2onnx.cli.main import main

TOUCHES_FILES = frozenset(
    [
        "open",
        "write",
        "writelines",
        "flush",
        "close",
        "read",
        "mkdir",
        "rename",
        "replace",
        "chmod",
        "utime",
        "unlink",
        "remove",
        "rmdir",
        "fsync",
        "flock",
        "scandir",
        "listdir",
        "tofile",
        "fromfile",
        "truncate",
        "sendfile",
        "copyfileobj",
        "link",
        "symlink",
    ]
)
ERRORS = {"full": errno.ENOSPC, "io": errno.EIO}
SECONDS = 60  # for one export that takes a fraction of one

Fault = Callable[[], None]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def failing(kind: str) -> Fault:
    def fail() -> None:
        raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))

    return fail


class Steps:
    """Counts the steps of a process, and lets the fault happen at one of them."""

    def __init__(self, kind: str, at: int | None) -> None:
        self.every_call, self.at, self.count = kind == "interrupt", at, 0
        self.fault = {"kill": kill, "interrupt": interrupt}.get(kind) or failing(kind)

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        calls = event in ("call", "c_call") and function is not sys.setprofile
        touches = event == "c_call" and function.__name__ in TOUCHES_FILES and not isinstance(function.__self__, str)
        if not (calls if self.every_call else touches):
            return
        self.count += 1
        if self.count == self.at:
            self.fault()


def export(source: Path, target: Path, steps: Steps, errors: Path) -> tuple[int, int]:
    """Exports in a child process; its exit status, and how many steps it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70
        try:
            sys.argv = ["gpt2onnx", "export", str(source), str(target), "--force", "--no-parity", "--no-quality", "-q"]
            sys.setprofile(steps)
            try:
                main()
            finally:
                sys.setprofile(None)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except BaseException:  # noqa: BLE001  # what would end with a traceback ends with one
            sys.excepthook(*sys.exc_info())
        finally:
            os.write(writer, str(steps.count).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    timer = threading.Timer(SECONDS, os.kill, (child, signal.SIGALRM))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    with os.fdopen(reader, "rb") as counted:
        return status, int(counted.read() or 0)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chosen(count: int, most: int) -> Iterator[int]:
    """So many of the steps, spread over all of them, and the last ones, where the exchange is, without gaps."""
    if count <= most:
        yield from range(1, count + 1)
        return
    generator = random.Random(count)
    steps = set(generator.sample(range(1, count + 1), most - most // 4)) | set(range(count - most // 4, count + 1))
    yield from sorted(steps)


def run(kind: str, sources: list[Path], folder: Path, most: int) -> tuple[int, int, dict[str, int]]:
    """Tries up to so many steps; how many there were, how many were tried, and what came of them."""
    target, errors = folder / "bundle", Path(tempfile.mkdtemp()) / "errors"
    # What is imported only when it is needed is imported now, not in every child.
    gpt2onnx.export(sources[0], target, force=True)
    importlib.import_module("gpt2onnx.cli.export")
    wholes = []
    counted = 0
    for source in [*sources, sources[0]]:
        status, counted = export(source, target, Steps(kind, None), errors)
        assert status == 0, errors.read_text()
        wholes.append(content(target))
    assert wholes[0] == wholes[2] != wholes[1]
    assert any(folder.iterdir())
    outcomes = {"old": 0, "new": 0}
    tried = 0
    for step in chosen(counted, most):
        before = wholes.index(content(target))
        status, _ = export(sources[1 - before], target, Steps(kind, step), errors)
        tried += 1
        after = content(target) if target.exists() else None
        said = errors.read_text(errors="replace").strip()
        assert after in wholes, f"{kind} at step {step} left {after and sorted(after)}: {said}"
        outcomes["old" if wholes.index(after) == before else "new"] += 1
        left = sorted(path.name for path in folder.iterdir() if path != target)
        if kind == "kill":
            assert os.WTERMSIG(status) == signal.SIGKILL or status == 0, f"at step {step}: {status} {said}"
            assert len({Path(name).stem for name in left}) <= 1, f"{kind} at step {step} left {left}"
        else:
            assert os.WIFEXITED(status), f"at step {step}: status {status} {said}"
            code = os.WEXITSTATUS(status)
            assert code in (0, 1, 130), f"{kind} at step {step}: exit code {code}: {said}"
            # Where an interrupt meets a function that Python itself calls in passing, Python reports it and goes on.
            if kind == "interrupt" and said.startswith("Exception ignored in") and code == 0:
                said = ""
            assert "Traceback" not in said, f"{kind} at step {step}: {said}"
            assert len(said.splitlines()) <= 1 or code == 0, f"{kind} at step {step}: {said}"
            if code == 0 and kind != "interrupt":
                assert wholes.index(after) != before, f"{kind} at step {step} was swallowed"
    status, _ = export(sources[0], target, Steps(kind, None), errors)
    assert status == 0, errors.read_text()
    left = sorted(path.name for path in folder.iterdir() if path != target)
    assert not left, f"after a whole export there is still {left}"
    return counted, tried, outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["kill", "interrupt", *ERRORS])
    parser.add_argument("sources", nargs=2, type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=1_000_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    counted, tried, outcomes = run(given.kind, given.sources, given.folder, given.most)
    print(
        f"{given.kind}: {tried} of {counted} steps tried, {outcomes['old']} left the old bundle, {outcomes['new']} the new one"
    )
