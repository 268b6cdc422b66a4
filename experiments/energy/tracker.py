"""Energy of runs: what they took, a row each in a CSV file.

`power` measures, `csvlog` writes; here is which run it was and what that makes a token cost.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gpt2onnx.errors import OptionError

from ...runtime.observer import OBSERVER
from ...runtime.options import GenerationConfig
from ...runtime.ort.providers import VERSION
from .csvlog import CsvLog
from .power import DEFAULT_SECONDS, MOST_SECONDS, PowerMeter, Reading

if TYPE_CHECKING:
    from ...runtime.model import Model
    from ...runtime.requests import Result


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What one run took: a mean where it was repeated.

    Attributes:
        joules: of the whole machine, as far as `method` covers it.
        joules_per_token: `joules` by completion tokens; None where there are none.
        g_co2eq: grams of CO2 equivalents.
        g_co2eq_per_1000_tokens: the same by 1,000 completion tokens.
        watts: mean power.
        seconds: measured in all.
        runs: made in that time.
        method: how the power was found; what is an estimate says so.
        reliable: whether it was measured for long enough for the method, and no other run at the same time.
        country: whose electricity it is (ISO 3166-1 alpha-3); None for the world's average.
        g_co2eq_per_kwh: what a kilowatt hour emits there.
        run_id: of the row in the CSV file.
    """

    joules: float
    joules_per_token: float | None
    g_co2eq: float
    g_co2eq_per_1000_tokens: float | None
    watts: float
    seconds: float
    runs: int
    method: str
    reliable: bool
    country: str | None
    g_co2eq_per_kwh: float
    run_id: str


@contextmanager
def track_energy(
    path: str | os.PathLike[str] | None = None, *, country: str | None = None, seconds: float = DEFAULT_SECONDS
) -> Iterator["EnergyTracker"]:
    """Measures the energy of every `generate` and `stream` inside the `with` block, and appends a row for each to a CSV file.

    A result has its figures as `result.energy`, where it is the only one of its run. Each run starts without what
    the key-value cache holds of earlier ones, and is repeated until it took long enough to be measured; unseeded sampling
    gets a seed, so that repeating it gives the same tokens.

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
    token = OBSERVER.set(tracker)
    try:
        yield tracker
    finally:
        OBSERVER.reset(token)
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

    def repeatable(self, options: GenerationConfig) -> GenerationConfig:
        """The same options, with a seed where sampling would have none."""
        if options.do_sample and options.seed is None:
            return replace(options, seed=secrets.randbits(32))
        return options

    def begin(
        self,
        model: "Model",
        options: GenerationConfig,
        *,
        strategy: str | None = None,
        close: Callable[[], None] | None = None,
    ) -> "EnergyRun":
        """Begins to measure a run; see `observer.Observer`."""
        model.forget()
        # Of runs at the same time none can be told from the other.
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
    """A run under way; made by `EnergyTracker.begin`."""

    def __init__(self, tracker: EnergyTracker, model: "Model", options: GenerationConfig, strategy: str) -> None:
        self._tracker, self._model, self._options, self._strategy = tracker, model, options, strategy
        self._measurement = tracker.meter.start()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._ended = False
        self.alone = True

    def __enter__(self) -> "EnergyRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._ended = True
            self._tracker._open.pop(self, None)
            self._measurement.stop()

    def end(self, results: "list[Result]", again: Callable[[], object] | None = None) -> "list[Result]":
        """Repeats the run while it was too short, and writes its row; see `observer.Run`."""
        energy = self._end(
            again,
            requests=len(results),
            prompt_tokens=sum(result.usage["prompt_tokens"] for result in results),
            completion_tokens=sum(result.usage["completion_tokens"] for result in results),
        )
        return [replace(results[0], energy=energy)] if len(results) == 1 else results

    def end_job(self, *, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Writes the row of a run whose results nobody keeps, if it isn't there yet; see `observer.Run`."""
        if not self._ended:
            self._end(None, requests=requests, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    def _end(self, again: Callable[[], object] | None, **counts: int) -> Energy:
        elapsed = time.perf_counter() - self._started
        runs, complete = 1, True
        try:
            while again is not None and elapsed < self._tracker.seconds:
                self._model.forget()
                again()
                runs += 1
                elapsed = time.perf_counter() - self._started
        except KeyboardInterrupt:
            # The last repetition stays in the measured time without being counted.
            complete = False
        cpu_seconds = time.process_time() - self._cpu_started
        self._ended = True
        reading = self._measurement.stop()
        method = self._tracker.meter.method
        reliable = complete and self.alone and elapsed >= method.seconds
        energy = _energy(reading, runs, counts["completion_tokens"], method.name, reliable=reliable)
        row = reading.columns | {"strategy": self._strategy} | asdict(self._options) | counts
        row |= _costs(energy, elapsed / runs, cpu_seconds / runs, counts["completion_tokens"]) | _facts(self._model)
        self._tracker._record(self, row)
        if not complete:
            raise KeyboardInterrupt
        return energy


_COLUMNS = [
    "strategy",
    *(field.name for field in fields(GenerationConfig)),
    "requests", "prompt_tokens", "completion_tokens",
    "runs", "seconds", "cpu_seconds", "tokens_per_second", "joules", "joules_per_token", "g_co2eq_per_1000_tokens", "g_co2eq_per_kwh",
    "method", "reliable",
    "model", "dtype", "graph", "device", "threads", "onnxruntime_version", "gpt2onnx_version",
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
    return {
        "runs": energy.runs,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "joules": energy.joules,
        "joules_per_token": energy.joules_per_token,
        "g_co2eq_per_1000_tokens": energy.g_co2eq_per_1000_tokens,
        "g_co2eq_per_kwh": energy.g_co2eq_per_kwh,
        "method": energy.method,
        "reliable": energy.reliable,
    }


def _facts(model: "Model") -> dict[str, Any]:
    manifest, session = model.bundle.manifest, model.session
    return {
        "model": manifest.source,
        "dtype": manifest.dtype,
        "graph": manifest.graph,
        "device": session.device,
        "threads": session.threads,
        "onnxruntime_version": VERSION,
        "gpt2onnx_version": version("gpt2onnx"),
    }
