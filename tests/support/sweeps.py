"""A small sweep, and what it leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpt2onnx
from gpt2onnx.experiments import grid, sweep

PROMPT = "Once upon a time"
SMALL = """
[options]
max_new_tokens = 8
seed = 3

[[strategy]]
name = "greedy"

[[strategy]]
name = "beam search"
num_beams = [2, 4]

[[strategy]]
name = "top-p"
top_p = [0.5, 0.9]

[[strategy]]
name = "several"
do_sample = true
num_return_sequences = 2
"""
Record = dict[str, Any]
TIMED = ("seconds", "tokens_per_second", "energy", "emissions")


def make(model: gpt2onnx.Model, grid_file: Path, *prompts: str) -> sweep.Sweep:
    return sweep.Sweep(model, prompts, grid.load(grid_file, model.generation_config).strategies)


def untimed(records: Sequence[Record]) -> list[Record]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in records]


def load_records(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
