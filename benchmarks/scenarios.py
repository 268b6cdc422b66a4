"""What is measured: tasks, given to every contender alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .peers.worker import Task

VOCABULARY = 50256  # without the end of the text
RAGGED = [24 + (7 * i) % 17 for i in range(16)]  # lengths of a batch's prompts


@dataclass(frozen=True)
class Measure:
    """One figure of a scenario, in tokens a second.

    Attributes:
        name: as printed.
        task: what is timed.
        less: a task whose tokens and time are taken off, so that only the rest of `task` is judged.
        prompt: count the prompt's tokens, instead of the new ones.
    """

    name: str
    task: Task
    less: Task | None = None
    prompt: bool = False


@dataclass(frozen=True)
class Scenario:
    """Figures that are taken in the same rounds.

    Attributes:
        name: as printed, and as named on the command line.
        text: what it is, for the report.
        measures: the first is what contenders are ranked by.
        classes: precision classes that are measured; empty for all.
        within: measures whose ratio a contender is asked for by itself, such as sampling to greedy.
    """

    name: str
    text: str
    measures: list[Measure]
    classes: tuple[str, ...] = ()
    within: tuple[str, str] | None = None


def scenarios() -> list[Scenario]:
    """All of them, always with the same prompts."""
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
            "Decoding alone, without the prompt's time, where the text has about so many tokens already.",
            [_decode(960, long), _decode(512, long), _decode(32, long)],
            within=("at 960", "at 32"),
        ),
        Scenario(
            "beam 6", "A prompt of 32 tokens, 32 new ones, 6 beams, no 2-gram twice.", [Measure("beams", beam)],
            classes=("fp32", "int8"),
        ),
        Scenario(
            "sampling", "Temperature 0.8, top-k 50, top-p 0.95 and a seed; beside greedy decoding of as many tokens.",
            [Measure("sampled", replace(alone, sampling=sampling)), Measure("greedy", alone)],
            classes=("fp32", "int8", "int4"), within=("sampled", "greedy"),
        ),
        Scenario(
            "lookup, repetitive",
            "Drafts of up to 7 tokens copied from the text, which falls into a loop; beside plain decoding of the same.",
            [Measure("lookup", Task([passage * 24], 96, prompt_lookup=7)), Measure("plain", Task([passage * 24], 96))],
            classes=("fp32", "int8", "int4"), within=("lookup", "plain"),
        ),
        Scenario(
            "lookup, not repetitive",
            "The same where the text hardly repeats itself: drawn from the 1,000 likeliest at temperature 10 with one seed.",
            [
                Measure("lookup", Task([one], 64, prompt_lookup=7, sampling=_WILD)),
                Measure("plain", Task([one], 64, sampling=_WILD)),
            ],
            classes=("fp32", "int8", "int4"), within=("lookup", "plain"),
        ),
    ]  # fmt: skip


# Random weights like to repeat the last token: only so hot do they write something else.
_WILD = {"temperature": 10.0, "top_k": 1000, "top_p": 1.0, "seed": 1}


def _decode(context: int, text: list[int]) -> Measure:
    """Speed of 64 tokens that follow a text of that length; at 960, what is left of the window."""
    prompt = [text[: min(context, 1024 - 65)]]
    return Measure(f"at {context}", Task(prompt, 65), less=Task(prompt, 1))


def shortened(measure: Measure) -> Measure:
    """The same with a quarter of the new tokens."""
    return replace(measure, task=replace(measure.task, new_tokens=1 + (measure.task.new_tokens - 1) // 4))


def varied(task: Task, step: int) -> Task:
    """The same with other tokens, repeating themselves where it does: some runtimes keep prompts that they have seen."""
    return replace(task, prompts=[[(token + 101 * step) % VOCABULARY for token in row] for row in task.prompts])


def is_chosen(name: str, begins: list[str]) -> bool:
    """Whether a name begins as one of these; any does where there are none."""
    return not begins or name.startswith(tuple(begins))


def chosen(begins: list[str]) -> Iterator[Scenario]:
    """Scenarios whose names begin so; all where none is named."""
    return (each for each in scenarios() if is_chosen(each.name, begins))
