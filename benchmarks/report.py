"""Report in Markdown with plots, from the figures alone: `python -m benchmarks.report results.json`.

Writes README.md beside the figures.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .environments import REPOSITORY
from .figures import Part, Run, Spread
from .run import COLD, MEMORY, RESULTS

HOW = """\
All contenders get the same checkpoint (GPT-2's shape of 124 M parameters, random weights), the same token ids, {threads} threads
and the same task. Each has its own process and environment. A round runs each contender once, in turn, while the others are
stopped; one warm-up round is followed by {rounds} that count. Figures are medians, with the lowest and highest in brackets. Ratios are
medians of the rounds' ratios: above 1 gpt2onnx is ahead, below 1 the peer. Read bandwidth is measured in every round. Every round
has its own prompts, of the same lengths, since some runtimes cache prompts.

Speed doesn't depend on the values of weights, with two exceptions. In int8 and int4 gpt2onnx chooses the operators for prompts and
batches by the activation statistics, and a network with strong outliers keeps slower ones. It opens
[the second graph]({export}#the-second-graph), which has the faster operators, while it runs, as in any process: that time counts, and
earlier rounds, in batch 8, run without it. In fp32 its [twin]({export}#the-twin) drafts tokens after the first 48. How many of them
are right depends on the network: 0.94 with these random weights, 0.98 of a trained network's. "of the bandwidth" counts fp32's
weights once a token, which drafting reads less often.

    python -m benchmarks.prepare
    python -m benchmarks.run
    python -m benchmarks.report docs/benchmarks/results.json
"""
# What decides about the speed of products, the most first.
EXTENSIONS = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}


NONE = "\N{EN DASH}"


def report(run: Run, plots: list[tuple[str, str]]) -> str:
    """The whole page. `plots` are (file name, title)."""
    extensions = [name for flag, name in EXTENSIONS.items() if flag in run.machine.get("extensions", [])]
    blocks = [" with ".join(["# Benchmarks", *extensions[:1]]), *_about(run), "## In short", *_short(run)]
    blocks += [f"![{title}]({name})" for name, title in plots]
    blocks += ["## Scenario by scenario", *_scenarios(run)]
    blocks += ["## Whole processes", *_processes(run), "## Who was compared", *_contenders(run)]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Spread) -> str:
    """Median [lowest to highest]."""
    return f"{number(values.median)} [{number(values.low)} to {number(values.high)}]"


def _about(run: Run) -> Iterator[str]:
    facts, bandwidth = run.machine, run.bandwidth()
    days = sorted({moment[:10] for moment in run.finished})
    extensions = f" ({', '.join(facts['extensions'])})" if facts.get("extensions") else ""
    memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB of memory" if "memory_bytes" in facts else ""
    export = Path(os.path.relpath(REPOSITORY / "docs" / "export.md", run.folder)).as_posix()
    yield HOW.format(threads=run.threads, rounds=run.rounds, export=export)
    yield (
        f"Measured {' to '.join(dict.fromkeys([days[0], days[-1]]))} on {facts['processor']}{extensions}, {facts['cores']} "
        f"cores{memory}, {facts['system']}; {_commits(run)}. It read "
        f"{bandwidth.median / 1e9:.1f} GB/s ({bandwidth.low / 1e9:.1f} to {bandwidth.high / 1e9:.1f})."
    )


def _commits(run: Run) -> str:
    """The commit of most scenarios, and of the others."""
    most = Counter(run.commits.values()).most_common(1)[0][0]
    others = "".join(f", {scenario} {commit}" for scenario, commit in run.commits.items() if commit != most)
    return f"commit {most or 'unknown'}{others}"


def _short(run: Run) -> Iterator[str]:
    yield "Tokens a second, the fastest of each class in bold; a dash if a peer doesn't offer it or wasn't measured."
    rows = []
    for family in run.families:
        parts = [run.part(family, scenario) for scenario in run.scenarios]
        names = dict.fromkeys(name for part in parts if part for name in part.figures)
        for name in names:
            row = [f"{name} ({family})" if len(run.contenders[name]["families"]) > 1 else name]
            for part in parts:
                ranked = part.first() if part else {}
                text = number(ranked[name].median) if name in ranked else NONE
                row.append(f"**{text}**" if name in ranked and name == next(iter(ranked)) else text)
            rows.append(row)
    yield table(["", *(_head(scenario, run) for scenario in run.scenarios)], rows)
    yield (
        "gpt2onnx against the best peer of its class, in the same rounds. It has no 16-bit arithmetic on the CPU: its fp32 "
        "and int8 stand in that class."
    )
    found: dict[tuple[str, str], dict[str, str]] = {}
    behind, ahead = [], 0
    for part, name, peer, ratio in run.against_best():
        found.setdefault((part.family, name), {})[part.scenario] = f"{ratio.median:.2f} {_short_name(peer)}"
        if ratio.median < 1:
            behind.append(
                (ratio.median, f"{name} in {part.scenario}, class {part.family}: {ratio.median:.2f} of {peer}")
            )
        else:
            ahead += 1
    scenarios = [each for each in run.scenarios if any(each in row for row in found.values())]
    rows = [
        [f"{name}, class {family}", *(row.get(scenario, NONE) for scenario in scenarios)]
        for (family, name), row in found.items()
    ]
    if rows:
        yield table(["", *(_head(scenario, run) for scenario in scenarios)], rows)
    if behind:
        yield f"A peer is ahead in {len(behind)} of {len(behind) + ahead} comparisons:"
        yield "\n".join(f"- {text}" for _, text in sorted(behind))
    elif ahead:
        yield f"No peer is ahead in any of the {ahead} comparisons."


def _head(scenario: str, run: Run) -> str:
    """A scenario's name, with its ranking measure if it has several."""
    part = next(part for part in run.parts if part.scenario == scenario)
    return f"{scenario} {part.measures[0]}" if scenario == "context" else scenario


def _short_name(peer: str) -> str:
    return peer.split()[0]


def _scenarios(run: Run) -> Iterator[str]:
    for scenario in run.scenarios:
        parts = [part for family in run.families if (part := run.part(family, scenario))]
        yield f"### {scenario}"
        yield parts[0].text
        yield table(_columns(parts[0]), [row for part in parts for row in _rows(run, part)])
        left = {f"{name}: {why}": None for part in parts for name, why in part.missing.items()}
        if left:
            yield f"Not measured: {'; '.join(left)}."


def _columns(part: Part) -> list[str]:
    columns = ["", "class", *part.measures]
    if part.within:
        columns.append(f"{part.within[0]} : {part.within[1]}")
    columns.append("gpt2onnx : it")
    if part.scenario == "batch 1":
        columns.append("share of read bandwidth")
    return [*columns, "same tokens"] if part.same_tokens else columns


def _rows(run: Run, part: Part) -> Iterator[list[str]]:
    ranked = part.first()
    ours = run.ours({name: ranked[name] for name in part.figures})
    for name in part.figures:
        measures = part.figures[name]
        row = [name, part.family, *(spread(measures[measure]) for measure in part.measures)]
        if part.within:
            row.append(_ratio(measures[part.within[0]].over(measures[part.within[1]])))
        row.append(_ratio(ranked[ours[0]].over(ranked[name])) if ours and name != ours[0] else "")
        if part.scenario == "batch 1":
            needed = Spread([rate * run.contenders[name]["read_bytes"] for rate in ranked[name].values])
            row.append(f"{needed.over(part.bandwidth).median:.0%}")
        yield [*row, part.same_tokens.get(name, "")] if part.same_tokens else row


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f} to {ratio.high:.2f}]"


def _processes(run: Run) -> Iterator[str]:
    cold, memory = run.process(COLD), run.process(MEMORY)
    if cold and cold.figures:
        yield (
            "Seconds from a process's start to its first token and to its end; text in, text out, files in the page cache. "
            "Ours is the command `generate`, a peer a script of a few lines."
        )
        ours = next((name for name in cold.figures if run.contenders[name]["ours"]), None)
        rows = []
        for name, measures in sorted(cold.figures.items(), key=lambda item: item[1]["first token"].median):
            ratio = measures["first token"].over(cold.figures[ours]["first token"]) if ours and name != ours else None
            rows.append([name, *(spread(measures[m]) for m in cold.measures), _ratio(ratio) if ratio else ""])
        yield table(["", *cold.measures, "it : gpt2onnx"], rows)
        if cold.missing:
            yield f"Not measured: {'; '.join(f'{name}: {why}' for name, why in cold.missing.items())}."
    if memory and memory.figures:
        yield (
            "Peak resident memory, MB, of a process that has loaded its model and written 128 tokens after 32, and its part "
            "outside mapped files. Then the size on disk of the environment's packages and of the model, MB."
        )
        yield table(
            ["", "peak", "not mapped", "peak beyond the weights", "packages", "model"], list(_sizes(run, memory))
        )


def _sizes(run: Run, memory: Part) -> Iterator[list[str]]:
    for name, measures in memory.figures.items():
        facts, peak = run.contenders[name], measures["peak"].median
        anonymous = _megabytes(measures["anonymous"].median) if "anonymous" in measures else ""
        packages = _megabytes(facts["environment_bytes"]) if "environment_bytes" in facts else ""
        beyond = _megabytes(peak - facts["weights_bytes"])
        yield [name, _megabytes(peak), anonymous, beyond, packages, _megabytes(facts["model_bytes"])]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def _contenders(run: Run) -> Iterator[str]:
    yield (
        "Share of read bandwidth: bytes of weights read for a token times tokens a second, by the bandwidth of that round. "
        "The bytes are those of the weights' file, without a second copy of the embedding; half of it if fp32 is held as bf16. "
        "Same tokens: prompts "
        "with the same tokens as from gpt2onnx of that class, to be expected in fp32 only. Slow: it wrote a quarter of the "
        "tokens in scenarios that compare a contender with itself; rates are compared."
    )
    rows = []
    for name, facts in run.contenders.items():
        notes = [facts["note"], "slow" if facts["slow"] else ""]
        classes = ", ".join(facts["families"])
        rows.append([name, classes, facts["version"], "; ".join(filter(None, notes)), _megabytes(facts["read_bytes"])])
    yield table(["", "class", "version", "", "MB read a token"], rows).replace("---:", "---", 3)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="(%(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="tables only: needs no matplotlib")
    arguments = parser.parse_args()
    run = Run(arguments.results)
    plots = []
    if not arguments.no_plots:
        from .plots import draw

        plots = draw(run, arguments.results.parent)
    page = arguments.results.with_name("README.md")
    page.write_text(report(run, plots))
    print(page)


if __name__ == "__main__":
    main()
