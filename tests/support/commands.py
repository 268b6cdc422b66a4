"""The command line in tests: how it is run and waited for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


CommandLine = Callable[..., Finished]


def start(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
    """Starts the command line in a process of its own. Options are those of Popen; output is kept, as text."""
    command = [
        sys.executable,
        "-m",
        "gpt2onnx",
        *(each if isinstance(each, bytes) else str(each) for each in arguments),
    ]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | options)


def run(*arguments: object, seconds: float = 300, **options: Any) -> Finished:
    """Runs the command line in a process of its own; options are those of Popen."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=seconds)
    return Finished(process.returncode, out, err)


def at_a_terminal(command_line: CommandLine, *arguments: Any) -> Finished:
    """Runs a command whose standard error is a terminal of 24 lines and 100 columns."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with pytest.MonkeyPatch.context() as patch, os.fdopen(slave, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        done = command_line(*arguments)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end is closed
            break
    os.close(master)
    return replace(done, err=shown.decode())


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Fails where a condition doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.005)
