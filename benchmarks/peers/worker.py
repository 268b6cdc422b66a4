"""A peer's process: JSON requests on stdin, JSON answers on stdout, one a line.

It runs in the peer's own environment, so it needs only the standard library.

    python worker.py DRIVER                                  answers requests
    python worker.py DRIVER MODEL PRECISION THREADS TEXT     prints the next token
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """What to generate: token ids in, so that no tokenizer is measured.

    Attributes:
        prompts: of one batch, of unequal length.
        new_tokens: exact number for each, end tokens ignored.
        num_beams: above 1 for a beam search.
        no_repeat_ngram_size: 0 for no limit.
        sampling: temperature, top_k, top_p and seed; None for greedy decoding.
        prompt_lookup: length of drafts copied from the text; 0 for none.
    """

    prompts: list[list[int]]
    new_tokens: int
    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    sampling: dict[str, float] | None = None
    prompt_lookup: int = 0


class Peer(Protocol):
    """A runtime under measurement."""

    version: str

    def load(self, model: str, precision: str, threads: int) -> None: ...

    def can(self, task: Task) -> bool:
        """Whether the runtime supports the task."""
        ...

    def generate(self, task: Task) -> list[list[int]]:
        """The new tokens of each prompt."""
        ...

    def first_token(self, model: str, text: str) -> str:
        """The next token as text, with the runtime's usual tokenizer."""
        ...


def memory() -> dict[str, int]:
    """Resident bytes: peak, now, and now outside mapped files."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    kilobytes = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith(" kB")}
    names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon"}
    return {name: int(kilobytes[field]) * 1024 for name, field in names.items()}


def serve(peer: Peer) -> None:
    """Answers requests until stdin ends. Output of libraries goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(peer, request)
        except Exception as error:  # noqa: BLE001  the harness records it
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "load":
        started = time.perf_counter()
        peer.load(request["model"], request["precision"], request["threads"])
        return {"seconds": time.perf_counter() - started, "version": peer.version}
    if request["do"] == "memory":
        return memory()
    task = Task(**request["task"])
    if not peer.can(task):
        return {"cannot": True}
    started = time.perf_counter()
    tokens = peer.generate(task)
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def main(driver: str, *first: str) -> None:
    peer: Peer = importlib.import_module(driver).Driver()
    if not first:
        serve(peer)
        return
    model, precision, threads, text = first
    peer.load(model, precision, int(threads))
    print(peer.first_token(model, text), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(*sys.argv[1:])
