"""What commands share of the terminal: verbosity options and progress on stderr."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .main import set_up_logging


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -v (log lines, handled here) and -q, which arrives as `quiet`."""

    def log(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        set_up_logging(verbose=value)

    command = click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")(command)
    return click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=log, help="Log what is done.")(
        command
    )


def is_chatty(*, quiet: bool) -> bool:
    """Whether a person is there to read progress and summaries."""
    return not quiet and sys.stderr.isatty()


def standard_input(hint: str) -> str:
    """The text on standard input, without the newline that ends its last line: that belongs to the file.

    Raises:
        click.UsageError: with the hint, where standard input is a terminal.
    """
    if sys.stdin.isatty():
        raise click.UsageError(hint)
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")


def interrupt_on_sigterm() -> None:
    """Lets a polite kill remove what is unfinished, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def progress_bar(label: str, unit: str | None = None, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes, or over a known number of things called `unit`.

    Gives the function that moves it, from what is done and the total; or None where nobody watches.
    """
    if not is_chatty(quiet=quiet):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = [DownloadColumn()] if unit is None else [MofNCompleteColumn(), TextColumn(unit)]
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def line_progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A count of finished lines and the speed in tokens; gives the function that takes (lines, tokens) as they come."""
    if not is_chatty(quiet=quiet):
        yield lambda lines, tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}  {task.completed:,.0f} lines  {task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=None, rate="-")
        total = 0

        def advance(lines: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            elapsed = progress.tasks[0].elapsed or 0
            progress.update(task, advance=lines, rate=f"{total / elapsed:,.0f}" if elapsed else "-")

        yield advance
