"""Report of a sweep: records in, one self-contained HTML page out.

The page depends on the records alone and needs no other file. The template engine escapes all texts of models and users;
the page's policy also forbids any script but its own, and anything from elsewhere.
"""

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from gpt2onnx.errors import MissingExtraError

from . import charts, grid
from .metrics import METRICS

Record = dict[str, Any]
T = TypeVar("T")

_COLOURS = 8
# Below this share of processor time, other programs have disturbed a run; undisturbed runs are at about 1.
_LEAST_SHARE = 0.75
# Families and lines differ in shape as well as in colour.
_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")


def check() -> None:
    """Checks that a report can be made.

    Raises:
        MissingExtraError: jinja2 isn't installed.
    """
    _engine()


def render(records: Sequence[Record]) -> str:
    """Renders the page.

    Args:
        records: of `sweep.run`, at least one.

    Raises:
        MissingExtraError: jinja2 isn't installed.
    """
    rows = _rows(records)
    prompts = _by_prompt(records, rows)
    template, script = (
        Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html.jinja", "js")
    )
    page: str = (
        _engine()
        .from_string(template)
        .render(
            model=records[0]["model"],
            emissions=next((record["emissions"] for record in records if record["emissions"]), None),
            measured=any(row.joules_per_token is not None for row in rows),
            disturbed=sum(1 for record in records if _is_disturbed(record["emissions"])),
            unreliable=sum(1 for record in records if record["energy"] and not record["energy"]["reliable"]),
            rows=rows,
            places={row.strategy: card.place for card in next(iter(prompts.values())) for row in card.rows},
            winners=_winners(rows),
            most={
                "speed": max(row.tokens_per_second for row in rows),
                "energy": max(row.joules_per_token or 0.0 for row in rows) or 1.0,
            },
            scatter=_scatter(rows),
            beams=_beams(rows),
            prompts=list(prompts.items()),
            size={"width": charts.WIDTH, "height": charts.HEIGHT},
            edges={"left": charts.LEFT, "right": charts.WIDTH - charts.RIGHT, "top": charts.TOP},
            bottom=charts.HEIGHT - charts.BOTTOM,
            script=script,
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            shapes=_SHAPES,
            colours=_COLOURS,
        )
    )
    return page


@dataclass(frozen=True)
class Row:
    """Figures of a strategy: means over all prompts; None without a figure."""

    strategy: str
    family: str
    index: int
    options: Record
    tokens_per_second: float
    joules_per_token: float | None
    g_co2eq_per_1000_tokens: float | None
    mean_length: float
    mean_logprob: float
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repeated_4gram_share: float | None

    @property
    def colour(self) -> int:
        return self.index % _COLOURS

    @property
    def variant(self) -> str:
        """Its name within the family."""
        return self.strategy.removeprefix(f"{self.family}: ")


class Winner(NamedTuple):
    """The best strategy by one figure."""

    title: str
    row: Row
    value: str


@dataclass(frozen=True)
class Line:
    """Line of a chart: name, and points (x, y, tooltip)."""

    label: str
    index: int
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Chart: axes and lines; in a scatter plot a line is a family."""

    title: str
    summary: str
    x: charts.Axis
    y: charts.Axis
    lines: list[Line]


def _is_disturbed(row: Record | None) -> bool:
    """Whether other programs took much of the run's processor time."""
    return row is not None and row["device"] == "cpu" and row["cpu_seconds"] < _LEAST_SHARE * row["seconds"]


def _engine() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError("The report of a sweep", "jinja2", "sweep") from error
    engine = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    engine.filters["number"] = number
    engine.filters["repeats"] = repeats
    return engine


