"""gpt2onnx eval"""

from pathlib import Path
from typing import Any

import click

from ..models.tables import table
from . import console
from .model_options import device_options, load, model_option
from .prompt_options import encoding_option, file_text


@click.command("eval")
@click.argument("text_file", type=click.Path(path_type=Path, allow_dash=True))
@encoding_option
@model_option
@click.option("--context", type=int, help="Tokens of a window (default: the model's positions).")
@click.option("--stride", type=int, help="Tokens from one window's start to the next (default: the context).")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Windows of a batch.")
@click.option("--split", type=float, help="Share of the characters for training; the rest is for validation.")
@click.option("--keep-short/--drop-short", default=True, help="Count a short last window (default), or leave it out.")
@click.option(
    "--drop-last",
    type=click.Choice(["none", "train", "all"]),
    default="none",
    show_default=True,
    help="Parts that leave out an incomplete last batch.",
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@console.verbosity
def command(
    text_file: Path, encoding: str, model: str, device: str, threads: int | None, as_json: bool, quiet: bool, **options: Any
) -> None:  # fmt: skip
    """Measure the loss (nats per token), perplexity and bits per byte of TEXT_FILE, or of standard input for `-`.

    A window of --context tokens predicts the token after each of them. With a --stride below the context,
    windows overlap, and each token counts once, in the first window that predicts it. "batch loss" is the
    mean of the batches' means, as a loop over a data loader prints it.

    \b
    Examples:
      gpt2onnx eval story.txt
      gpt2onnx eval story.txt --context 256 --stride 64 --json
      gpt2onnx eval story.txt --context 256 --batch-size 2 --split 0.9 --drop-short --drop-last train
    """
    from ..experiments.evaluation import evaluate

    text = file_text(text_file, encoding)
    loaded = load(model, device, threads, wide_after=0)
    with console.progress_bar(f"Evaluating {text_file.name}", "tokens", quiet=quiet) as progress:
        result = evaluate(loaded, text, progress=progress, **options)
    if as_json:
        origin = {"text_file": str(text_file), "model": model, "dtype": loaded.bundle.manifest.dtype}
        console.print_json(origin | result.to_dict())
        return
    if not quiet:
        click.echo(
            f"{text_file} with {model} ({loaded.bundle.manifest.dtype}):"
            f" windows of {result.context}, stride {result.stride}, batches of {result.batch_size}"
        )
    header = ["", "tokens", "predicted", "windows", "batches", "loss", "batch loss", "perplexity", "bits per byte"]
    rows = [
        [
            name, f"{loss.tokens:,}", f"{loss.predicted:,}", f"{loss.windows:,}", f"{loss.batches:,}",
            f"{loss.loss:.4f}", f"{loss.batch_loss:.4f}", f"{loss.perplexity:,.2f}", f"{loss.bits_per_byte:.4f}",
        ]
        for name, loss in result.parts.items()
    ]  # fmt: skip
    click.echo(table(header, rows))
