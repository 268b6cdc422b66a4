"""Grid of a sweep: strategies and prompts, read from TOML. Knows nothing of models.

prompts = ["Once upon a time"]      # unless the caller gives others

[options]                           # for all strategies
max_new_tokens = 60
seed = [1, 2]                       # for those that sample; the others run once

[[strategy]]
name = "top-p"
do_sample = true
top_p = [0.95, 0.5]                 # lists multiply: two values and two seeds make four runs
"""

import math
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from gpt2onnx.errors import OptionError, PromptError

from ..runtime.options import BY_NAME, SAMPLING_OPTIONS, GenerationConfig, sampling_options
from ..runtime.text.text_input import read

MOST_RUNS = 1000
# A grid in Python: the content of a file, one strategy's options, or several of those with names.
Table: TypeAlias = Mapping[str, Any]
Source: TypeAlias = str | os.PathLike[str] | Table | Sequence[Table] | None
_REFUSED = ("logprobs",)  # a sweep doesn't keep them


@dataclass(frozen=True)
class Strategy:
    """One point of the grid.

    Attributes:
        family: name of its [[strategy]].
        label: its own name, unique in the grid: the family, and its choices among several values.
    """

    family: str
    label: str
    options: GenerationConfig


@dataclass(frozen=True)
class Grid:
    """Strategies and prompts; the built-in grid has no prompts."""

    strategies: list[Strategy]
    prompts: list[str]


def built_in() -> str:
    """The built-in grid, as TOML."""
    return Path(__file__).with_name("notebooks.toml").read_text(encoding="utf-8")


def load(source: Source, base: GenerationConfig, overrides: Mapping[str, Any] | None = None) -> Grid:
    """Reads a grid.

    Args:
        source: path of a TOML file, or its content as Python has it; the options of one strategy, or of several, each
            with a "name"; None for the built-in grid.
        base: generation options that the grid doesn't set.
        overrides: generation options that replace those under [options].

    Raises:
        OptionError: the file can't be read or isn't TOML; an option is unknown, of a wrong type, out of range or
            contradicts another; or there are too many runs.
    """
    name = "the built-in grid" if source is None else "the grid"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    try:
        content = _content(source, name)
    except PromptError as error:
        raise OptionError(str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{name} is not TOML: {error}") from error
    try:
        return _grid(content, base, {key: value for key, value in (overrides or {}).items() if value is not None})
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error


def _content(source: Source, name: str) -> Table:
    if source is None:
        return tomllib.loads(built_in())
    if isinstance(source, str | os.PathLike):
        return tomllib.loads(read(Path(source), name))
    if isinstance(source, Mapping) and "strategy" in source:
        return source
    return {"strategy": [_named(source)] if isinstance(source, Mapping) else list(source)}


def _named(options: Table) -> Table:
    """A single strategy, called after the options that it varies."""
    varied = [_word(name) for name, value in options.items() if isinstance(value, list)]
    return {"name": ", ".join(varied) or "options", **options}


def _grid(content: Mapping[str, Any], base: GenerationConfig, overrides: Mapping[str, Any]) -> Grid:
    unknown = content.keys() - {"prompts", "options", "strategy"}
    if unknown:
        raise OptionError(f"unknown key {min(unknown)!r}: a grid has prompts, [options] and [[strategy]]")
    prompts, common, tables = content.get("prompts", []), content.get("options", {}), content.get("strategy")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise OptionError("prompts must be a list of texts, none of them empty")
    if not isinstance(common, dict):
        raise OptionError("options must be a table: [options]")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
        raise OptionError("a grid needs at least one strategy: [[strategy]]")
    strategies: list[Strategy] = []
    for number, table in enumerate(tables, 1):
        family = table.get("name", f"strategy {number}")
        if not isinstance(family, str) or not family:
            raise OptionError(f"the name of strategy {number} must be a text")
        own = {key: value for key, value in table.items() if key != "name"}
        try:
            strategies += _strategies(family, common, {**own, **overrides}, base)
        except OptionError as error:
            raise OptionError(f"strategy {family!r}: {error}") from error
        if len(strategies) > MOST_RUNS:
            raise OptionError(f"more than {MOST_RUNS} runs a prompt: shorten a list, or make several grids")
    label, count = Counter(strategy.label for strategy in strategies).most_common(1)[0]
    if count > 1:
        raise OptionError(f"two strategies are called {label!r}: give them different names")
    return Grid(strategies, prompts)


def _strategies(
    family: str, common: Mapping[str, Any], own: Mapping[str, Any], base: GenerationConfig
) -> list[Strategy]:
    """All combinations of the values of one table."""
    given = {**common, **own}
    for name in _REFUSED:
        if name in given:
            raise OptionError(f"{name} can't be swept")
    # A seed alone doesn't turn sampling on.
    asked = [name for name in sampling_options(given) if name != "seed" and name in own]
    if given.get("do_sample") is False and asked:
        raise OptionError(f"{asked[0]} has no effect with do_sample = false: leave one of them out")
    given.setdefault("do_sample", bool(asked))
    choices = {name: _choices(name, value) for name, value in given.items()}
    total = math.prod(map(len, choices.values()))
    if total > MOST_RUNS:
        raise OptionError(f"{total:,} runs are more than {MOST_RUNS}: shorten a list")
    varied = [name for name, values in choices.items() if len(values) > 1]
    found: dict[str, Strategy] = {}
    for combination in product(*choices.values()):
        chosen = dict(zip(choices, combination, strict=True))
        options = base.merged(chosen)
        if not options.do_sample:
            options = options.replaced(seed=None)
        # Without sampling, sampling options make no runs of their own.
        idle = () if options.do_sample else sampling_options(chosen)
        effective = {name: chosen[name] for name in varied if name not in idle}
        label = _label(family, effective)
        found.setdefault(label, Strategy(family, label, options))
    return list(found.values())


def _choices(name: str, value: Any) -> Sequence[Any]:
    """The values to try. The lists of an option whose value is a list itself don't multiply."""
    takes_list = name in BY_NAME and BY_NAME[name].takes_list
    if not isinstance(value, list) or takes_list:
        return [value]
    if not value:
        raise OptionError(f"{name} is an empty list")
    if len({repr(each) for each in value}) < len(value):
        raise OptionError(f"{name} lists a value twice")
    return value


def describe(name: str, value: Any) -> str:
    """An option and its value in short words, such as "beams 4"."""
    if name == "no_repeat_ngram_size" and value == 0:
        return "no blocking"
    return f"{_word(name)} {str(value).lower() if isinstance(value, bool) else value}"


def _word(name: str) -> str:
    words = {"num_beams": "beams", "no_repeat_ngram_size": "n-gram"}
    return words.get(name, name.replace("_", "-") if name in SAMPLING_OPTIONS else name)


def _label(family: str, varied: Mapping[str, Any]) -> str:
    chosen = ", ".join(describe(name, value) for name, value in varied.items())
    # The family "top-k" with the choice "top-k 5" is just "top-k 5".
    if family == ", ".join(_word(name) for name in varied):
        return chosen
    return f"{family}: {chosen}" if chosen else family
