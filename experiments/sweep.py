"""Sweep: runs every strategy of a grid on every prompt, one JSON line a run.

results.jsonl is written during the sweep. All other files are made from it alone, so they can be made again at any time.
`sweep` does all of it; `run` and `write_files` are its parts.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from gpt2onnx.errors import OptionError, OutputError

from ..exporter.files.atomic import replacing_file
from ..runtime import jobs
from ..runtime.decoding.strategy import seeded
from ..runtime.host import locks
from ..runtime.host.progress import Progress, or_notebook_bar
from ..runtime.jsontext import to_line
from ..runtime.model import Model
from ..runtime.options import GenerationConfig
from ..runtime.requests import Result
from . import machine, report
from .energy.csvlog import to_csv
from .energy.power import DEFAULT_SECONDS
from .energy.tracker import EnergyTracker
from .grid import MOST_RUNS, Source, Strategy
from .grid import load as load_grid
from .metrics import METRICS, distinct, repeated

RESULTS, EMISSIONS, SUMMARY, REPORT = "results.jsonl", "emissions.csv", "summary.csv", "report.html"

Record = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """Runs of a sweep: prompts by strategies.

    Raises:
        OptionError: there is no prompt, a prompt is given twice, or there are too many runs.
    """

    model: Model
    prompts: Sequence[str]
    strategies: Sequence[Strategy]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise OptionError("a sweep needs a prompt (--prompt), or a grid with prompts")
        if len(set(self.prompts)) < len(self.prompts):
            raise OptionError("a prompt is given twice")
        if len(self) > MOST_RUNS:
            raise OptionError(f"{len(self):,} runs are more than {MOST_RUNS}: fewer prompts, or a smaller grid")

    def __len__(self) -> int:
        return len(self.prompts) * len(self.strategies)

    def runs(self) -> Iterator[tuple[str, Strategy]]:
        """All runs in order: prompt by prompt."""
        return ((prompt, strategy) for prompt in self.prompts for strategy in self.strategies)

    def key(self, prompt: str, strategy: Strategy) -> str:
        """Hash of all that decides a run's results."""
        runner = self.model.runner
        parts = (
            self.model.sha256, runner.device, runner.threads,
            prompt, strategy.label, strategy.options.to_dict(),
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, repr=False)
class Runs:
    """Runs of a sweep.

    Attributes:
        records: of all runs, as results.jsonl has them.
        report: the page about them; None where no folder was given.
    """

    records: list[Record]
    report: Path | None

    def rows(self) -> list[Record]:
        """A flat row for each run: the first continuation's text, and all figures."""
        return [summary(record) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{len(self)} runs{'' if self.report is None else f', shown by {self.report}'}; gpt2onnx.to_pandas makes a table"


def sweep(
    model: Model,
    prompts: str | Sequence[str] = (),
    *,
    grid: Source = None,
    out: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    resume: bool = False,
    force: bool = False,
    energy: bool | None = None,
    country: str | None = None,
    energy_seconds: float | None = None,
    progress: Progress | None = None,
) -> Runs:
    """Runs a grid of decoding strategies on prompts.

    Args:
        model: generates.
        prompts: texts to continue; by default the grid's.
        grid: the strategies; None for the built-in grid. Options with lists of values to try, such as
            `{"num_beams": [2, 6]}`, a list of such, each with a "name", or the content or the path of a TOML file.
        out: folder for results.jsonl, summary.csv, emissions.csv and report.html; None keeps the runs in memory only.
        seed: of the random draws, in place of the grid's.
        max_new_tokens: length of the texts, in place of the grid's.
        resume: go on with the interrupted sweep in `out`.
        force: replace the results of an earlier sweep in `out`.
        energy: measure each run; by default where codecarbon is installed.
        country, energy_seconds: as `country` and `seconds` of `track_energy`.
        progress: called with the runs done and all runs after each; a notebook shows a bar by default.

    Raises:
        OptionError: the grid can't be used, there is no prompt, a prompt is given twice, or there are too many runs.
        OutputError: `out` can't be written, or holds results, and neither `resume` nor `force` was given.
        PromptError: a prompt is too long.
        MissingExtraError: jinja2, which the report needs, or codecarbon isn't installed.
        BackendError: ONNX Runtime or codecarbon failed.
    """
    asked = country is not None or energy_seconds is not None
    if energy is False and asked:
        raise OptionError("country and energy_seconds go with energy, which is switched off")
    if out is not None:
        check_folder(Path(out), replaces=resume or force)
    tracker = None
    if energy or asked or (energy is None and has_codecarbon()):
        tracker = EnergyTracker(country=country, seconds=DEFAULT_SECONDS if energy_seconds is None else energy_seconds)
    tried = load_grid(grid, model.generation_config, {"seed": seed, "max_new_tokens": max_new_tokens})
    plan = Sweep(model, ([prompts] if isinstance(prompts, str) else prompts) or tried.prompts, tried.strategies)
    progress = or_notebook_bar(progress, "Sweep", "runs")
    records: list[Record] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if out is None else out)
        try:
            for record in run(plan, folder, tracker, resume=resume):
                records.append(record)
                if progress is not None:
                    progress(len(records), len(plan))
        finally:
            # Also after Ctrl-C, for the finished runs.
            if records and out is not None:
                write_files(records, folder)
    return Runs(records, None if out is None else folder / REPORT)


