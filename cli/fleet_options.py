"""`generate --engine ray`: options and run."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from . import console
from .job import Counts, JobOptions, report
from .model_options import bundle_folder

_ENGINES = ("local", "ray")


@dataclass(frozen=True)
class FleetOptions:
    """Options of the engine ray; None if not given."""

    address: str | None
    workers: int | None
    part_size: int | None
    format: str | None


def fleet_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --engine and its options, which arrive as `fleet`: None unless the engine is ray."""

    @functools.wraps(command)
    def gather(engine: str, **given: Any) -> Any:
        fleet = FleetOptions(*(given.pop(name) for name in ("address", "workers", "part_size", "result_format")))
        if engine != "ray" and fleet != FleetOptions(None, None, None, None):
            raise click.UsageError("--address, --workers, --part-size and --format go with --engine ray")
        return command(fleet=fleet if engine == "ray" else None, **given)

    options = [
        click.option(
            "--engine",
            type=click.Choice(_ENGINES),
            default="local",
            show_default=True,
            help="With --input: ray runs the requests on a cluster, into a folder of parts.",
        ),
        click.option(
            "--address",
            help="With --engine ray: HOST:PORT of the cluster, or auto for the one that runs here (default: RAY_ADDRESS,"
            " or else a cluster on this machine, for this job).",
        ),
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="With --engine ray: parts at a time, each on --threads cores, 1 by default (default: all cores).",
        ),
        click.option(
            "--part-size",
            type=click.IntRange(min=1),
            help="With --engine ray: requests in a part (default: 16 to 1000, by the size of the input).",
        ),
        click.option(
            "--format",
            "result_format",
            type=click.Choice(["jsonl", "parquet"]),
            help="With --engine ray: format of the parts (default: jsonl).",
        ),
    ]
    for option in reversed(options):
        gather = option(gather)
    return gather


def run(
    fleet: FleetOptions, model: str, job: JobOptions, *, device: str, threads: int | None, given: dict[str, Any],
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Runs request files on a cluster."""
    if job.output is None or job.input == "-":
        raise click.UsageError("--engine ray goes with --input and --output, which are files or folders")
    from ..fleet.run import run
    from ..fleet.worker import Work
    from ..models.bundle import GENERATION_CONFIG
    from ..models.config import read_json
    from ..runtime.options import GenerationConfig

    folder = bundle_folder(model)
    options = GenerationConfig.from_file_content(read_json(folder / GENERATION_CONFIG)).merged(given)
    counts = Counts()
    with console.line_progress(Path(job.input).name, quiet=quiet) as advance:
        summary = run(
            folder,
            job.input,
            job.output,
            Work(options, job.batch_size, "parquet" if fleet.format == "parquet" else "jsonl", device, threads or 1),
            address=fleet.address or os.environ.get("RAY_ADDRESS") or None,
            workers=fleet.workers,
            part_size=fleet.part_size,
            encoding=job.encoding,
            resume=job.resume,
            force=job.force,
            verbose=logging.getLogger().isEnabledFor(logging.INFO),
            progress=advance,
        )
    if as_json:
        console.print_json(asdict(summary) | {"seconds": round(counts.seconds, 3)})
    counts.done, counts.failed, counts.tokens = summary.requests - summary.errors, summary.errors, summary.tokens
    earlier = f"{summary.parts:,} parts written, {summary.kept:,} kept"
    report(job, counts, earlier, quiet=quiet or as_json)
