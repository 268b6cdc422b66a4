"""Scenarios: tasks that every contender gets."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .peers.worker import Task

VOCABULARY = 50256  # without the end token
RAGGED = [24 + (7 * i) % 17 for i in range(16)]  # lengths of a batch's prompts


@dataclass(frozen=True)
class Measure:
    """One figure of a scenario, in tokens a second.

    Attributes:
        name: as printed.
        task: to be timed.
        less: a task whose tokens and time are subtracted, such as the prompt's.
        prompt: count the prompt's tokens, not the new ones.
    """

    name: str
    task: Task
    less: Task | None = None
    prompt: bool = False


@dataclass(frozen=True)
class Scenario:
    """Figures taken in the same rounds.

    Attributes:
        name: as printed, and on the command line.
        text: its description in the report.
        measures: the first one ranks the contenders.
        classes: precision classes to measure; empty for all.
        within: two measures of the same contender whose ratio is reported, such as sampling to greedy.
    """

    name: str
    text: str
    measures: list[Measure]
    classes: tuple[str, ...] = ()
    within: tuple[str, str] | None = None


def scenarios() -> list[Scenario]:
    """All scenarios, always with the same prompts."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(length)]

    one, long = prompt(32), prompt(960)
    batch = [prompt(length) for length in RAGGED]
    passage = prompt(4)
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
    beam = Task([one], 32, num_beams=6, no_repeat_ngram_size=2)
    alone = Task([one], 64)
    return [
        Scenario("batch 1", "A prompt of 32 tokens, 128 new ones, greedy.", [Measure("greedy", Task([one], 128))]),
        *(
            Scenario(
                f"batch {size}",
                f"{size} prompts of {min(RAGGED[:size])} to {max(RAGGED[:size])} tokens, 32 new ones each.",
                [Measure("greedy", Task(batch[:size], 32))],
            )
            for size in (8, 16)
        ),
        Scenario("prefill 512", "Tokens of the prompt a second.", [Measure("prefill", Task([long[:512]], 1), prompt=True)]),
        Scenario("prefill 960", "Tokens of the prompt a second.", [Measure("prefill", Task([long], 1), prompt=True)]),
        Scenario(
            "context",
            "Decoding alone, without the prompt's time, behind a text of about 960, 512 and 32 tokens.",
            [_decode(960, long), _decode(512, long), _decode(32, long)],
            within=("at 960", "at 32"),
        ),
        Scenario(
            "beam 6", "A prompt of 32 tokens, 32 new ones, 6 beams, no 2-gram twice.", [Measure("beams", beam)],
            classes=("fp32", "int8"),
        ),
        Scenario(
            "sampling", "Temperature 0.8, top-k 50, top-p 0.95 and a seed; beside greedy decoding of the same number of tokens.",
            [Measure("sampled", replace(alone, sampling=sampling)), Measure("greedy", alone)],
            classes=("fp32", "int8", "int4"), within=("sampled", "greedy"),
        ),
        Scenario(
            "lookup, repetitive",
            "Drafts of up to 7 tokens copied from the text, which falls into a loop; beside decoding without drafts.",
            [Measure("lookup", Task([passage * 24], 96, prompt_lookup=7)), Measure("plain", Task([passage * 24], 96))],
            classes=("fp32", "int8", "int4"), within=("lookup", "plain"),
        ),
        Scenario(
            "lookup, not repetitive",
            "The same with a text that hardly repeats itself: drawn from the 1,000 likeliest tokens at temperature 10, one seed.",
            [
                Measure("lookup", Task([one], 64, prompt_lookup=7, sampling=_WILD)),
                Measure("plain", Task([one], 64, sampling=_WILD)),
            ],
            classes=("fp32", "int8", "int4"), within=("lookup", "plain"),
        ),
    ]  # fmt: skip


# Random weights tend to repeat the last token; at this temperature they don't.
_WILD = {"temperature": 10.0, "top_k": 1000, "top_p": 1.0, "seed": 1}


def _decode(context: int, text: list[int]) -> Measure:
    """Speed of the 64 tokens behind a text of this length; at 960 the text is cut to leave room for them."""
    prompt = [text[: min(context, 1024 - 65)]]
    return Measure(f"at {context}", Task(prompt, 65), less=Task(prompt, 1))


def shortened(measure: Measure) -> Measure:
    """The same with a quarter of the new tokens."""
    return replace(measure, task=replace(measure.task, new_tokens=1 + (measure.task.new_tokens - 1) // 4))


def varied(task: Task, step: int) -> Task:
    """The same with other tokens, and the same repetitions: some runtimes cache prompts."""
    return replace(task, prompts=[[(token + 101 * step) % VOCABULARY for token in row] for row in task.prompts])


def is_chosen(name: str, begins: list[str]) -> bool:
    """Whether a name begins with one of these; true if there are none."""
    return not begins or name.startswith(tuple(begins))


def chosen(begins: list[str]) -> Iterator[Scenario]:
    """Scenarios by the beginnings of their names; all without any."""
    return (each for each in scenarios() if is_chosen(each.name, begins))
