"""The generation options as command-line options, under transformers' names with dashes."""

import json
from collections.abc import Callable
from typing import Any

import click


def token_ids(text: str) -> list[int]:
    """Reads whole numbers, separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of token ids such as 1,2,3") from error


def lists_of_token_ids(text: str) -> list[list[Any]]:
    """Reads a list of lists of whole numbers, as JSON."""
    return _lists(text, "a list of lists of token ids such as [[1,2],[3]]")


def sequence_bias(text: str) -> list[list[Any]]:
    """Reads a list of token sequences with a number each, as JSON."""
    return _lists(text, "a list of token sequences with a number each such as [[[1,2],-2.5],[[3],1]]")


def _lists(text: str, what: str) -> list[list[Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list) or not all(isinstance(one, list) for one in content):
        raise click.BadParameter(f"{text!r} is not {what}")
    return content


def length_and_factor(text: str) -> tuple[int, float]:
    """Reads a number of tokens and a factor, separated by a comma."""
    try:
        length, factor = text.split(",")
        return int(length), float(factor)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a number of tokens and a factor such as 50,1.05") from error


def early_stopping(text: str) -> bool | str:
    """Reads true, false or never."""
    choices: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
    if text not in choices:
        raise click.BadParameter(f"{text!r} is not one of true, false, never")
    return choices[text]


_OPTIONS: list[tuple[str, Any, str]] = [
    ("--max-new-tokens", int, "At most so many new tokens (64 where no length is given)."),
    ("--min-new-tokens", int, "No end token before so many new tokens."),
    ("--max-length", int, "At most so many tokens, prompt included."),
    ("--min-length", int, "No end token before so many tokens, prompt included."),
    ("--do-sample/--no-do-sample", None, "Draw the next token instead of taking the likeliest."),
    ("--temperature", float, "Divides the logits before sampling."),
    ("--top-h", float, "Sample among the likeliest of 100 tokens whose terms of the entropy add up to this share of it."),
    ("--top-k", int, "Sample among the k likeliest tokens; 0 for all (default 50)."),
    ("--top-p", float, "Sample among the likeliest tokens whose probabilities add up to p."),
    ("--min-p", float, "Sample among tokens at least p times as likely as the likeliest."),
    ("--typical-p", float, "Sample among the most typical tokens whose probabilities add up to p."),
    ("--epsilon-cutoff", float, "Sample among tokens of at least this probability."),
    ("--eta-cutoff", float, "Sample among tokens of at least this probability, or of less where many are likely."),
    (
        "--renormalize-logits/--no-renormalize-logits", None,
        "Make log probabilities of what filters leave, so that beams' scores are such.",
    ),
    ("--repetition-penalty", float, "Above 1 makes tokens seen before less likely."),
    ("--encoder-repetition-penalty", float, "Above 1 makes the prompt's tokens more likely."),
    ("--no-repeat-ngram-size", int, "Write no n-gram of this size twice."),
    ("--encoder-no-repeat-ngram-size", int, "Write no n-gram of this size in the prompt again."),
    ("--sequence-bias", sequence_bias, "Added where a token sequence is completed, such as [[[1,2],-2.5],[[3],1]]."),
    ("--bad-words-ids", lists_of_token_ids, "Token sequences that are never completed, such as [[1,2],[3]]."),
    ("--suppress-tokens", token_ids, "Tokens that are never chosen, such as 1,2,3."),
    ("--begin-suppress-tokens", token_ids, "Tokens that are never chosen first."),
    ("--forced-bos-token-id", int, "First new token after a prompt of one token."),
    ("--forced-eos-token-id", token_ids, "Token or tokens of which one comes last where the length ends a sequence."),
    (
        "--exponential-decay-length-penalty", length_and_factor,
        "So many new tokens, after which each makes end tokens likelier by a factor, such as 50,1.05.",
    ),
    ("--num-beams", int, "Width of the beam search."),
    ("--length-penalty", float, "Exponent of the length that divides a beam's score."),
    ("--early-stopping", early_stopping, "When a beam search ends."),
    ("--num-return-sequences", int, "Continuations of each prompt."),
    ("--seed", int, "Seed of the random draws."),
    ("--eos-token-id", token_ids, "Token or tokens that end a sequence."),
    ("--stop", str, "String in the new text that ends a sequence; may be given more than once."),
    ("--logprobs", int, "With --json: log probability of each token and of the N likeliest."),
    ("--prompt-lookup", int, "Greatest length of drafts copied from earlier text and verified in one pass."),
]  # fmt: skip


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds all generation options; those that weren't given arrive as None."""
    for name, kind, text in reversed(_OPTIONS):
        multiple = {"multiple": True} if name == "--stop" else {}
        command = click.option(name, type=kind, default=None, help=text, **multiple)(command)  # type: ignore[arg-type]
    return command
