"""Terminal of all commands: verbosity options, JSON on stdout, progress on stderr."""

import codecs
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from ..runtime.jsontext import finite, to_line


def verbosity(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -v (log lines, handled here) and -q, which arrives as `quiet`."""

    def log(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        level = logging.DEBUG if value else logging.WARNING
        logging.basicConfig(level=level, format="%(name)s: %(message)s")

    command = click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")(command)
    return click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=log, help="Log what is done.")(
        command
    )


class FiniteRange(click.FloatRange):
    """A number in a range; unlike click's, neither NaN nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def is_chatty(*, quiet: bool) -> bool:
    """Whether a person is there to read progress and summaries."""
    return not quiet and sys.stderr.isatty()


def print_json(record: Any, *, indent: int | None = None) -> None:
    """Prints JSON on standard output, which stays JSON in an encoding that lacks some letters.

    Args:
        record: what JSON can hold; numbers that aren't finite become null.
        indent: spaces of a level; None for one line.
    """
    if indent is None:
        text = to_line(record, ascii_only=codecs.lookup(sys.stdout.encoding).name != "utf-8")
    else:
        text = json.dumps(finite(record), allow_nan=False, indent=indent)
    click.echo(text)


@contextmanager
def progress_bar(
    label: str, unit: str | None = None, *, quiet: bool, late: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar over bytes, or over a known number of things called `unit`.

    Gives the function that moves it, called with the bytes or things done and their total; None where nobody watches.
    With `late` the bar appears with the first move: for work that may not be needed.
    """
    if not is_chatty(quiet=quiet):
        yield None
        return
    with ExitStack() as stack:

        def appear() -> Any:
            from tqdm import tqdm

            unit_of_bar = "B" if unit is None else f" {unit}"
            return stack.enter_context(
                tqdm(desc=label, unit=unit_of_bar, unit_scale=unit is None, leave=False, dynamic_ncols=True)
            )

        bar = None if late else appear()

        def move(done: int, total: int) -> None:
            nonlocal bar
            bar = appear() if bar is None else bar
            bar.total = total
            bar.update(done - bar.n)

        yield move


@contextmanager
def line_progress(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A count of finished lines and the speed in tokens; gives the function that takes (lines, tokens) as they come."""
    if not is_chatty(quiet=quiet):
        yield lambda lines, tokens: None
        return
    from tqdm import tqdm

    start, total = time.monotonic(), 0
    with tqdm(desc=label, dynamic_ncols=True, bar_format="{desc}  {n_fmt} lines{postfix}  {elapsed}") as bar:

        def advance(lines: int, tokens: int) -> None:
            nonlocal total
            total += tokens
            elapsed = time.monotonic() - start
            bar.set_postfix_str(f"{total / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False)
            bar.update(lines)

        yield advance
