"""The way of a job through Ray Data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import NODE_ID_LABEL_KEY

from gpt2onnx.errors import BackendError, Gpt2OnnxError, OptionError, OutputError

from ..models.bundle import Bundle
from ..runtime.engine import footprint
from ..runtime.host import resources
from . import plan as plans
from .attempts import Attempts
from .cluster import check, joined
from .parts import Part, RequestFiles
from .plan import Plan
from .shared_bundle import SharedBundle
from .storage import Place, public, reason, writing
from .worker import Work, Worker

# Takes requests and tokens as they are done.
Progress = Callable[[int, int], None]

_WORKER_MEMORY = 512 << 20  # bytes that a worker takes beside the weights: Python, Ray, the cache
_DEVICES = ("cpu", "cuda")
_STARTS = 10  # workers in a row that may die while they start


@dataclass
class Summary:
    """What became of a job.

    Attributes:
        parts: that were written.
        kept: parts that were there already.
        requests: in the parts that were written.
        errors: those of them that could not be carried out.
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
    resume: bool = False,
    verbose: bool = False,
    progress: Progress = lambda requests, tokens: None,
) -> Summary:
    """Carries out files of requests.

    Args:
        bundle: the model's folder.
        input_name: a file of requests or a folder of such: a path of this machine, or a URI.
        output_name: the folder of the results: a path of this machine, or a URI.
        work: how requests are carried out.
        address: of the Ray cluster to join; None for one of its own on this machine.
        workers: models at work; by default as many as the cluster has room for.
        part_size: requests of a part; by default by the size of the input.
        resume: keep the parts that are done.
        verbose: let Ray log.
        progress: called with requests and new tokens of each part that was written.

    Raises:
        PromptError: the input can't be read.
        OutputError: the output can't be written, or holds other files or another job's results.
        BundleError, BackendError: a worker can't load or run the model; or there is no such cluster.
        OptionError: the device or the address can't serve a fleet.
    """
    if work.device not in _DEVICES:
        raise OptionError(f"with --engine ray the device is cpu, or cuda for a GPU to each worker, not {work.device!r}")
    check(address)
    Bundle.open(bundle)
    try:
        output = Place.of(output_name)
    except OSError as error:
        raise OutputError(f"can't write {public(output_name)}: {reason(error)}") from error
    if resume and part_size is None:
        part_size = plans.remembered_part_size(output)
    plan = Plan.make(input_name, bundle, work, part_size)
    done = plans.look(plan, output, resume=resume)
    summary = Summary(kept=len(done))
    if resume and plans.is_complete(output, len(done)):
        return summary
    written = []
    with joined(address, (workers or 1) * work.threads, verbose=verbose):
        shared = SharedBundle.share(bundle, elsewhere=address is not None or len(_machines()) > 1)
        rows = _rows(_pipeline(plan, done, shared, output, workers))
        plans.begin(plan, output, frozenset(done))
        for row in rows:
            if row["content"] is not None:
                with writing(output):
                    output.write(row["name"], row["content"])
            written.append(row["name"])
            summary.parts += 1
            summary.requests += row["requests"]
            summary.errors += row["errors"]
            summary.tokens += row["tokens"]
            progress(row["requests"], row["tokens"])
    plans.end(plan, output, done, written)
    return summary


def _pipeline(plan: Plan, done: list[Part], bundle: SharedBundle, output: Place, workers: int | None) -> Dataset:
    work, opened = plan.work, Bundle.open(Path(bundle.folder))
    needs = {
        "CPU": work.threads,
        "GPU": 0 if work.device == "cpu" else 1,
        "memory": footprint.memory(opened) + footprint.wide_memory(opened) + _WORKER_MEMORY,
    }
    _check_room(needs)
    attempts = cast("Any", Attempts).options(label_selector={NODE_ID_LABEL_KEY: _this_machine()}).remote()
    context = DataContext.get_current().copy()
    # A block is a row is a part: never joined with others, so that it goes to whichever worker is free.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A worker that has died while it started is nothing but one that has died.
    context.max_consecutive_actor_init_deaths = _STARTS
    with DataContext.current(context):
        paths = [one.path for one in plan.files]
        return ray.data.read_datasource(
            RequestFiles(paths, plan.input.filesystem, plan.part_size, done),
            override_num_blocks=len(paths),
            num_cpus=0,
            label_selector=_where(plan.input),
        ).map_batches(
            Worker,
            fn_constructor_args=(bundle, work, attempts, None if output.is_local else output),
            batch_size=1,
            batch_format="pyarrow",
            compute=_pool(workers, work),
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"] or None,
            memory=needs["memory"],
        )


def _check_room(needs: dict[str, int]) -> None:
    """Refuses what Ray would wait for without end: workers that no machine has room for."""
    if not any(all(has.get(name, 0) >= amount for name, amount in needs.items()) for has in _machines()):
        gpu = ", a GPU" if needs["GPU"] else ""
        raise BackendError(
            f"no machine of the cluster has room for a worker: {needs['CPU']} cores,"
            f" {resources.in_words(needs['memory'])} of memory{gpu}"
        )


def _pool(workers: int | None, work: Work) -> ActorPoolStrategy:
    """Workers that are there as soon as the cluster has room for them, and go as soon as there is nothing left for them."""
    room = max(1, int(ray.cluster_resources().get("CPU", 1)) // work.threads)
    most = workers or room
    return ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(most, room), max_tasks_in_flight_per_actor=2)


def _where(place: Place) -> dict[str, str] | None:
    """Labels of the machine that reads there: only this one surely sees its own files."""
    return {NODE_ID_LABEL_KEY: _this_machine()} if place.is_local else None


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they come; what went wrong in a task is raised as itself."""
    try:
        yield from dataset.iter_rows()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            origin = getattr(cause, "cause", None)  # of Ray's errors: what was raised in the task
            if isinstance(origin, Gpt2OnnxError):
                raise origin from error
            cause = cause.__cause__
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            raise BackendError(f"Ray gave up: {error}") from error
        raise


def _machines() -> list[dict[str, float]]:
    """What each machine of the cluster has; those that are lost don't count."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _this_machine() -> str:
    return str(ray.get_runtime_context().get_node_id())
