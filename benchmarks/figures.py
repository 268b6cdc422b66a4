"""Figures of a run: medians, spreads, and ratios round by round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Figures of all rounds."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """Ratios round by round: a disturbed round slows down both figures."""
        return Spread([mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)])


@dataclass(frozen=True)
class Part:
    """One scenario of one class of precision.

    Attributes:
        figures: by contender, then by measure.
        missing: by contender, the reason that it has no figures.
        bandwidth: bytes a second, by round.
        same_tokens: by contender, number of prompts with the same tokens as from gpt2onnx.
    """

    family: str
    scenario: str
    text: str
    unit: str
    measures: list[str]
    within: tuple[str, str] | None
    figures: dict[str, dict[str, Spread]]
    missing: dict[str, str]
    bandwidth: Spread
    same_tokens: dict[str, str]

    def first(self) -> dict[str, Spread]:
        """The measure that ranks contenders, best first."""
        found = {name: measures[self.measures[0]] for name, measures in self.figures.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1].median))


class Run:
    """All figures of one run."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.folder = path.parent
        self.machine: dict[str, Any] = content["machine"]
        self.threads: int = content["threads"]
        self.rounds: int = content["rounds"]
        self.contenders: dict[str, dict[str, Any]] = content["contenders"]
        self.finished = sorted(part["finished"] for part in content["parts"])
        self.commits = {part["scenario"]: part["commit"] for part in content["parts"]}
        self.parts = [_part(each) for each in content["parts"]]
        self.families = list(dict.fromkeys(part.family for part in self.parts if part.unit == "tokens/s"))
        self.scenarios = list(dict.fromkeys(part.scenario for part in self.parts if part.unit == "tokens/s"))

    def part(self, family: str, scenario: str) -> Part | None:
        return next((each for each in self.parts if (each.family, each.scenario) == (family, scenario)), None)

    def process(self, scenario: str) -> Part | None:
        return self.part("processes", scenario)

    def ours(self, names: dict[str, Spread]) -> list[str]:
        return [name for name in names if self.contenders[name]["ours"]]

    def best_peer(self, part: Part) -> str | None:
        """The fastest contender that isn't gpt2onnx."""
        return next((name for name in part.first() if not self.contenders[name]["ours"]), None)

    def against_best(self) -> Iterator[tuple[Part, str, str, Spread]]:
        """For each part and each of gpt2onnx's contenders: the best peer, and the ratio."""
        for part in self.parts:
            peer = self.best_peer(part) if part.unit == "tokens/s" else None
            for name in self.ours(part.first()) if peer else []:
                yield part, name, str(peer), part.first()[name].over(part.first()[str(peer)])

    def bandwidth(self) -> Spread:
        """Bytes a second over the whole run."""
        return Spread([value for part in self.parts for value in part.bandwidth.values] or [float("nan")])


def _part(found: dict[str, Any]) -> Part:
    figures = {
        name: {measure: Spread(values) for measure, values in measures.items()}
        for name, measures in found["figures"].items()
    }
    return Part(
        family=found["family"], scenario=found["scenario"], text=found["text"], unit=found["unit"],
        measures=found["measures"], within=tuple(found["within"]) if found["within"] else None, figures=figures,
        missing=found["missing"], bandwidth=Spread(found["bandwidth"]), same_tokens=found["same_tokens"],
    )  # fmt: skip
