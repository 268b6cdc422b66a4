"""Speed and overhead of a fleet on one machine: the figures of docs/scale.md.

    python -m benchmarks.fleet rate BUNDLE      tokens and prompts a second of one worker on one core
    python -m benchmarks.fleet overhead BUNDLE  Ray's start, a part's overhead, the command's memory
    python -m benchmarks.fleet scale BUNDLE     two workers on this machine against one
    python -m benchmarks.fleet read             lines a second that the command cuts into parts

Prints JSON.
"""

import io
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2onnx.fleet.bundle_copy import SharedBundle
from gpt2onnx.fleet.parts import Part, cut
from gpt2onnx.fleet.run import run
from gpt2onnx.fleet.worker import Work, carry_out
from gpt2onnx.runtime.options import GenerationConfig

NEW_TOKENS = 64
SECONDS = 6.0  # of one measurement, about


def lines(count: int, tokens: int) -> list[str]:
    """Requests of about five words, all different."""
    return [
        json.dumps({"id": index, "prompt": f"The story of number {index}", "max_new_tokens": tokens}) + "\n"
        for index in range(count)
    ]


def rate(bundle: Path) -> dict[str, Any]:
    """One worker without Ray around it: three parts for each batch size, the median."""
    found = {}
    for batch_size in (1, 8, 32):

        def seconds(requests: list[str], batch_size: int = batch_size) -> float:
            started = time.perf_counter()
            carry_out(SharedBundle.share(bundle, elsewhere=False), _work(batch_size), Part(0, 0), requests, None)
            return time.perf_counter() - started

        once = [seconds(lines(batch_size, NEW_TOKENS)) for _ in range(2)][-1]  # the first one loads the model
        part = lines(max(2, min(16, int(SECONDS / 3 / once))) * batch_size, NEW_TOKENS)
        speeds = [len(part) * NEW_TOKENS / seconds(part) for _ in range(3)]
        found[f"batch {batch_size}"] = {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "spread": [round(min(speeds), 1), round(max(speeds), 1)],
            "prompts_per_second": round(statistics.median(speeds) / NEW_TOKENS, 2),
        }
    return {"new_tokens": NEW_TOKENS, "threads": 1, "rates": found}


def overhead(bundle: Path) -> dict[str, Any]:
    """Parts of one request of one token: the time of Ray and of the command."""
    count = 400
    times, summary = _timed(bundle, lines(count, 1), part_size=1, workers=1)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    steady = times[len(times) // 4 :]
    return {
        "parts": summary.parts,
        "seconds_to_first_part": round(times[0], 2),
        "seconds_per_part": round((steady[-1] - steady[0]) / (len(steady) - 1), 4),
        "driver_cpu_seconds": round(cpu.ru_utime + cpu.ru_stime, 2),
        "driver_peak_mib": cpu.ru_maxrss // 1024,
    }


def scale(bundle: Path) -> dict[str, Any]:
    """The same parts with one worker and with two, from the first part's end to the last one's."""
    found = {}
    for workers in (1, 2):
        part = 64
        times, summary = _timed(bundle, lines(part * 24, NEW_TOKENS), part_size=part, workers=workers)
        tokens = summary.tokens * (1 - 1 / summary.parts)
        found[f"workers {workers}"] = {
            "tokens_per_second": round(tokens / (times[-1] - times[0]), 1),
            "seconds_to_first_part": round(times[0], 2),
            "seconds": round(times[-1], 2),
        }
    return found


def read() -> dict[str, Any]:
    """Lines of a hundred bytes, from memory."""
    count = 1_000_000
    stream = io.BytesIO(b"".join(b'{"id": %9d, "prompt": "%s"}\n' % (index, b"x" * 70) for index in range(count)))
    size = stream.getbuffer().nbytes
    started = time.perf_counter()
    parts = sum(1 for _ in cut(io.TextIOWrapper(stream, encoding="utf-8", errors="replace"), 0, 1000))
    seconds = time.perf_counter() - started
    return {"lines_per_second": round(count / seconds), "mb_per_second": round(size / seconds / 1e6), "parts": parts}


def _work(batch_size: int = 8) -> Work:
    return Work(GenerationConfig(), batch_size, "jsonl", "cpu", 1)


def _timed(bundle: Path, requests: list[str], *, part_size: int, workers: int) -> tuple[list[float], Any]:
    """Seconds from the start to each part's end, Ray's start included."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requests.jsonl"
        file.write_text("".join(requests))
        started = time.perf_counter()

        def note(requests: int, tokens: int) -> None:
            times.append(time.perf_counter() - started)

        output = str(Path(folder) / "results")
        summary = run(bundle, str(file), output, _work(), workers=workers, part_size=part_size, progress=note)
    return times, summary


def main() -> None:
    """Runs one measurement."""
    name, *bundle = sys.argv[1:]
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "rate": rate,
        "overhead": overhead,
        "scale": scale,
        "read": read,
    }
    print(json.dumps({name: measures[name](*map(Path, bundle))}, indent=2))


if __name__ == "__main__":
    main()
