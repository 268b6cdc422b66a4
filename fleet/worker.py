"""What runs on the machines of a fleet."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow
import ray

from gpt2onnx.errors import BackendError

from ..runtime import jobs
from ..runtime.model import Model
from ..runtime.options import GenerationConfig
from .attempts import MOST_ATTEMPTS
from .parts import Format, Part, encode
from .shared_bundle import SharedBundle
from .storage import Place, writing


@dataclass(frozen=True)
class Work:
    """How workers carry out requests.

    Attributes:
        options: what holds where a request says nothing else.
        batch_size: requests decoded together.
        format: of the results.
        device: "cpu" or "cuda".
        threads: of one operator, which is the cores of a worker.
    """

    options: GenerationConfig
    batch_size: int
    format: Format
    device: str
    threads: int


class Worker:
    """Holds a model, and turns the lines of a part into the file of its results.

    Ray Data calls it with tables of one row, from `RequestFiles`.

    Args:
        bundle: of the model.
        work: how requests are carried out.
        attempts: handle of the job's `Attempts`.
        output: where results go that every machine can write to; None where they go back to the job's own machine.

    Raises:
        BundleError, BackendError: the model can't be loaded, or fails.
        OutputError: a part can't be written.
    """

    def __init__(self, bundle: SharedBundle, work: Work, attempts: Any, output: Place | None) -> None:
        self._bundle, self._work, self._attempts, self._output = bundle, work, attempts, output

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        (row,) = table.to_pylist()
        part, work = Part(row["file"], row["first"]), self._work
        name = part.name(work.format)
        attempt: Any = ray.get(self._attempts.begin.remote(name))
        if attempt > MOST_ATTEMPTS:
            raise BackendError(
                f"{MOST_ATTEMPTS} workers died over {name}: a machine is short of memory (take fewer workers or a lower"
                " batch size), or one of its requests is to blame"
            )
        records = self.records(row["lines"])
        encoded = encode(part, records, work.format)
        if self._output is not None:
            with writing(self._output):
                self._output.write(name, encoded)
        content = encoded if self._output is None else None
        return pyarrow.table(
            {
                "name": [name],
                "requests": [len(records)],
                "errors": [sum("error" in record for record in records)],
                "tokens": [sum(record["usage"]["completion_tokens"] for record in records if "usage" in record)],
                "content": pyarrow.array([content], pyarrow.large_binary()),
            }
        )

    def records(self, lines: list[str]) -> list[jobs.Record]:
        """The results of a part's lines; no part's depend on which others this worker had."""
        # What an earlier part left in the cache would let prompts be computed in other pieces, which rounds otherwise.
        self._model.forget()
        return list(jobs.run(self._model, lines, self._work.options, self._work.batch_size))

    @cached_property
    def _model(self) -> Model:
        # Loaded with the first part: Ray reports the errors of a call as they are, those of a constructor as its own.
        # Its second graph for all that it is for, whatever went before.
        return Model(self._bundle.here(), device=self._work.device, threads=self._work.threads, wide_after=0)
