"""Options of commands that measure energy: country and seconds."""

from collections.abc import Callable
from typing import Any

import click

from ..experiments.energy.power import DEFAULT_SECONDS, MOST_SECONDS


def energy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --country and --energy-seconds, which arrive as `country` and `energy_seconds`, None where not given."""
    command = click.option(
        "--energy-seconds",
        type=click.FloatRange(0, int(MOST_SECONDS)),
        help=f"Least seconds to measure: a shorter run is repeated; 0 for no repetition (default {DEFAULT_SECONDS:g}).",
    )(command)
    return click.option(
        "--country", metavar="ISO3", help="Country of the electricity, such as FRA (default: the world's average)."
    )(command)
