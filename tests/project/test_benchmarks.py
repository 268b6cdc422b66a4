"""benchmarks/ runs and reports, on a tiny model. No test asks how fast anything is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import CHECKPOINT, check_a_run, module, ours, succeed
from support.checkpoints import MakeCheckpoint

import gpt2onnx


@pytest.mark.system
def test_a_run_is_measured_resumed_and_reported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The peer is gpt2onnx once more: other runtimes aren't installed here."""
    bundle = gpt2onnx.export(make_checkpoint(**CHECKPOINT), tmp_path / "bundle", parity=False).folder
    check_a_run(bundle, ours(bundle, "peer") | {"slow": True}, tmp_path)


def figures(tmp_path: Path, ours: list[float], theirs: list[float]) -> Path:
    """A file of one scenario with these figures."""
    contender = {"families": ["fp32"], "version": "1", "note": "", "slow": False}
    contender |= {"read_bytes": 1000, "weights_bytes": 1000, "model_bytes": 1000}
    part: dict[str, Any] = {
        "family": "fp32", "scenario": "batch 1", "text": "Text.", "unit": "tokens/s", "measures": ["greedy"],
        "within": None, "bandwidth": [1e4, 4e4, 1e4], "finished": "2026-01-01T00:00:00+00:00", "commit": "abc1234",
        "figures": {"gpt2onnx": {"greedy": ours}, "peer": {"greedy": theirs}},
        "missing": {"other": "not offered"}, "same_tokens": {},
    }  # fmt: skip
    run = {"machine": {"processor": "P", "cores": 2, "system": "S"}, "threads": 2, "rounds": 3}
    run |= {"contenders": {name: contender | {"ours": name == "gpt2onnx"} for name in part["figures"]}, "parts": [part]}
    (tmp_path / "results.json").write_text(json.dumps(run))
    return tmp_path / "results.json"


def report(results: Path) -> str:
    succeed("report", str(results), "--no-plots")
    return (results.parent / "README.md").read_text()


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    page = report(figures(tmp_path, ours=[4.0, 40.0, 10.0], theirs=[1.0, 10.0, 40.0]))
    # 4 : 1, 40 : 10 and 10 : 40. The ratio of the medians would be 1, that of the means near it.
    assert "4.00 [0.25 to 4.00]" in page
    assert "4.00 peer" in page
    # 4 of 10, 40 of 40 and 10 of 10 tokens a second that the bandwidth of the round would allow.
    assert "| gpt2onnx | fp32 | 10.0 [4.00 to 40.0] |  | 100% |" in page
    assert "No peer is ahead" in page


def test_a_peer_that_is_ahead_is_named(tmp_path: Path) -> None:
    page = report(figures(tmp_path, ours=[5.0, 5.0, 5.0], theirs=[10.0, 20.0, 10.0]))
    assert "A peer is ahead in 1 of 1 comparisons" in page
    assert "gpt2onnx in batch 1, class fp32: 0.50 of peer" in page
    assert "| peer | **10.0** |" in page
    assert "Not measured: other: not offered." in page


def test_a_run_is_not_continued_otherwise(tmp_path: Path) -> None:
    results = figures(tmp_path, ours=[1.0] * 3, theirs=[1.0] * 3)
    refused = module("run", "--out", str(results), "--rounds", "1")
    assert refused.returncode == 1
    assert "begun with other --threads or --rounds" in refused.stderr


def test_what_is_prepared_can_be_listed_and_named(tmp_path: Path) -> None:
    names = succeed("prepare", "--list", "--work", str(tmp_path)).stdout.split()
    assert {"gpt2onnx", "transformers", "llama.cpp", "gpt2-q8_0.gguf", "gpt2onnx-int4-pure"} <= set(names)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    unknown = module("prepare", "llama")
    assert unknown.returncode == 2
    assert "unknown: llama" in unknown.stderr
