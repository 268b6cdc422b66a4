"""Commands that meet a fault at one chosen step; another process looks at what is left.

    python tests/support/fault_points.py KIND COMMAND FIRST SECOND TARGET --most 100

COMMAND is export, pack or unpack. Each run replaces the TARGET made of FIRST by that of SECOND, or the other way round,
and meets the fault at another step:

    kill       SIGKILL, before a call that touches the file system
    terminate  SIGTERM, before such a call
    full, io   such a call fails: no space left, input/output error
    interrupt  Ctrl-C, at any call of any function

Prints the number of steps and of tries. Fails at the first try that leaves less than a whole target, more than one
workspace, or a traceback. It runs in a process of its own, since it forks.
"""

import argparse
import contextlib
import errno
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2onnx.cli.main import main
from gpt2onnx.errors import OutputError
from gpt2onnx.exporter.files.atomic import replacing

TOUCHES_FILES = frozenset(
    {"open", "write", "writelines", "flush", "close", "read", "mkdir", "rename", "replace", "chmod", "utime", "unlink"}
    | {"remove", "rmdir", "fsync", "flock", "scandir", "listdir", "tofile", "fromfile", "truncate", "sendfile"}
    | {"copyfileobj", "link", "symlink"}
)
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ERRORS = {"full": errno.ENOSPC, "io": errno.EIO}
OPTIONS = {"export": ["--no-parity", "--no-quality"], "pack": [], "unpack": []}
SECONDS = 60  # for one run that takes a fraction of one


class Steps:
    """Counts the steps of a process, and lets the fault happen at one of them."""

    def __init__(self, kind: str, at: int | None) -> None:
        self.kind, self.at, self.count = kind, at, 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        calls = event in ("call", "c_call") and function is not sys.setprofile
        touches = event == "c_call" and function.__name__ in TOUCHES_FILES and not isinstance(function.__self__, str)
        if not (calls if self.kind == "interrupt" else touches):
            return
        self.count += 1
        if self.count == self.at:
            if self.kind in ERRORS:
                raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]))
            os.kill(os.getpid(), SIGNALS[self.kind])


@dataclass
class Run:
    """A run of a command in a child process: its exit status, the steps that it counted, and its standard error."""

    status: int
    steps: int
    said: str


@dataclass(frozen=True)
class Command:
    """A command that replaces `target`."""

    name: str
    target: Path

    def invoke(self, source: Path, steps: Steps | None = None) -> int:
        """Runs it in this process; its exit code."""
        sys.argv = ["gpt2onnx", self.name, str(source), str(self.target), "--force", "-q", *OPTIONS[self.name]]
        try:
            sys.setprofile(steps)
            try:
                main()
            finally:
                sys.setprofile(None)
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    def run(self, source: Path, kind: str, at: int | None = None) -> Run:
        """Runs it in a child process."""
        errors = Path(tempfile.gettempdir()) / f"errors-{os.getpid()}"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code, steps = 70, Steps(kind, at)
            try:
                code = self.invoke(source, steps)
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
            steps_counted = int(counted.read() or 0)
        said = errors.read_text(errors="replace").strip()
        errors.unlink()
        return Run(status, steps_counted, said)


def content(target: Path) -> dict[str, bytes]:
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in files}


def bring_back(target: Path) -> None:
    """Has another run of the target fail, which returns a target that a killed one had moved aside."""

    def refuse() -> None:
        raise OutputError("refused")

    with contextlib.suppress(OutputError), replacing(target, refuse):
        pass


def chosen(count: int, most: int) -> Iterator[int]:
    """Up to `most` steps, spread over all of them, and the last ones, where the target is replaced, without gaps."""
    if count <= most:
        yield from range(1, count + 1)
        return
    generator = random.Random(count)
    steps = set(generator.sample(range(1, count + 1), most - most // 4)) | set(range(count - most // 4, count + 1))
    yield from sorted(steps)


def try_steps(kind: str, command: Command, sources: list[Path], most: int) -> tuple[int, int, dict[str, int]]:
    """Tries up to `most` steps; returns the number of steps, of tries, and of either outcome."""
    target = command.target
    command.invoke(sources[0])  # imports in this process what every child needs
    wholes = []
    for source in [*sources, sources[0]]:
        done = command.run(source, kind)
        assert done.status == 0, done.said
        wholes.append(content(target))
    assert wholes[0] == wholes[2] != wholes[1]
    outcomes = {"old": 0, "new": 0}
    for step in chosen(done.steps, most):
        where = f"{command.name}, {kind} at step {step}"
        before = wholes.index(content(target))
        run = command.run(sources[1 - before], kind, step)
        workspaces = [path for path in target.parent.iterdir() if path != target and any(path.iterdir())]
        assert len(workspaces) <= 1, f"{where} left {workspaces}"
        if kind == "kill" and not target.exists():
            bring_back(target)
        after = content(target)
        assert after in wholes, f"{where} left {sorted(after)}: {run.said}"
        outcomes["old" if wholes.index(after) == before else "new"] += 1
        if kind == "kill":
            assert os.WTERMSIG(run.status) == signal.SIGKILL or run.status == 0, f"{where}: {run.status} {run.said}"
            continue
        assert os.WIFEXITED(run.status), f"{where}: status {run.status} {run.said}"
        code, said = os.WEXITSTATUS(run.status), run.said
        assert code in ((0, 130) if kind == "terminate" else (0, 1, 130)), f"{where}: exit code {code}: {said}"
        # If an interrupt meets a function that Python itself calls in passing, Python reports it and goes on.
        if kind == "interrupt" and said.startswith("Exception ignored in") and code == 0:
            said = ""
        assert "Traceback" not in said, f"{where}: {said}"
        assert len(said.splitlines()) <= 1 or code == 0, f"{where}: {said}"
        if code == 0 and kind in ERRORS:
            assert wholes.index(after) != before, f"{where} was swallowed"
    done = command.run(sources[0], kind)
    assert done.status == 0, done.said
    left = [path for path in target.parent.iterdir() if path != target]
    # A process that ends just before it marks its workspace, or just after it removed the mark, leaves an empty folder.
    assert not any(any(path.iterdir()) for path in left), f"there is still {left}"
    return done.steps, sum(outcomes.values()), outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=[*SIGNALS, *ERRORS])
    parser.add_argument("command", choices=OPTIONS)
    parser.add_argument("sources", nargs=2, type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--most", type=int, default=1_000_000)
    given = parser.parse_args()
    given.target.parent.mkdir(parents=True, exist_ok=True)
    steps, tried, outcomes = try_steps(given.kind, Command(given.command, given.target), given.sources, given.most)
    print(
        f"{given.kind}: {tried} of {steps} steps tried, {outcomes['old']} left the old target, {outcomes['new']} the new one"
    )
