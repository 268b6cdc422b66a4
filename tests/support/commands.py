"""The command line in tests: how it is run and waited for."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


CommandLine = Callable[..., Finished]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Fails where a condition doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.005)
