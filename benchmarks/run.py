"""Measures gpt2onnx and its peers side by side: A B C A B C …, each in its own process and environment.

    python -m benchmarks.prepare                                      once
    python -m benchmarks.run                                          all of it, about forty minutes
    python -m benchmarks.run --minutes 4                              as many parts as fit; call it again for more
    python -m benchmarks.run --families int8 --scenarios "batch" --rounds 3 --out mine.json
    python -m benchmarks.report docs/benchmarks/results.json          the report from the figures

All get the same token ids, threads and tasks. A round runs each contender once; ratios are taken round by round, so
that other load on the machine affects all alike. A part is one scenario of one precision class; it is saved when it
is complete, and saved parts are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2onnx.experiments.machine import MemoryReader  # pyright: ignore[reportMissingImports]
from gpt2onnx.runtime.host import resources  # pyright: ignore[reportMissingImports]

from . import contenders, environments, machine
from .contenders import Contender
from .prepare import default_work
from .process import Failed, Worker, cold_start
from .scenarios import Measure, Scenario, chosen, is_chosen, shortened, varied

RESULTS = environments.REPOSITORY / "docs" / "benchmarks" / "results.json"
COLD, MEMORY = "cold start", "memory"
START = "Once upon a time"

Figures = dict[str, dict[str, list[float]]]  # contender, measure -> one figure a round
Missing = dict[str, str]  # contender -> why it has none


class Results:
    """Figures so far, in a file.

    Raises:
        SystemExit: the file was begun with other threads or rounds.
    """

    def __init__(self, path: Path, threads: int, rounds: int) -> None:
        self._path = path
        self._content: dict[str, Any] = {
            "machine": machine.describe(), "threads": threads, "rounds": rounds, "contenders": {}, "parts": [],
        }  # fmt: skip
        if path.exists():
            found = json.loads(path.read_text())
            if (found["threads"], found["rounds"]) != (threads, rounds):
                raise SystemExit(f"{path} was begun with other --threads or --rounds: name another file with --out")
            self._content = found

    def has(self, family: str, scenario: str) -> bool:
        return any((part["family"], part["scenario"]) == (family, scenario) for part in self._content["parts"])

    def describe(self, contender: Contender, version: str) -> None:
        """Notes a contender's facts."""
        known = self._content["contenders"]
        if contender.name in known and contender.family in known[contender.name]["families"]:
            return
        facts = known.setdefault(contender.name, {"families": []})
        facts["families"].append(contender.family)
        facts |= {"ours": contender.ours, "version": version, "note": contender.note, "slow": contender.slow}
        facts |= {"read_bytes": contender.read_bytes(), "model_bytes": contender.model_bytes()}
        facts["weights_bytes"] = Path(contender.weights).stat().st_size
        if contender.environment:
            folder = Path(contender.environment)
            facts["environment_bytes"] = environments.size(folder.parents[1], folder.name)

    def add(self, part: dict[str, Any]) -> None:
        """Saves a part. The file is complete also after a crash."""
        now = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit()}
        self._content["parts"].append(part | now)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self._content, indent=1) + "\n")
        whole.replace(self._path)


