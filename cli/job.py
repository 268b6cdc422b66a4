"""`generate --input`: options, run and summary of a job."""

import functools
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gpt2onnx.errors import OptionError, OutputError, PromptError

from ..runtime import jobs
from ..runtime.model import BATCH_SIZE, Model
from ..runtime.options import GenerationConfig
from ..runtime.text import text_input
from . import console
from .results import Results, holds_results

if TYPE_CHECKING:
    from ..experiments.energy.tracker import EnergyTracker


@dataclass(frozen=True)
class JobOptions:
    """Options of a job; names of files are paths, and with --engine ray also URIs."""

    input: str
    output: str | None
    resume: bool
    force: bool
    batch_size: int
    fail_on_error: bool
    encoding: str


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --input and its options, which arrive as `requests`: None without --input. `encoding` has to be there, too."""

    @functools.wraps(command)
    def gather(**given: Any) -> Any:
        own = {name: given.pop(name) for name in ("input", "output", "resume", "force", "batch_size", "fail_on_error")}
        if own["output"] == "-":
            own["output"] = None
        job = JobOptions(encoding=given["encoding"], **own)
        without_input = job.input is None
        if without_input and (job.output is not None or job.resume or job.force or job.fail_on_error):
            raise click.UsageError("--output, --resume, --force and --fail-on-error go with --input")
        if (job.resume or job.force) and job.output is None:
            raise click.UsageError(f"--{'resume' if job.resume else 'force'} goes with --output")
        if job.resume and job.force:
            raise click.UsageError("--resume and --force exclude each other")
        return command(requests=None if without_input else job, **given)

    options = [
        click.option("--input", metavar="FILE", help="Requests, one JSON object a line; - for standard input."),
        click.option(
            "--output",
            metavar="FILE",
            help="With --input: where the results go (default, and -: standard output).",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="With --output: keep results that are there and compute the rest: what is missing, has failed, or is of"
            " another request, model or option. With --engine ray: keep the parts that are there, failed requests in them, too.",
        ),
        click.option("--force", is_flag=True, help="With --output: replace results that are there."),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=BATCH_SIZE,
            show_default=True,
            help="With --input: requests decoded together. A batch waits until it is full or the input ends.",
        ),
        click.option(
            "--fail-on-error", is_flag=True, help="With --input: exit code 1 if a request failed (default: 0)."
        ),
    ]
    for option in reversed(options):
        gather = option(gather)
    return gather


def check_output(job: JobOptions) -> None:
    """Raises OutputError if the output is no file of results, or has some without leave to keep or replace them."""
    if job.output is None or not (path := Path(job.output)).is_file():
        return
    if job.input != "-" and Path(job.input).exists() and path.samefile(job.input):
        raise OutputError(f"{path} is the input, too: choose another output")
    if not holds_results(path):
        raise OutputError(f"{path} exists and doesn't hold results: choose another output")
    if path.stat().st_size and not (job.resume or job.force):
        raise OutputError(f"{path} exists: --resume continues it, --force replaces it")


def run(
    model: Model, job: JobOptions, options: GenerationConfig, tracker: "EnergyTracker | None", *, quiet: bool
) -> None:
    """Carries out a file of requests; each result is written as soon as those before it are.

    Raises:
        PromptError: the input can't be read; or with --fail-on-error, a request failed.
        OutputError: the output can't be written.
    """
    source = "standard input" if job.input == "-" else job.input
    try:
        file: IO[bytes] = sys.stdin.buffer if job.input == "-" else Path(job.input).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise PromptError(f"can't read {source}: {error.strerror}") from error

    def key(line: str | PromptError) -> str | None:
        """The key of the line's result; None: the request can't be carried out."""
        try:
            return jobs.key(jobs.identity(line), jobs.parse(line, options).sha256(model.sha256))
        except (PromptError, OptionError):
            return None

    counts = Counts()
    # Closing what can't be written fails once more, so the files are closed inside.
    try:
        with ExitStack() as stack:
            stack.enter_context(file)
            lines = text_input.lines(file, Path(source).name, job.encoding)
            results = None
            if job.output is not None:
                results = stack.enter_context(closing(Results(Path(job.output), resume=job.resume)))
                lines = results.missing(lines, key)
            advance = stack.enter_context(console.line_progress(Path(source).name, quiet=quiet))
            records: Iterable[jobs.Record] = jobs.run(model, lines, options, job.batch_size)
            for record in records if tracker is None else tracker.job(model, options, records):
                if results is None:
                    console.print_json(record)
                else:
                    results.write(record)
                advance(1, counts.add(record))
            if results is not None:
                results.finish()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"can't write {job.output or 'standard output'}: {error.strerror}") from error
    earlier = ""
    if results is not None and (results.kept or results.dropped):
        anew = min(results.dropped, counts.done + counts.failed)
        earlier = f"{results.kept:,} kept, {anew:,} computed anew"
    report(job, counts, earlier, quiet=quiet)


@dataclass
class Counts:
    """Counts of a job: requests with a result, requests that failed, new tokens."""

    done: int = 0
    failed: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    def add(self, record: jobs.Record) -> int:
        """Counts a result; returns its new tokens."""
        tokens: int = record.get("usage", {}).get("completion_tokens", 0)
        self.done, self.failed = self.done + ("error" not in record), self.failed + ("error" in record)
        self.tokens += tokens
        return tokens

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return time.perf_counter() - self._started


def report(job: JobOptions, counts: Counts, earlier: str = "", *, quiet: bool) -> None:
    """Prints one line on standard error.

    Args:
        earlier: what became of earlier results.

    Raises:
        PromptError: with --fail-on-error, if a request failed.
    """
    if not quiet:
        speed = f"{counts.tokens / counts.seconds:,.0f} tokens/s" if counts.tokens else ""
        parts = [f"{counts.done:,} done, {counts.failed:,} failed", earlier, speed]
        parts.append(f"results in {job.output or 'standard output'}")
        click.echo("; ".join(filter(None, parts)), err=True)
    if job.fail_on_error and counts.failed:
        raise PromptError(
            f"{counts.failed:,} of {counts.done + counts.failed:,} requests failed: their results have an error"
        )
