"""The generation options on the command line: derived from the table in `runtime.options`, with dashes."""

import functools
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import inspect

from ..runtime.option_table import Option
from ..runtime.options import BY_NAME, OPTIONS
from ..runtime.text import text_input

_OFF = "none"  # switches an option off
_PAIRS = re.compile(r"\d+=[-+]?[\d.]+(?:e[-+]?\d+)?(?:,\d+=[-+]?[\d.]+(?:e[-+]?\d+)?)*")
_UNDERSCORED = re.compile(r"\w+_\w+")

# Generic for type checkers, but not at run time in click before 8.2.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType


class _Value(_ParamType):
    """A value of an option; "none" becomes None, in a tuple so that click doesn't take it for not given."""

    def __init__(self, option: Option) -> None:
        (kind, *others) = option.kinds
        self._option = option
        # Values of one plain type are left to click, whose help and errors name it.
        types: dict[Any, click.ParamType[Any]] = {inspect.IntType: click.INT, inspect.FloatType: click.FLOAT}
        plain = types.get(type(kind))
        self._plain = None if others else plain
        self._lists = all(isinstance(each, inspect.CollectionType) for each in option.kinds)
        self.name = self._plain.name if self._plain else "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == _OFF:
            return (None,)
        if self._plain is not None:
            return (self._plain.convert(value, param, ctx),)
        found = _parsed(value)
        if not self._option.takes(found) and self._option.takes(value):  # a text that could be JSON, such as 2020
            found = value
        if isinstance(found, int) and not isinstance(found, bool) and self._lists:
            found = [found]
        if isinstance(found, str) and not self._option.takes(found):
            self.fail(f"{value!r} is not a value such as {self._option.example}", param, ctx)
        return (found,)


def _parsed(text: str) -> Any:
    """JSON, whose outermost brackets may be left out, or pairs such as 5=-1; any other text as it is."""
    if _PAIRS.fullmatch(text):
        return [[int(token), float(number)] for token, _, number in (pair.partition("=") for pair in text.split(","))]
    for attempt in (text, f"[{text}]"):
        try:
            return json.loads(attempt)
        except (ValueError, RecursionError):
            continue
    return text


def token_ids(text: str) -> list[int]:
    """Reads token ids, separated by commas."""
    ids = _parsed(f"[{text}]")
    if not isinstance(ids, list) or not ids or not all(type(each) is int for each in ids):
        raise click.BadParameter(f"{text!r} is not a list of token ids such as 1,2,3")
    return ids


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    name = _dashed(option.name)
    text = _UNDERSCORED.sub(lambda found: _dashed(found[0]) if found[0] in BY_NAME else found[0], option.help)
    if option.example and not option.repeated:
        text += f" Example: {option.example}."
    kind, *others = option.kinds
    if isinstance(kind, inspect.BoolType) and not others:
        return click.option(f"{name}/--no-{name[2:]}", default=None, help=text)
    if isinstance(kind, inspect.LiteralType) and not others:
        return click.option(name, type=click.Choice([str(value) for value in kind.values]), help=text)
    if option.repeated:
        return click.option(name, multiple=True, help=f"{text[:-1]}; may be given more than once.")
    read = _content if option.name == "json_schema" else None
    return click.option(name, type=_Value(option), default=None, help=text, callback=read)


def _content(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A schema on the command line is the name of a file."""
    if value in (None, (None,)) or not isinstance(value[0], str):
        return value
    return (text_input.read(Path(value[0]), f"the schema {value[0]}"),)


def generation_options(names: Collection[str] = BY_NAME.keys()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds generation options, all by default; those that were given arrive as a dictionary `given`."""
    options = [option for option in OPTIONS if option.name in names]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gather(**values: Any) -> Any:
            given: dict[str, Any] = {}
            for option in options:
                value = values.pop(option.name)
                if option.repeated:
                    if value:
                        given[option.name] = None if value == (_OFF,) else list(value)
                elif value is not None:
                    given[option.name] = value[0] if isinstance(value, tuple) else value
            return command(given=given, **values)

        decorated: Callable[..., Any] = gather
        for option in reversed(options):
            decorated = _option(option)(decorated)
        return decorated

    return decorate