def check_folder(folder: Path, *, replaces: bool) -> None:
    """Raises what a sweep into a folder would raise at its beginning; needs no model.

    Args:
        replaces: whether those of an earlier sweep are continued or replaced.

    Raises:
        OutputError: there are some, and they aren't to be replaced.
        MissingExtraError: jinja2, which the report needs, isn't installed.
    """
    report.check()
    results = folder / RESULTS
    if results.exists() and not replaces:
        raise OutputError(f"{results} exists: --resume (resume=True) continues it, --force (force=True) replaces it")


def has_codecarbon() -> bool:
    """Whether energy can be measured."""
    try:
        return importlib.util.find_spec("codecarbon") is not None
    except ImportError:
        return False


def run(sweep: Sweep, folder: Path, tracker: EnergyTracker | None = None, *, resume: bool = False) -> Iterator[Record]:
    """Runs a sweep, and appends each run to results.jsonl as soon as it is done.

    Args:
        tracker: measures energy; None for no energy figures.
        resume: go on behind the finished runs; otherwise they are overwritten.

    Yields:
        The record of each run in order, finished ones first.

    Raises:
        OutputError: the folder can't be written, or holds results of another sweep.
        PromptError: a prompt is too long.
        BackendError: ONNX Runtime or codecarbon failed.
    """
    path = folder / RESULTS
    done, end = _done(path, sweep) if resume else ([], 0)
    yield from done
    if len(done) == len(sweep):
        return
    # Warm-up: the first run of a process takes longer.
    sweep.model.answer([[0]], GenerationConfig(max_new_tokens=2))
    for prompt, strategy in sweep.runs():  # before earlier results are replaced
        sweep.model.check_options(strategy.options, len(sweep.model.prompt_ids(prompt, strategy.options)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if not locks.try_lock(file):
                raise OutputError(f"another sweep writes to {path}: wait for it, or choose another --out")
            file.truncate(end)
            for name in (EMISSIONS, SUMMARY, REPORT):  # of earlier results
                (folder / name).unlink(missing_ok=True)
            for prompt, strategy in islice(sweep.runs(), len(done), None):
                record = _run(sweep, prompt, strategy, tracker)
                file.write((to_line(record) + "\n").encode())
                file.flush()
                yield record
    except OSError as error:
        raise OutputError(f"can't write {error.filename or path}: {error.strerror}") from error


def write_files(records: Sequence[Record], folder: Path) -> None:
    """Writes emissions.csv, summary.csv and report.html. The same records give the same files.

    Raises:
        OutputError: the folder can't be written.
        MissingExtraError: jinja2 isn't installed.
    """
    rows = [record["emissions"] for record in records if record["emissions"] is not None]
    table = [summary(record) for record in records]
    contents = {
        EMISSIONS: _to_csv(rows),
        SUMMARY: _to_csv(table),
        REPORT: report.render(records) if records else None,
    }
    for name, content in contents.items():
        if content is not None:
            with replacing_file(folder / name, lambda: None) as file:
                file.write(content.encode(errors="replace"))
            continue
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"can't write {folder / name}: {error.strerror}") from error


def summary(record: Record) -> Record:
    """One flat row of a record: the first continuation's text, and all figures."""
    first = record["sequences"][0]
    energy = record["energy"] or {}
    row: Record = {name: record[name] for name in ("prompt_index", "prompt", "family", "strategy")}
    row |= {"text": first["text"], "finish_reason": first["finish_reason"]}
    row |= {name: record[name] for name in ("prompt_tokens", "completion_tokens", "seconds", "tokens_per_second")}
    row |= {name: energy.get(name) for name in ("joules", "joules_per_token", "g_co2eq_per_1000_tokens", "reliable")}
    return row | {name: record[name] for name in METRICS} | dict(record["options"])


def _run(sweep: Sweep, prompt: str, strategy: Strategy, tracker: EnergyTracker | None) -> Record:
    model, options = sweep.model, seeded(strategy.options)
    if tracker is None:
        model.reset()
        (result,) = model.answer([prompt], options)
        row, seconds = None, result.seconds
    else:
        with tracker.begin(model, options, strategy=strategy.label) as run:
            results = model.answer([prompt], options)
            (result,) = run.end(results, again=lambda: model.answer([prompt], options))
        row = tracker.rows[-1]
        seconds = row["seconds"]
    return {
        "key": sweep.key(prompt, strategy),
        "prompt_index": sweep.prompts.index(prompt),
        "prompt": prompt,
        "prompt_ids": result.prompt_ids,
        "family": strategy.family,
        "strategy": strategy.label,
        "options": options.to_dict(),
        "sequences": result.to_dict()["sequences"],
        **result.usage,
        "seconds": seconds,
        "tokens_per_second": result.usage["completion_tokens"] / seconds,
        **_metrics(model, result),
        "energy": None if result.energy is None else asdict(result.energy),
        "emissions": row,
        "model": {"source": model.bundle.manifest.source} | machine.setting(model),
    }


def _metrics(model: Model, result: Result) -> Record:
    tokens = [sequence.token_ids for sequence in result.sequences]
    logprobs = [logprob for ids in tokens for logprob in model.score(ids, prompt=result.prompt_ids).logprobs]
    values = (
        fmean(len(ids) for ids in tokens), fmean(logprobs), *(distinct(tokens, size) for size in (1, 2, 3)), repeated(tokens)
    )  # fmt: skip
    return dict(zip(METRICS, values, strict=True))


def _to_csv(rows: Sequence[Record]) -> str | None:
    """Rows under the union of their columns: versions of codecarbon have different ones. None without rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return to_csv([columns, *([row.get(name) for name in columns] for row in rows)]) if rows else None


def _done(path: Path, sweep: Sweep) -> tuple[list[Record], int]:
    """The finished runs, and the end of the last whole line in bytes."""
    if not path.exists():
        return [], 0
    records: list[Record] = []
    end = 0
    runs = sweep.runs()
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            expected = next(runs, None)
            record = jobs.load(line)
            if expected is None or not isinstance(record, dict) or record.get("key") != sweep.key(*expected):
                raise OutputError(
                    f"{path} holds results of another sweep (grid, prompts, model or threads): choose another --out"
                )
            records.append(record)
            end += len(line)
    return records, end
