"""gpt2onnx sweep"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from gpt2onnx.errors import install_command

from ..models.tables import table
from ..runtime.text.text_input import UTF_8
from . import console, energy_options
from .model_options import cache_option, device_options, load, model_option
from .prompt_options import argument


@click.command("sweep")
@click.argument("grid_file", metavar="[GRID.toml]", required=False, type=click.Path(path_type=Path))
@model_option
@click.option("--prompt", "prompts", multiple=True, help="Prompt to continue; may be given more than once.")
@click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False), help="Folder for the results.")
@click.option("--resume", is_flag=True, help="Continue an interrupted sweep.")
@click.option("--force", is_flag=True, help="Replace the results of an earlier sweep.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the random draws (default: the grid's).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Length of the texts (default: the grid's).")
@click.option(
    "--energy/--no-energy",
    default=None,
    help="Measure the energy of each run (default: where codecarbon is installed).",
)
@energy_options.energy_options
@device_options
@cache_option
@click.option("--print-grid", is_flag=True, help="Print the built-in grid as TOML, to start your own from.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON, one object a run.")
@console.verbosity
def command(
    grid_file: Path | None, model: str, prompts: tuple[str, ...], folder: Path | None, resume: bool, force: bool,
    seed: int | None, max_new_tokens: int | None, energy: bool | None, country: str | None, energy_seconds: float | None,
    device: str, threads: int | None, print_grid: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run a grid of decoding strategies on prompts, and compare texts, speed, energy and diversity.

    GRID.toml holds strategies as tables of generation options; lists of values multiply. The built-in grid has
    greedy decoding, beams of 2, 6 and 14, n-gram blocking of 2, 4 and 8, and several temperatures, top-k and top-p.

    The folder gets results.jsonl (everything, one line a run), summary.csv, report.html and, where energy is measured,
    emissions.csv.

    \b
    Examples:
      gpt2onnx sweep --prompt "Once upon a time" --out sweep
      gpt2onnx sweep --print-grid > grid.toml
      gpt2onnx sweep grid.toml --prompt "One day" --prompt "The old king" --out sweep --resume
    """
    if print_grid and as_json:
        raise click.UsageError("--print-grid prints TOML: leave out --json")
    if print_grid:
        from ..experiments.grid import built_in

        click.echo(built_in(), nl=False)
        return
    if folder is None:
        raise click.UsageError("give --out, a folder for the results")
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other")
    if energy is False and (country is not None or energy_seconds is not None):
        raise click.UsageError("--country and --energy-seconds exclude --no-energy")

    from ..experiments import sweep

    sweep.check_folder(folder, replaces=resume or force)
    if energy is None and country is None and energy_seconds is None and not quiet and not sweep.has_codecarbon():
        click.echo(f"energy isn't measured: it needs {install_command('energy')}", err=True)
    loaded = load(model, device, threads, wide_after=0)
    with console.progress_bar(folder.name, "runs", quiet=quiet) as progress:
        runs = sweep.sweep(
            loaded,
            [argument(prompt, UTF_8) for prompt in prompts],
            grid=grid_file,
            out=folder,
            seed=seed,
            max_new_tokens=max_new_tokens,
            resume=resume,
            force=force,
            energy=energy,
            country=country,
            energy_seconds=energy_seconds,
            progress=progress,
        )
    if as_json:
        console.print_json(runs.rows(), indent=2)
        return
    click.echo(_tables(runs.rows()))
    if not quiet:
        click.echo(f"{runs.report}: {len(runs)} runs", err=True)


def _tables(rows: list[dict[str, Any]]) -> str:
    """The main figures: a table for each prompt, a line for each run."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "strategy": lambda row: row["strategy"],
        "tokens": lambda row: str(row["completion_tokens"]),
        "end": lambda row: str(row["finish_reason"]),
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "J/token": lambda row: _figure(row["joules_per_token"]),
        "log prob": lambda row: _figure(row["mean_logprob"]),
        "distinct-2": lambda row: _figure(row["distinct_2"]),
        "repeated": lambda row: _figure(row["repeated_4gram_share"]),
    }
    if all(row["joules_per_token"] is None for row in rows):
        del columns["J/token"]
    parts = []
    for prompt, group in groupby(rows, key=lambda row: row["prompt"]):
        lines = [[cell(row) for cell in columns.values()] for row in group]
        parts.append(f"{' '.join(prompt.split())[:100]}\n{table(list(columns), lines)}")
    return "\n\n".join(parts)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
