"""Worker: runs one part on any machine of the cluster."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from gpt2onnx.errors import PromptError

from ..runtime import jobs
from ..runtime.model import Model
from ..runtime.options import GenerationConfig
from .bundle_copy import SharedBundle
from .parts import Format, Part, encode
from .storage import Place, writing


@dataclass(frozen=True)
class Work:
    """How requests are run.

    Attributes:
        options: generation options that a request doesn't set itself.
        device: "cpu" or "cuda".
        threads: of one operator; Ray reserves as many cores for a worker.
    """

    options: GenerationConfig
    batch_size: int
    format: Format
    device: str
    threads: int


class Outcome(NamedTuple):
    """A part's counts; and its file, unless the worker has written it itself."""

    requests: int
    errors: int
    tokens: int
    content: bytes | None


def carry_out(
    bundle: SharedBundle, work: Work, part: Part, lines: list[str | PromptError], output: Place | None
) -> Outcome:
    """Runs the request lines of a part.

    Args:
        part: the lines' place in the input.
        output: folder that every machine can write to; None: the results go back to the job's machine.

    Raises:
        BundleError, BackendError: the model can't be loaded, or fails.
        OutputError: the part or a copy of the bundle can't be written.
    """
    model = _load(bundle.here(), work.device, work.threads)
    # A cache of an earlier part would round sums differently: results must not depend on the worker's history.
    model.reset()
    records = list(jobs.run(model, lines, work.options, work.batch_size))
    content = encode(part, records, work.format)
    if output is not None:
        with writing(output.name):
            output.write(part.name(work.format), content)
    return Outcome(
        requests=len(records),
        errors=sum("error" in record for record in records),
        tokens=sum(record["usage"]["completion_tokens"] for record in records if "usage" in record),
        content=content if output is None else None,
    )


@lru_cache(maxsize=1)
def _load(folder: Path, device: str, threads: int) -> Model:
    """Loads the model once per process: Ray runs one part after another in it."""
    return Model(folder, device=device, threads=threads, wide_after=0)
