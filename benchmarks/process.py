"""A contender's process: measured in its turn, stopped in the others' turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .contenders import Contender
from .peers.worker import Task

WORKER = Path(__file__).parent / "peers" / "worker.py"


class Failed(Exception):  # noqa: N818  an answer, not an error
    """A contender can't do a task: its figure is missing, the comparison continues."""


def environment(threads: int) -> dict[str, str]:
    """Variables of a contender's process: its threads, no network, and no settings of this Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return kept | count | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


class Worker:
    """A contender with its model loaded.

    Raises:
        Failed: it could not be started or loaded.
    """

    def __init__(self, contender: Contender, threads: int) -> None:
        self.contender = contender
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        try:
            self._process = subprocess.Popen(
                [contender.python, str(WORKER), contender.driver], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log, text=True, env=environment(threads),
            )  # fmt: skip
        except OSError as error:
            raise Failed(f"{error.strerror}: {contender.python}") from None
        with self.awake():
            loaded = self._ask(
                do="load", model=contender.model, precision=contender.precision, threads=threads
            )  # fmt: skip
        self.version: str = loaded["version"]

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its turn. Outside it the process is stopped, so that spinning threads can't slow down others."""
        self._signal("SIGCONT")
        try:
            yield
        finally:
            self._signal("SIGSTOP")

    def run(self, task: Task) -> tuple[float, list[list[int]]]:
        """Runs a task; returns seconds and the new tokens of each prompt."""
        answer = self._ask(do="generate", task=asdict(task))
        if "cannot" in answer:
            raise Failed("not offered")
        return answer["seconds"], answer["tokens"]

    def memory(self) -> dict[str, int]:
        """Resident bytes: the peak so far, and its part outside mapped files."""
        return self._ask(do="memory")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["without a word"])[-1]
            raise Failed(f"its process ended: {last[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


def cold_start(contender: Contender, threads: int, text: str) -> tuple[float, float]:
    """Seconds until a new process prints its first token, and until it ends.

    gpt2onnx starts as its command, a peer as its driver's script of a few lines.
    """
    if contender.ours:
        program = Path(contender.python).with_name("gpt2onnx")
        command = [str(program), "generate", "-m", contender.model, text, "--max-new-tokens", "1"]
        command += ["--threads", str(threads)]
    else:
        command = [contender.python, str(WORKER), contender.driver, contender.model, contender.precision]
        command += [str(threads), text]
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(threads)
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        shown = time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode:
        raise Failed(f"exit code {process.returncode}")
    return shown, time.perf_counter() - started