def number(value: float | None) -> str:
    """A number with three significant digits, without an exponent; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    places = min(max(2 - math.floor(math.log10(abs(value))), 0), 6)
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def repeats(text: str) -> list[tuple[str, bool]]:
    """A text in parts, each with whether it repeats: its words belong to four in a row that stood before, in any case."""
    pieces = re.findall(r"\s*\S+", text) or [text]
    words = [piece.strip().lower() for piece in pieces]
    size, seen = 4, set[tuple[str, ...]]()
    repeated = [False] * len(words)
    for end in range(size, len(words) + 1):
        ngram = tuple(words[end - size : end])
        if ngram in seen:
            repeated[end - size : end] = [True] * size
        seen.add(ngram)
    runs = groupby(zip(pieces, repeated, strict=True), key=lambda pair: pair[1])
    parts = [("".join(piece for piece, _ in run), again) for again, run in runs]
    rest = text[sum(map(len, pieces)) :]
    return [*parts, (rest, False)] if rest else parts


def _rows(records: Sequence[Record]) -> list[Row]:
    families = list(dict.fromkeys(record["family"] for record in records))

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    rows: list[Row] = []
    for strategy, group in _grouped(records, lambda record: record["strategy"]).items():
        figures: Record = {name: mean(record[name] for record in group) for name in METRICS}
        # Ratios of sums: a mean of ratios would overweight short texts.
        tokens = sum(record["completion_tokens"] for record in group)
        figures["tokens_per_second"] = tokens / sum(record["seconds"] for record in group)
        measured = [record for record in group if record["energy"] is not None]
        made = sum(record["completion_tokens"] for record in measured)
        joules, grams = (sum(record["energy"][name] for record in measured) for name in ("joules", "g_co2eq"))
        figures["joules_per_token"] = joules / made if made else None
        figures["g_co2eq_per_1000_tokens"] = 1000 * grams / made if made else None
        family, options = group[0]["family"], group[0]["options"]
        rows.append(Row(strategy, family, families.index(family), options, **figures))
    return rows


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Groups in the order of their first items."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _winners(rows: Sequence[Row]) -> list[Winner]:
    found: list[Winner] = []

    def add(title: str, figure: Callable[[Row], float | None], unit: str, *, least: bool = False) -> None:
        known = [(value, row) for row in rows if (value := figure(row)) is not None]
        if known:
            value, row = (min if least else max)(known, key=lambda pair: pair[0])
            found.append(Winner(title, row, f"{number(value)} {unit}"))

    add("Fastest", lambda row: row.tokens_per_second, "tokens/s")
    add("Least energy", lambda row: row.joules_per_token, "J/token", least=True)
    add("Likeliest", lambda row: row.mean_logprob, "nats/token")
    add("Most diverse", lambda row: row.distinct_2, "distinct-2")
    return found


def _scatter(rows: Sequence[Row]) -> Chart | None:
    known = [row for row in rows if row.distinct_2 is not None]
    if len(known) < 2:
        return None
    x = charts.horizontal("mean log probability (nats per token)", [row.mean_logprob for row in known])
    y = charts.vertical("distinct-2", [row.distinct_2 or 0.0 for row in known])
    lines = [
        Line(
            group[0].family,
            group[0].index,
            [(x.at(row.mean_logprob), y.at(row.distinct_2 or 0.0), f"{row.strategy}: {_pair(row)}") for row in group],
        )
        for group in _grouped(known, lambda row: row.family).values()
    ]
    likeliest = max(known, key=lambda row: row.mean_logprob)
    most_diverse = max(known, key=lambda row: row.distinct_2 or 0.0)
    summary = (
        f"{len(known)} strategies. The likeliest texts are those of {likeliest.strategy} ({_pair(likeliest)}),"
        f" the most diverse those of {most_diverse.strategy} ({_pair(most_diverse)})."
    )
    return Chart("Diversity against log probability", summary, x, y, lines)


def _pair(row: Row) -> str:
    return f"{number(row.mean_logprob)} nats, distinct-2 {number(row.distinct_2)}"


def _beams(rows: Sequence[Row]) -> list[Chart]:
    """Gain and cost of wider beams. Strategies that differ only in their number of beams make a line."""
    searches = (row for row in rows if not row.options["do_sample"])
    groups = _grouped(searches, lambda row: repr(row.options | {"num_beams": None})).values()
    series = [sorted(group, key=lambda row: row.options["num_beams"]) for group in groups if len(group) > 1]
    if not series:
        return []
    labels = [_difference(group[0].options, [other[0].options for other in series]) for group in series]
    widths = sorted({row.options["num_beams"] for group in series for row in group})
    x = charts.horizontal("beams", [float(width) for width in widths], ticks=widths)

    def chart(title: str, unit: str, figure: Callable[[Row], float | None], *, zero: bool) -> Chart | None:
        values = [value for group in series for row in group if (value := figure(row)) is not None]
        if not values:
            return None
        y = charts.vertical(unit, values, zero=zero)
        lines = [
            Line(
                label,
                index,
                [
                    (x.at(row.options["num_beams"]), y.at(value), f"{row.strategy}: {number(value)}")
                    for row in group
                    if (value := figure(row)) is not None
                ],
            )
            for index, (label, group) in enumerate(zip(labels, series, strict=True))
        ]
        first, last = series[0][0], series[0][-1]
        summary = (
            f"{labels[0].capitalize()}: {number(figure(first))} with {_beam_count(first)},"
            f" {number(figure(last))} with {_beam_count(last)}."
        )
        return Chart(title, summary, x, y, lines)

    wanted = [
        chart("Gain", "mean log probability (nats)", lambda row: row.mean_logprob, zero=False),
        chart("Cost", "joules per token", lambda row: row.joules_per_token, zero=True)
        or chart("Cost", "milliseconds per token", lambda row: 1000 / row.tokens_per_second, zero=True),
    ]
    return [one for one in wanted if one is not None]


def _beam_count(row: Row) -> str:
    count = row.options["num_beams"]
    return f"{count} beam{'s' if count > 1 else ''}"


def _difference(options: Record, all_options: Sequence[Record]) -> str:
    """The options that differ between lines, in short words."""
    varied = [name for name in options if name != "num_beams" and len({repr(each[name]) for each in all_options}) > 1]
    return ", ".join(grid.describe(name, options[name]) for name in varied) or "all prompts"


class Card(NamedTuple):
    """A text of a prompt: its place in the page, the strategies that wrote it, and the record of the first of them."""

    place: str
    rows: list[Row]
    record: Record


def _by_prompt(records: Sequence[Record], rows: Sequence[Row]) -> dict[str, list[Card]]:
    row_of = {row.strategy: row for row in rows}
    found = {}
    for number, (prompt, of_prompt) in enumerate(_grouped(records, lambda record: str(record["prompt"])).items(), 1):
        texts = _grouped(of_prompt, lambda record: repr([sequence["text"] for sequence in record["sequences"]]))
        found[prompt] = [
            Card(f"text-{number}-{index}", [row_of[record["strategy"]] for record in same], same[0])
            for index, same in enumerate(texts.values(), 1)
        ]
    return found
