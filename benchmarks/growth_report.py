"""The report of `benchmarks.growth`: figures in, plots and a page out. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PARTS = ("context", "batch", "vocabulary", "size")
COLOURS = {"int8": "tab:blue", "fp32": "tab:orange"}

Figure = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """One plot: a figure against what it should grow with.

    Attributes:
        part: whose points.
        title, unit: of the plot, and of its horizontal axis.
        x: of a point.
        y: of a point, seconds.
        powers: of x in the law, whose factors are fitted.
        law: the law in words.
        bound: whether reading what a step reads, at the bandwidth measured, bounds it from below.
    """

    part: str
    title: str
    unit: str
    x: Callable[[Figure], float]
    y: Callable[[Figure], float]
    powers: tuple[int, ...]
    law: str
    bound: bool = True


def _x(point: Figure) -> float:
    return float(point["x"])


def _step(point: Figure) -> float:
    return float(point["step"])


PLOTS = (
    Plot("context", "A step against its context", "positions in the cache", _x, _step, (0, 1), "a + b · context"),
    Plot(
        "context", "Prefill against the prompt", "tokens of the prompt", lambda point: float(point["prompt"]),
        lambda point: float(point["prefill"]), (0, 1, 2), "a + b · tokens + c · tokens²", bound=False,
    ),
    Plot("batch", "A step against the batch", "sequences", _x, _step, (0, 1), "a + b · batch"),
    Plot("vocabulary", "A step against the vocabulary", "entries", _x, _step, (0, 1), "a + b · entries"),
    Plot(
        "size", "A step against the model", "MB of weights that a step reads",
        lambda point: point["weights"] / 1e6, _step, (0, 1), "a + b · bytes",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        powers, factors: the sum of factor times x to the power.
        worst, typical: largest and root mean square distance of a point from it, relative to the point.
    """

    powers: tuple[int, ...]
    factors: tuple[float, ...]
    worst: float
    typical: float

    def at(self, x: Any) -> Any:
        return sum(
            factor * np.asarray(x, float) ** power for power, factor in zip(self.powers, self.factors, strict=True)
        )


def fit(x: Sequence[float], y: Sequence[float], powers: tuple[int, ...]) -> Law:
    """Least squares of relative distances, with no negative factor: a negative time would mean nothing."""
    kept = powers
    while True:
        terms = np.array([[value**power / time for power in kept] for value, time in zip(x, y, strict=True)])
        factors = np.linalg.lstsq(terms, np.ones(len(y)), rcond=None)[0]
        if (factors >= 0).all() or len(kept) == 1:
            break
        kept = tuple(power for power, factor in zip(kept, factors, strict=True) if factor >= 0)
    distances = np.abs(terms @ factors - 1)
    all_factors = dict(zip(kept, factors.tolist(), strict=True))
    return Law(
        powers,
        tuple(all_factors.get(power, 0.0) for power in powers),
        float(distances.max()),
        float(np.sqrt((distances**2).mean())),
    )


