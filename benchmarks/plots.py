"""The report's plots, as SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .figures import Run

# Text stays text, and the same figures give the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gpt2onnx", "font.size": 9, "axes.spines.top": False}
mpl.rcParams |= {"axes.spines.right": False, "legend.frameon": False, "font.family": "sans-serif"}

# One colour a peer on every plot; ours stands out.
COLOURS = {
    "gpt2onnx": "#d1495b", "llama.cpp": "#30638e", "OpenVINO": "#edae49", "transformers": "#777777",
    "optimum": "#b0a8b9", "CTranslate2": "#66a182", "onnxruntime-genai": "#8d6a9f",
}  # fmt: skip


def draw(run: Run, folder: Path) -> list[tuple[str, str]]:
    """Writes the plots that the figures allow; returns (file name, title) of each."""
    batches = {int(name.split()[1]): name for name in run.scenarios if name.startswith("batch ")}
    drawn = []
    if "batch 1" in run.scenarios:
        drawn.append(_bars(run, folder, "speed.svg", "Tokens a second: batch 1, prompt of 32, 128 new"))
    if "context" in run.scenarios:
        lines = {family: _by_context(run, family) for family in run.families}
        title = "Decoding against the length of the text"
        drawn.append(_panels(lines, folder, "context.svg", title, "tokens in the context"))
    if len(batches) > 1:
        lines = {family: _by_batch(run, family, batches) for family in run.families}
        drawn.append(
            _panels(lines, folder, "batch.svg", "Tokens a second of all prompts against their number", "prompts")
        )
    return drawn


Lines = dict[str, list[tuple[int, float]]]  # contender -> points


def _by_context(run: Run, family: str) -> Lines:
    part = run.part(family, "context")
    if part is None:
        return {}
    lengths = {int(name.removeprefix("at ")): name for name in part.measures}
    return {
        name: [(length, measures[lengths[length]].median) for length in sorted(lengths)]
        for name, measures in part.figures.items()
    }


def _by_batch(run: Run, family: str, batches: dict[int, str]) -> Lines:
    lines: Lines = {}
    for size in sorted(batches):
        part = run.part(family, batches[size])
        for name, figures in part.first().items() if part else []:
            lines.setdefault(name, []).append((size, figures.median))
    return lines


def _colour(name: str) -> str:
    return COLOURS.get(name.split()[0], "#000000")


def _bars(run: Run, folder: Path, file: str, title: str) -> tuple[str, str]:
    """Bars of each class, fastest on top, with the limit by the memory's bandwidth."""
    groups = [(family, part) for family in run.families if (part := run.part(family, "batch 1")) and part.figures]
    count = sum(len(part.figures) + 1 for _, part in groups)
    figure, axes = plt.subplots(figsize=(8, 0.28 * count + 0.9), layout="constrained")
    height = 0.0
    labels: list[tuple[float, str]] = []
    for family, part in groups:
        axes.text(0, height, f"class {family}", weight="bold", va="center")
        for name, values in part.first().items():
            height -= 1
            ceiling = part.bandwidth.median / run.contenders[name]["read_bytes"]
            axes.barh(height, values.median, 0.7, color=_colour(name))
            axes.plot([values.low, values.high], [height, height], color="black", linewidth=1)
            axes.plot([ceiling, ceiling], [height - 0.42, height + 0.42], color="black", linewidth=1.5)
            axes.text(values.low, height, f"{values.median:.0f} ", va="center", ha="right", color="white")
            labels.append((height, name))
        height -= 1.4
    axes.set_yticks([at for at, _ in labels], [name for _, name in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height + 0.6, 0.8)
    axes.set_xlabel("tokens a second (thin line: spread; stroke: all of the read bandwidth spent on weights)")
    axes.set_title(title, loc="left")
    return _save(figure, folder, file, title)


def _panels(lines: dict[str, Lines], folder: Path, file: str, title: str, x: str) -> tuple[str, str]:
    """A panel for each class."""
    shown = {family: found for family, found in lines.items() if found}
    rows = -(-len(shown) // 2)
    figure, grid = plt.subplots(rows, min(2, len(shown)), figsize=(12, 3.2 * rows), layout="constrained", squeeze=False)
    panels: list[Axes] = list(grid.flat)
    for axes, (family, found) in zip(panels, shown.items(), strict=False):
        for name, points in found.items():
            dashed = name.endswith("pure") or (family == "16 bit" and name.endswith("int8"))
            style = ":" if name.endswith("cache") else "--" if dashed else "-"
            width = 2.4 if name.startswith("gpt2onnx") else 1.4
            axes.plot(*zip(*points, strict=True), style, color=_colour(name), marker="o", markersize=3, linewidth=width,
                      label=name)  # fmt: skip
        axes.set_title(f"class {family}", loc="left")
        axes.set_ylim(bottom=0)
        axes.set_xticks([at for at, _ in max(found.values(), key=len)])
        axes.set_xlabel(x)
        axes.set_ylabel("tokens a second")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in panels[len(shown) :]:
        axes.remove()
    figure.suptitle(title, x=0.01, ha="left")
    return _save(figure, folder, file, title)


def _save(figure: plt.Figure, folder: Path, file: str, title: str) -> tuple[str, str]:  # pyright: ignore[reportPrivateImportUsage]
    figure.savefig(folder / file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return file, title
