"""gpt2onnx next"""

import functools
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..models.tables import table
from ..runtime.options import SAMPLING_OPTIONS
from . import console, prompt_options
from .generation_options import generation_options, token_ids
from .model_options import device_options, load, model_option

if TYPE_CHECKING:
    from ..experiments.next_token import Choice, Stage
    from ..runtime.text.tokenizer import Tokenizer

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _SeveralTemperatures(prompt_options.PromptCommand):
    """Lets `--temperature 0.1 1 5` stand for `--temperature 0.1 --temperature 1 --temperature 5`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded: list[str] = []
        listing = False
        for index, argument in enumerate(args):
            if argument == "--":
                expanded += args[index:]
                break
            # Numbers after the option's first value are further values.
            if listing and args[index - 1] != "--temperature" and _NUMBER.fullmatch(argument):
                expanded.append("--temperature")
            elif args[index - 1 : index] != ["--temperature"]:
                listing = argument.split("=")[0] == "--temperature"
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


@click.command("next", cls=_SeveralTemperatures)
@click.argument("prompt", required=False)
@model_option
@click.option("--prompt-ids", type=token_ids, help="The prompt as token ids, such as 1,2,3.")
@prompt_options.encoding_option
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    metavar="FLOAT...",
    help="Divides the logits; several numbers are compared. Put a prompt that is a number before them, or behind `--`.",
)
@generation_options([name for name in SAMPLING_OPTIONS if name not in ("temperature", "seed")])
@click.option(
    "--top", type=click.IntRange(min=0), default=10, show_default=True, help="Number of the likeliest tokens to show."
)
@click.option(
    "--token", "texts", multiple=True, help="A token to follow, such as ' king'; may be given more than once."
)
@click.option(
    "--draws",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of draws; their tokens are counted.",
)
@click.option(
    "--seed", type=int, help="Seed of the draws. The first draw is the first token of `generate` with this seed."
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@console.verbosity
def command(
    prompt: str | None, model: str, prompt_ids: list[int] | None, encoding: str, temperatures: tuple[float, ...], top: int,
    texts: tuple[str, ...], draws: int, seed: int | None, device: str, threads: int | None, as_json: bool, quiet: bool,
    given: dict[str, Any],
) -> None:  # fmt: skip
    """Show how the token after PROMPT (or standard input) is drawn: logits, temperature, softmax, filters, draw.

    One table for each temperature. "logit" and "p" are the network's own; "/ T" is the logit divided by the
    temperature. Each further column adds one filter, and has the probabilities after it; "-": the token is out.
    Options that aren't given are the model's, as in `generate`.

    \b
    Examples:
      gpt2onnx next "Once upon a time there was a"
      gpt2onnx next "The old" --temperature 0.1 1 5 --top-k 0 --token " king" --draws 1000 --seed 123
    """
    from ..experiments.next_token import next_token, token_of

    if prompt is not None and prompt_ids is not None:
        raise click.UsageError("give a prompt or --prompt-ids, not both")
    if seed is not None and not draws:
        raise click.UsageError("--seed goes with --draws")
    text_or_ids = prompt_ids if prompt is None else prompt_options.argument(prompt, encoding)
    if text_or_ids is None:
        text_or_ids = prompt_options.standard_input("give a prompt, --prompt-ids, or text on standard input", encoding)
    loaded = load(model, device, threads)
    followed = {text: token_of(loaded, text) for text in texts}
    with console.progress_bar("Drawing", "draws", quiet=quiet) as progress:
        result = next_token(
            loaded, text_or_ids, temperatures=temperatures, draws=draws, seed=seed, progress=progress, **given
        )
    if as_json:
        record = {
            "prompt": text_or_ids
            if isinstance(text_or_ids, str)
            else loaded.tokenizer.decode(text_or_ids, skip_special_tokens=True),
            "prompt_ids": result.prompt_ids,
            "draws": draws,
            "seed": result.choices[0].options.seed,
            "temperatures": [_record(choice, loaded.tokenizer, top, followed) for choice in result.choices],
        }
        console.print_json(record)
        return
    blocks = [_candidates(choice, loaded.tokenizer, top, list(followed.values())) for choice in result.choices]
    blocks += [_by_temperature(text, token, result.choices) for text, token in followed.items()]
    click.echo("\n\n".join(blocks))


def _candidates(choice: "Choice", tokenizer: "Tokenizer", top: int, followed: list[int]) -> str:
    """Table of the likeliest tokens and the followed ones, through all stages."""
    first, *later = choice.stages
    # A column: header, cell of a token, cell of the last row.
    columns: list[tuple[str, Callable[[int], str], object]] = [
        ("token", lambda token: repr(tokenizer.piece(token)), "candidates left"),
        ("id", str, ""),
        ("logit", functools.partial(_logit, first), ""),
        ("p", functools.partial(_probability, first), _possible(first.scores)),
    ]
    for stage in later:
        label = stage.name
        if stage.name == "temperature":
            columns.append(("/ T", functools.partial(_logit, stage), ""))
            label = f"T = {choice.options.temperature:g}"
        elif stage.name != "penalties":
            label = f"{stage.name} {getattr(choice.options, stage.name):g}"
        columns.append((label, functools.partial(_probability, stage), _possible(stage.scores)))
    if choice.draws:
        columns.append(("drawn", lambda token: str(choice.counts[token]), choice.draws))
        columns.append(("expected", lambda token: f"{choice.expected(token):.1f}", f"{choice.draws:.1f}"))
    shown = choice.top(top)
    shown += [token for token in followed if token not in shown]
    rows = [[cell(token) for _, cell, _ in columns] for token in shown]
    return table([header for header, _, _ in columns], [*rows, [str(last) for _, _, last in columns]])


def _by_temperature(text: str, token: int, choices: list["Choice"]) -> str:
    """Table of one token at each temperature."""
    header = [repr(text), "p", "p, filtered"]
    draws = choices[0].draws
    header += ["drawn", "expected", "deviation"] if draws else []
    rows = []
    for choice in choices:
        temperature = next(stage for stage in choice.stages if stage.name == "temperature")
        p = float(choice.probabilities[token])
        row = [f"T = {choice.options.temperature:g}", f"{temperature.probabilities[token]:.3e}", f"{p:.3e}"]
        if draws:
            row += [
                str(choice.counts[token]),
                f"{choice.expected(token):.2f}",
                f"{math.sqrt(draws * p * (1 - p)):.2f}",
            ]
        rows.append(row)
    return table(header, rows)


def _record(choice: "Choice", tokenizer: "Tokenizer", top: int, followed: dict[str, int]) -> dict[str, Any]:
    def candidate(token: int) -> dict[str, Any]:
        piece = tokenizer.piece(token)
        return {
            "token_id": token,
            "piece": piece if isinstance(piece, str) else None,
            "bytes": tokenizer.token_bytes(token).hex(),
            "rank": choice.rank(token),
            "stages": {
                stage.name: {"score": float(stage.scores[token]), "probability": float(stage.probabilities[token])}
                for stage in choice.stages
            },
        } | ({"drawn": int(choice.counts[token]), "expected": choice.expected(token)} if choice.draws else {})

    from ..experiments.next_token import FILTERS

    return {name: getattr(choice.options, name) for name in ("temperature", *FILTERS)} | {
        "candidates_left": {stage.name: _possible(stage.scores) for stage in choice.stages},
        "candidates": [candidate(token) for token in choice.top(top)],
        "tokens": {text: candidate(token) for text, token in followed.items()},
    }


def _possible(scores: Any) -> int:
    """Number of tokens that are still in."""
    return int((scores > -math.inf).sum())


def _logit(stage: "Stage", token: int) -> str:
    score = stage.scores[token]
    return f"{score:.3f}" if score > -math.inf else "-"


def _probability(stage: "Stage", token: int) -> str:
    return f"{stage.probabilities[token]:.4f}" if stage.scores[token] > -math.inf else "-"