def write(known: dict[str, Any]) -> None:
    """Writes growth.svg and growth.md into docs/benchmarks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "growth"
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 12), layout="constrained")
    rows: list[str] = []
    for plot, axis in zip(PLOTS, axes.flat, strict=False):
        measured = known.get("parts", {}).get(plot.part, {})
        rows += [_draw(axis, plot, dtype, found) for dtype, found in measured.items()]
        axis.set(title=plot.title, xlabel=plot.unit, ylabel="ms", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        if measured:
            axis.legend(fontsize="small")
    for axis in axes.flat[len(PLOTS) :]:
        axis.axis("off")
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / "growth.svg", metadata={"Date": None})
    pyplot.close(figure)
    (FOLDER / "growth.md").write_text(_page(known, rows), encoding="utf-8")


def _draw(axis: Any, plot: Plot, dtype: str, found: dict[str, Any]) -> str:
    """Points, the fitted law, and the bound below; returns the law's row for the page."""
    points, colour = found["points"], COLOURS[dtype]
    x, y = [plot.x(point) for point in points], [plot.y(point) for point in points]
    law = fit(x, y, plot.powers)
    bounds = [(point["weights"] + point["cache"]) / found["bandwidth"] for point in points]
    if plot.y is _step:
        ends = [[1e3 * point[end] for point in points] for end in ("step_least", "step_most")]
        axis.vlines(x, *ends, color=colour, alpha=0.4)
    axis.plot(x, [1e3 * value for value in y], "o", color=colour, label=f"{dtype}, median and spread")
    line = np.linspace(0, max(x), 200)
    axis.plot(line, 1e3 * law.at(line), "-", color=colour, label=f"{plot.law} (±{law.typical:.1%})")
    if plot.bound:
        axis.plot(x, [1e3 * value for value in bounds], ":", color=colour, label="what it reads / bandwidth")
    terms = [
        f"{1e3 * factor:.3g}" + {0: " ms", 1: " ms · x", 2: " ms · x²"}[power]
        for power, factor in zip(law.powers, law.factors, strict=True)
    ]
    shares = [bound / value for bound, value in zip(bounds, y, strict=True)]
    share = f"{min(shares):.0%} to {max(shares):.0%}" if plot.bound else ""
    return (
        f"| {plot.title} | {dtype} | {plot.law} | {' + '.join(terms)} | {law.typical:.1%} | {law.worst:.1%} | {share} |"
    )


def _page(known: dict[str, Any], laws: list[str]) -> str:
    machine = known.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    speeds = [found["bandwidth"] / 1e9 for part in known.get("parts", {}).values() for found in part.values()]
    lines = [
        "# How time grows",
        "",
        "Written by `python -m benchmarks.growth`; its docstring says how to measure again. Random weights of GPT-2's"
        " shapes (int8 in blocks of 128, without calibration), random prompts, greedy, the product's own loop. Points"
        " are medians over rounds in which all points of a plot take turns, bars reach from the fastest to the slowest round. A law's factors are fitted to the"
        " points (least squares of relative distances); dotted is what reading a step's weights, keys and values would"
        " take at the machine's read bandwidth, measured in the same rounds. Shares above 100 % say that this isn't"
        " the memory's limit: NumPy doesn't reach it in every round, and caches keep a part of small networks.",
        "",
        f"{machine.get('processor', '')}, {machine.get('cores', '')} cores, {machine.get('system', '')}; {versions};"
        f" {min(speeds, default=0):.1f} to {max(speeds, default=0):.1f} GB/s read.",
        "",
        "![Five plots with laws](growth.svg)",
        "",
        "| | | law | fitted, x as in the plot | points off the law: rms | worst | of it reading |",
        "|---|---|---|---|---:|---:|---:|",
        *laws,
    ]
    for part in PARTS:
        for dtype, found in known.get("parts", {}).get(part, {}).items():
            lines += ["", f"## {part.capitalize()}, {dtype}", "", *_table(part, found)]
    return "\n".join(lines) + "\n"


def _table(part: str, found: dict[str, Any]) -> list[str]:
    first = {"context": "context", "batch": "batch", "vocabulary": "entries", "size": "parameters"}[part]
    lines = [f"| {first} | step, ms | fastest to slowest | tokens/s | prefill, ms | reads, MB |", "|" + "---:|" * 6]
    for point in found["points"]:
        x = f"{point['parameters'] / 1e6:,.0f} M" if part == "size" else f"{point['x']:,.0f}"
        lines.append(
            f"| {x} | {1e3 * point['step']:.2f} | {1e3 * point['step_least']:.2f} to {1e3 * point['step_most']:.2f}"
            f" | {point['batch'] / point['step']:,.1f} | {1e3 * point['prefill']:.1f}"
            f" | {(point['weights'] + point['cache']) / 1e6:,.0f} |"
        )
    return lines
