"""Run of a job: parts become Ray tasks, their results become files."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from gpt2onnx.errors import BackendError, Gpt2OnnxError, OptionError

from ..models.bundle import Bundle
from ..runtime.text.text_input import UTF_8
from .bundle_copy import SharedBundle
from .cluster import check, joined
from .job import Job
from .parts import Part
from .storage import writing
from .worker import Outcome, Work, carry_out

# Called with the requests and new tokens of each part that was written.
Progress = Callable[[int, int], None]

ATTEMPTS = 5  # of a part: a request that kills its worker must not run for ever


@dataclass
class Summary:
    """Counts of a job.

    Attributes:
        parts: written.
        kept: parts that were there already.
        requests: in the parts that were written.
        errors: requests among them that failed.
        tokens: new ones.
    """

    parts: int = 0
    kept: int = 0
    requests: int = 0
    errors: int = 0
    tokens: int = 0


def run(
    bundle: Path,
    input_name: str,
    output_name: str,
    work: Work,
    *,
    address: str | None = None,
    workers: int | None = None,
    part_size: int | None = None,
    encoding: str = UTF_8,
    resume: bool = False,
    force: bool = False,
    verbose: bool = False,
    progress: Progress = lambda requests, tokens: None,
) -> Summary:
    """Runs request files on a cluster.

    Args:
        input_name: a file of requests or a folder of them: path on this machine, or URI.
        output_name: folder of the results: path on this machine, or URI.
        address: host:port of the Ray cluster's head, or "auto"; None starts one on this machine.
        workers: parts at a time; None: as many as the cluster has cores (or GPUs) for.
        part_size: requests in a part; None: by the input's size.
        encoding: of input files without a byte order mark.

    Raises:
        PromptError: the input can't be read.
        OutputError: the output can't be written, or holds other files or another job's results.
        BundleError, BackendError: a worker can't load or run the model; or there is no such cluster.
        OptionError: the device or the address doesn't suit a fleet.
    """
    if work.device not in ("cpu", "cuda"):
        raise OptionError(f"with --engine ray the device is cpu, or cuda for a GPU to each worker, not {work.device!r}")
    check(address)
    Bundle.open(bundle)
    job = Job.open(
        input_name, output_name, bundle, work, part_size=part_size, encoding=encoding, resume=resume, force=force
    )
    summary = Summary(kept=len(job.done))
    if job.is_complete:
        return summary
    with joined(address, (workers or 1) * work.threads, verbose=verbose):
        if not _room(work):
            gpu = " and a GPU" if work.device == "cuda" else ""
            raise BackendError(f"no machine of the cluster has {work.threads} cores{gpu} for a worker")
        shared = SharedBundle.share(bundle, elsewhere=address is not None or len(_machines()) > 1)
        job.begin()
        for part, outcome in _outcomes(job, shared, work, workers):
            if outcome.content is not None:
                with writing(job.output.name):
                    job.output.write(part.name(work.format), outcome.content)
            summary.parts += 1
            summary.requests += outcome.requests
            summary.errors += outcome.errors
            summary.tokens += outcome.tokens
            progress(outcome.requests, outcome.tokens)
    job.end(summary.kept + summary.parts)
    return summary


def _outcomes(job: Job, bundle: SharedBundle, work: Work, workers: int | None) -> Iterator[tuple[Part, Outcome]]:
    """Submits parts as there is room for them, and yields their outcomes as they come."""
    task = ray.remote(carry_out).options(
        num_cpus=work.threads, num_gpus=int(work.device == "cuda"), max_retries=ATTEMPTS - 1
    )
    output = None if job.output.is_local else job.output
    running: dict[Any, Part] = {}
    for part, lines in job.missing():
        limit = workers or 2 * max(1, _room(work))  # twice: each worker's next part waits in Ray's queue
        finished = _next(running) if len(running) >= limit else None
        with _errors_of(part):
            running[task.remote(bundle, work, part, lines, output)] = part
        if finished is not None:
            yield finished
    while running:
        yield _next(running)


def _next(running: dict[Any, Part]) -> tuple[Part, Outcome]:
    """Waits for any part to end."""
    (reference,), _ = ray.wait(list(running))
    part = running.pop(reference)
    with _errors_of(part):
        return part, ray.get(reference)


@contextmanager
def _errors_of(part: Part) -> Iterator[None]:
    """Turns Ray's errors into BackendError, except errors in the task: the package's own are raised as they are."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, Gpt2OnnxError):
            raise error.cause from error
        raise
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise BackendError(
            f"{ATTEMPTS} workers died over {part}: a machine is short of memory (take fewer workers or a lower batch size),"
            " or one of its requests is to blame"
        ) from error
    except RayError as error:
        raise BackendError(f"Ray gave up on {part}: {error}") from error


def _room(work: Work) -> int:
    """Number of workers that the cluster's machines have room for."""
    on_gpu = work.device == "cuda"
    return sum(
        int(min(has.get("CPU", 0) // work.threads, has.get("GPU", 0) if on_gpu else math.inf)) for has in _machines()
    )


def _machines() -> list[dict[str, float]]:
    """Resources of each machine that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