def rate(worker: Worker, measure: Measure, step: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the tokens. `step` chooses the prompts."""
    less = 0.0
    with worker.awake():
        seconds, tokens = worker.run(varied(measure.task, step))
        count = sum(map(len, measure.task.prompts if measure.prompt else tokens))
        if measure.less:
            less, fewer = worker.run(varied(measure.less, step + 1))
            count -= sum(map(len, fewer))
    if any(len(row) != measure.task.new_tokens for row in tokens):
        raise Failed(f"made {[len(row) for row in tokens]} tokens for {measure.task.new_tokens}")
    # Noise can exceed the difference of short times: then the whole time is a bound.
    return count / (seconds - less if seconds > less else seconds), tokens


def compare(workers: list[Worker], scenario: Scenario, memory: MemoryReader, rounds: int) -> dict[str, Any]:
    """Measures a part: a warm-up round, then the rounds of a scenario."""
    figures: Figures = {}
    missing: Missing = {}
    same: dict[str, str] = {}
    bandwidth: list[float] = []
    texts: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        if turn:
            bandwidth.append(max(memory.read() for _ in range(3)))
        for worker in workers:
            name = worker.contender.name
            for place, measure in enumerate(scenario.measures):
                if name in missing:
                    continue
                # Slow contenders write less where they are compared with themselves; all do in the warm-up.
                short = turn == 0 or (worker.contender.slow and scenario.within)
                step = 2 * (turn * len(scenario.measures) + place)
                try:
                    speed, tokens = rate(worker, shortened(measure) if short else measure, step)
                except Failed as failed:
                    missing[name] = str(failed)
                    figures.pop(name, None)
                    continue
                if measure is scenario.measures[0]:
                    texts[name] = tokens
                if turn:
                    figures.setdefault(name, {}).setdefault(measure.name, []).append(speed)
    ours = next((texts[w.contender.name] for w in workers if w.contender.ours and w.contender.name in texts), None)
    if ours is not None and scenario.measures[0].task.sampling is None:
        for name, tokens in texts.items():
            equal = sum(mine[: len(row)] == row for mine, row in zip(ours, tokens, strict=True))
            same[name] = f"{equal}/{len(ours)}"
    return {
        "scenario": scenario.name, "text": scenario.text, "unit": "tokens/s", "within": scenario.within,
        "measures": [measure.name for measure in scenario.measures], "bandwidth": bandwidth, "figures": figures,
        "missing": missing, "same_tokens": same,
    }  # fmt: skip


def start(family: list[Contender], threads: int, results: Results) -> list[Worker]:
    """Starts the processes of a class with their models loaded; those that fail are reported and left out."""
    workers: list[Worker] = []
    for contender in family:
        try:
            worker = Worker(contender, threads)
        except Failed as failed:
            say(f"{contender.name}: left out: {failed}")
            continue
        results.describe(contender, worker.version)
        workers.append(worker)
    return workers


def start_cold(known: list[Contender], threads: int, rounds: int) -> dict[str, Any]:
    """Measures a part: processes from their start to the first token.

    Each starts twice and the second counts, with files in the page cache, which a virtual machine's host may empty.
    """
    figures: Figures = {}
    missing: Missing = {}
    cold = [contender for contender in known if contender.cold]
    for _ in range(rounds):
        for contender in cold:
            if contender.name in missing:
                continue
            try:
                cold_start(contender, threads, START)
                shown, ended = cold_start(contender, threads, START)
            except Failed as failed:
                missing[contender.name] = str(failed)
                continue
            found = figures.setdefault(contender.name, {"first token": [], "end": []})
            found["first token"].append(shown)
            found["end"].append(ended)
    return _of_processes(COLD, "s", ["first token", "end"], figures, missing)


def measure_memory(known: list[Contender], threads: int, results: Results) -> dict[str, Any]:
    """Measures a part: memory of a process that has loaded its model and written 128 tokens after 32."""
    figures: Figures = {}
    missing: Missing = {}
    task = next(chosen(["batch 1"])).measures[0].task
    for contender in {contender.name: contender for contender in known}.values():
        for worker in start([contender], threads, results):
            try:
                with worker.awake():
                    worker.run(task)
                    figures[contender.name] = {name: [value] for name, value in worker.memory().items()}
            except Failed as failed:
                missing[contender.name] = str(failed)
            worker.close()
    return _of_processes(MEMORY, "bytes", ["peak", "anonymous"], figures, missing)


def _of_processes(name: str, unit: str, measures: list[str], figures: Figures, missing: Missing) -> dict[str, Any]:
    return {"family": "processes", "scenario": name, "text": "", "unit": unit, "within": None, "measures": measures,
            "bandwidth": [], "figures": figures, "missing": missing, "same_tokens": {}}  # fmt: skip


def say(text: str) -> None:
    """Reports progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_all(known: list[Contender], families: list[str], names: list[str], results: Results, threads: int,
            rounds: int, enough: Callable[[], bool]) -> bool:  # fmt: skip
    """Measures the parts that the file lacks; returns whether it is complete."""
    memory = MemoryReader(threads)
    for family in families:
        parts = [each for each in chosen(names) if not each.classes or family in each.classes]
        parts = [each for each in parts if not results.has(family, each.name)]
        if not parts:
            continue
        if enough():
            return False
        workers = start([each for each in known if each.family == family], threads, results)
        try:
            for scenario in parts:
                if enough():
                    return False
                began = time.monotonic()
                results.add({"family": family, **compare(workers, scenario, memory, rounds)})
                say(f"{family}, {scenario.name}: {time.monotonic() - began:.0f} s")
        finally:
            for worker in workers:
                worker.close()
    for name, measure in {
        COLD: lambda: start_cold([each for each in known if each.family in families], threads, rounds),
        MEMORY: lambda: measure_memory([each for each in known if each.family in families], threads, results),
    }.items():
        if is_chosen(name, names) and not results.has("processes", name):
            if enough():
                return False
            began = time.monotonic()
            results.add(measure())
            say(f"{name}: {time.monotonic() - began:.0f} s")
    return True


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up (%(default)s)")
    parser.add_argument("--threads", type=int, default=resources.cores().usable, help="(%(default)s)")
    parser.add_argument("--families", nargs="*", help="precision classes (all)")
    parser.add_argument("--scenarios", nargs="*", default=[], help="beginnings of scenarios' names (all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no part after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=default_work(), help="work folder of `prepare` (%(default)s)")
    parser.add_argument("--contenders", type=Path, help="JSON list of other contenders")
    arguments = parser.parse_args()
    given = arguments.contenders
    known = contenders.from_file(given) if given else contenders.standard(arguments.work.resolve())
    families = arguments.families or list(dict.fromkeys(each.family for each in known))
    results = Results(arguments.out, arguments.threads, arguments.rounds)
    began = time.monotonic()
    complete = run_all(
        known, families, arguments.scenarios, results, arguments.threads, arguments.rounds,
        lambda: time.monotonic() - began > arguments.minutes * 60,
    )  # fmt: skip
    say(f"{arguments.out}: {'complete' if complete else 'incomplete: run it again'}")


if __name__ == "__main__":
    main()
