"""Energy of runs: a row each in a CSV file.

`power` measures and `csvlog` writes; this says which run it was and what a token of it cost.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from gpt2onnx.errors import OptionError

from ...runtime.decoding.strategy import seeded
from ...runtime.model import METER, Model
from ...runtime.options import OPTIONS, GenerationConfig
from ...runtime.ort.providers import VERSION
from ...runtime.requests import Energy, Request, Result
from ...runtime.stream import Stream
from .. import machine
from .csvlog import CsvLog
from .power import DEFAULT_SECONDS, MOST_SECONDS, PowerMeter, Reading


@contextmanager
def track_energy(
    path: str | os.PathLike[str] | None = None, *, country: str | None = None, seconds: float = DEFAULT_SECONDS
) -> Iterator["EnergyTracker"]:
    """Measures the energy of every `generate` and `stream` inside the `with` block, and appends a row for each to a CSV file.

    A result has its figures as `result.energy`, if it is the only one of its run. Each run starts without cached
    prefixes of earlier ones, and is repeated until it took long enough to be measured. Unseeded sampling gets a seed, so
    that each repetition gives the same tokens.

    Args:
        path: the CSV file; several processes may append to it. Without one, figures are only kept in memory.
        country: whose electricity it is, as ISO 3166-1 alpha-3; by default what codecarbon's configuration says,
            or else the world's average.
        seconds: repeat a run until it took so long; 0 for never. At most an hour.

    Raises:
        MissingExtraError: codecarbon (extra `energy`) isn't installed.
        OptionError: there is no such country, or `seconds` is out of range.
        OutputError: the file can't be written, or has other columns.
    """
    tracker = EnergyTracker(path, country=country, seconds=seconds)
    token = METER.set(tracker)
    try:
        yield tracker
    finally:
        METER.reset(token)
        tracker.close()


class EnergyTracker:
    """Measures runs; arguments and errors are those of `track_energy`, which makes it.

    Attributes:
        rows: of all runs so far, oldest first, by column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        country: str | None = None,
        seconds: float = DEFAULT_SECONDS,
    ) -> None:
        if not 0 <= seconds <= MOST_SECONDS:
            raise OptionError(f"the seconds to measure must be from 0 to {MOST_SECONDS:.0f}, not {seconds}")
        self.seconds = seconds
        self.meter = PowerMeter(country)
        self.rows: list[dict[str, Any]] = []
        columns = [*self.meter.columns, *_COLUMNS]
        self._log = None if path is None else CsvLog(Path(path), columns)
        self._open: dict[EnergyRun, Callable[[], None]] = {}

    def generate(
        self, model: Model, options: GenerationConfig, run: Callable[[GenerationConfig], list[Result]]
    ) -> list[Result]:
        """Measures a run of `Model.generate`; see `runtime.model.Meter`."""
        options = seeded(options)
        with self.begin(model, options) as measured:
            return measured.end(run(options), again=lambda: run(options))

    def stream(self, model: Model, stream: Stream) -> "MeasuredStream":
        """Measures a stream from its first piece on; see `runtime.model.Meter`."""
        return MeasuredStream(self, model, stream)

    def job(
        self, model: Model, options: GenerationConfig, records: Iterable[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Measures the records of a job as one run, of the strategy "job", also if it is interrupted."""
        counts = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        complete = False

        def end() -> None:
            if not run.ended:
                run.end_counted(None, complete=complete, **counts)

        with self.begin(model, options, strategy="job", close=end) as run:
            try:
                for record in records:
                    for name, count in record.get("usage", {}).items():
                        counts[name] += count
                    counts["requests"] += 1
                    yield record
                complete = True
            finally:
                end()

    def begin(
        self,
        model: Model,
        options: GenerationConfig,
        *,
        strategy: str | None = None,
        close: Callable[[], None] | None = None,
    ) -> "EnergyRun":
        """Begins to measure a run.

        Args:
            strategy: name in the run's row; by default `GenerationConfig.strategy`.
            close: ends the run if the caller has left it.
        """
        model.reset()
        # Runs at the same time can't be told apart.
        alone = not self._open
        for other in self._open:
            other.alone = False
        run = EnergyRun(self, model, options, strategy or options.strategy)
        run.alone = alone
        if close is not None:
            self._open[run] = close
        return run

    def close(self) -> None:
        """Ends runs that were left in the middle."""
        for close in list(self._open.values()):
            close()

    def _record(self, run: "EnergyRun", row: dict[str, Any]) -> None:
        self._open.pop(run, None)
        self.rows.append(row)
        if self._log is not None:
            self._log.append(row)


class EnergyRun:
    """A run under way; made by `EnergyTracker.begin`. Left by an exception before it has ended, it counts for nothing.

    Attributes:
        alone: whether no other run is measured at the same time.
        ended: whether its row is written.
    """

    def __init__(self, tracker: EnergyTracker, model: Model, options: GenerationConfig, strategy: str) -> None:
        self._tracker, self._model, self._options, self._strategy = tracker, model, options, strategy
        self._measurement = tracker.meter.start()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self.ended = False
        self.alone = True

    def __enter__(self) -> "EnergyRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended:
            self.ended = True
            self._tracker._open.pop(self, None)
            self._measurement.stop()

    def end(
        self, results: list[Result], again: Callable[[], object] | None = None, *, complete: bool = True
    ) -> list[Result]:
        """Repeats the run while it was too short, and writes its row.

        Args:
            results: of the run; partial if it was interrupted.
            again: makes the whole run once more; None: it can't be repeated.
            complete: whether all of its tokens are counted; otherwise its figures aren't reliable.

        Returns:
            The results; the only one with its energy.
        """
        energy = self.end_counted(
            again,
            complete=complete,
            requests=len(results),
            prompt_tokens=sum(result.usage["prompt_tokens"] for result in results),
            completion_tokens=sum(result.usage["completion_tokens"] for result in results),
        )
        return [replace(results[0], energy=energy)] if len(results) == 1 else results

    def end_counted(self, again: Callable[[], object] | None, *, complete: bool = True, **counts: int) -> Energy:
        """As `end`, given the numbers of requests, prompt_tokens and completion_tokens."""
        elapsed = time.perf_counter() - self._started
        runs, interrupted = 1, False
        try:
            while again is not None and elapsed < self._tracker.seconds:
                self._model.reset()
                again()
                runs += 1
                elapsed = time.perf_counter() - self._started
        except KeyboardInterrupt:
            # The last repetition stays in the measured time without being counted.
            interrupted = True
        cpu_seconds = time.process_time() - self._cpu_started
        self.ended = True
        reading = self._measurement.stop()
        method = self._tracker.meter.method
        reliable = complete and not interrupted and self.alone and elapsed >= method.seconds
        energy = _energy(reading, runs, counts["completion_tokens"], method.name, reliable=reliable)
        row = reading.columns | {"strategy": self._strategy} | self._options.to_dict() | counts
        row |= _costs(energy, elapsed / runs, cpu_seconds / runs, counts["completion_tokens"]) | _origin(self._model)
        self._tracker._record(self, row)
        if interrupted:
            raise KeyboardInterrupt
        return energy


class MeasuredStream(Stream):
    """A stream whose energy is measured; its result has it."""

    def __init__(self, tracker: EnergyTracker, model: Model, stream: Stream) -> None:
        self._stream, self._tracker, self._model = stream, tracker, model
        self._pieces, self._result = self._measured(), None

    def close(self) -> None:
        self._pieces.close()
        self._stream.close()

    @property
    def request(self) -> Request:
        return self._stream.request

    @property
    def result(self) -> Result:
        return self._result or self._stream.result

    def _measured(self) -> Generator[str]:
        request, model = self.request, self._model
        seed = self._stream.result.seed
        options = request.options if seed is None else request.options.replaced(seed=seed)

        def again() -> None:
            for _ in model.complete([replace(request, options=options)]):
                pass

        with self._tracker.begin(model, options, close=self.close) as run:
            try:
                yield from self._stream
            except (GeneratorExit, KeyboardInterrupt):
                (self._result,) = run.end([self._stream.result], complete=False)
                raise
            (self._result,) = run.end([self._stream.result], again)


_COLUMNS = [
    "strategy",
    *(option.name for option in OPTIONS),
    "requests", "prompt_tokens", "completion_tokens",
    "runs", "seconds", "cpu_seconds", "tokens_per_second", "joules", "joules_per_token", "g_co2eq_per_1000_tokens", "g_co2eq_per_kwh",
    "method", "reliable",
    "model", "dtype", "cache_dtype", "graph", "device", "threads", "onnxruntime_version", "gpt2onnx_version",
]  # fmt: skip


def _energy(reading: Reading, runs: int, tokens: int, method: str, *, reliable: bool) -> Energy:
    joules, g_co2eq = reading.joules / runs, reading.g_co2eq / runs
    kwh = reading.columns["energy_consumed"]
    return Energy(
        joules=joules,
        joules_per_token=joules / tokens if tokens else None,
        g_co2eq=g_co2eq,
        g_co2eq_per_1000_tokens=g_co2eq / tokens * 1000 if tokens else None,
        watts=reading.joules / reading.seconds,
        seconds=reading.seconds,
        runs=runs,
        method=method,
        reliable=reliable,
        country=reading.columns["country_iso_code"] or None,
        g_co2eq_per_kwh=reading.g_co2eq / kwh if kwh else 0.0,
        run_id=reading.columns["run_id"],
    )


def _costs(energy: Energy, seconds: float, cpu_seconds: float, tokens: int) -> dict[str, Any]:
    figures = {name: value for name, value in asdict(energy).items() if name in _COLUMNS}
    return figures | {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens_per_second": tokens / seconds}


def _origin(model: Model) -> dict[str, Any]:
    versions = {"onnxruntime_version": VERSION, "gpt2onnx_version": version("gpt2onnx")}
    return {"model": model.bundle.manifest.source} | machine.setting(model) | versions
