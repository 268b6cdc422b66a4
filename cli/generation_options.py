"""The generation options as command-line options, under transformers' names with dashes."""

import json
from collections.abc import Callable
from typing import Any

import click


class TokenIds(click.ParamType):
    """Whole numbers, separated by commas."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids such as 1,2,3", param, ctx)


class ListOfTokenIds(click.ParamType):
    """JSON: a list of lists of whole numbers."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[list[int]]:
        if isinstance(value, list):
            return value
        try:
            content = json.loads(value)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, list) or not all(isinstance(word, list) for word in content):
            self.fail(f"{value!r} is not a list of lists of token ids such as [[1,2],[3]]", param, ctx)
        return content


class EarlyStopping(click.Choice[str]):
    """true, false or never."""

    def __init__(self) -> None:
        super().__init__(["true", "false", "never"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        chosen = super().convert(value, param, ctx)
        return {"true": True, "false": False}.get(chosen, chosen)


_OPTIONS: list[tuple[str, Any, str]] = [
    ("--max-new-tokens", int, "At most so many new tokens (64 where no length is given)."),
    ("--min-new-tokens", int, "No end token before so many new tokens."),
    ("--max-length", int, "At most so many tokens, prompt included."),
    ("--min-length", int, "No end token before so many tokens, prompt included."),
    ("--do-sample/--no-do-sample", None, "Draw the next token instead of taking the likeliest."),
    ("--temperature", float, "Divides the logits before sampling."),
    ("--top-k", int, "Sample among the k likeliest tokens; 0 for all (default 50)."),
    ("--top-p", float, "Sample among the likeliest tokens whose probabilities add up to p."),
    ("--min-p", float, "Sample among tokens at least p times as likely as the likeliest."),
    ("--typical-p", float, "Sample among the most typical tokens whose probabilities add up to p."),
    ("--repetition-penalty", float, "Above 1 makes tokens seen before less likely."),
    ("--no-repeat-ngram-size", int, "Write no n-gram of this size twice."),
    ("--bad-words-ids", ListOfTokenIds(), "Token sequences that are never completed, such as [[1,2],[3]]."),
    ("--suppress-tokens", TokenIds(), "Tokens that are never chosen, such as 1,2,3."),
    ("--num-beams", int, "Width of the beam search."),
    ("--length-penalty", float, "Exponent of the length that divides a beam's score."),
    ("--early-stopping", EarlyStopping(), "When a beam search ends."),
    ("--num-return-sequences", int, "Continuations of each prompt."),
    ("--seed", int, "Seed of the random draws."),
    ("--eos-token-id", TokenIds(), "Token or tokens that end a sequence."),
    ("--stop", str, "String that ends a sequence; may be given more than once."),
    ("--logprobs", int, "With --json: log probability of each token and of the N likeliest."),
    ("--prompt-lookup", int, "Length of drafts copied from earlier text and verified in one pass."),
]  # fmt: skip


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds all generation options; those that weren't given arrive as None."""
    for name, kind, text in reversed(_OPTIONS):
        multiple = {"multiple": True} if name == "--stop" else {}
        command = click.option(name, type=kind, default=None, help=text, **multiple)(command)  # type: ignore[arg-type]
    return command
