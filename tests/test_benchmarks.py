"""The harness of benchmarks/ runs and reports, on a tiny model and with the peers at hand. No test asks how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint

import gpt2onnx

REPOSITORY = Path(__file__).parents[1]
SCENARIOS = ["batch 8", "context", "sampling"]
PROCESSES = ["cold start", "memory"]


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def succeed(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = module(name, *arguments)
    assert done.returncode == 0, f"{name} failed:\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def contenders(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """gpt2onnx, a peer that isn't installed, and transformers, on one checkpoint that is long enough for all prompts."""
    checkpoint = make_checkpoint(vocab_size=50257, n_positions=1024, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    bundle = tmp_path_factory.mktemp("contenders") / "bundle"
    gpt2onnx.export(checkpoint, bundle, parity=False)
    ours = {"name": "gpt2onnx", "driver": "gpt2onnx_peer", "model": str(bundle), "cold": True}
    ours["weights"] = str(bundle / "onnx" / "model.onnx_data")
    absent = {"name": "absent", "driver": "no_such_peer", "model": "", "weights": ""}
    peer = {"name": "transformers", "driver": "transformers_peer", "model": str(checkpoint), "slow": True}
    peer["weights"] = str(checkpoint / "model.safetensors")
    common = {"family": "fp32", "precision": "fp32", "python": sys.executable}
    return [common | each for each in (ours, absent, peer)]


def test_a_run_is_measured_resumed_and_reported(contenders: list[dict[str, Any]], tmp_path: Path) -> None:
    results, list_of_two, list_of_all = tmp_path / "results.json", tmp_path / "two.json", tmp_path / "all.json"
    list_of_two.write_text(json.dumps(contenders[:2]))
    list_of_all.write_text(json.dumps(contenders))
    options = ["--rounds", "1", "--threads", "1", "--out", str(results), "--contenders"]
    first = succeed("run", *options, str(list_of_two), "--scenarios", "cold", "mem")
    assert "absent: left out: its process ended: ModuleNotFoundError" in first.stderr
    before = json.loads(results.read_text())
    succeed("run", *options, str(list_of_all), "--scenarios", *SCENARIOS, *PROCESSES)
    run = json.loads(results.read_text())
    assert run["parts"][:2] == before["parts"], "what had been measured was measured again"
    assert [part["scenario"] for part in run["parts"]] == [*PROCESSES, *SCENARIOS]
    for part in run["parts"]:
        assert part["missing"] == {}
        names = {"gpt2onnx"} if part["scenario"] in PROCESSES else {"gpt2onnx", "transformers"}
        assert set(part["figures"]) == names
        for measures in part["figures"].values():
            assert set(part["measures"]) <= set(measures)
            assert all(len(values) == 1 and values[0] > 0 for values in measures.values())
        assert len(set(part["same_tokens"].values())) <= 1, f"other tokens than in transformers: {part}"
    assert run["parts"][2]["same_tokens"] == {"gpt2onnx": "8/8", "transformers": "8/8"}
    facts = run["contenders"]["transformers"]
    assert facts["read_bytes"] == facts["weights_bytes"] == Path(contenders[2]["weights"]).stat().st_size

    succeed("report", str(results))
    page = (tmp_path / "README.md").read_text()
    for scenario in SCENARIOS:
        assert f"### {scenario}\n" in page
    assert "Resident memory at most" in page
    assert "](context.svg)" in page
    assert "</svg>" in (tmp_path / "context.svg").read_text()


def figures(tmp_path: Path, ours: list[float], theirs: list[float]) -> str:
    """The report of one scenario with these figures."""
    contender = {"families": ["fp32"], "version": "1", "note": "", "slow": False}
    contender |= {"read_bytes": 1000, "weights_bytes": 1000, "model_bytes": 1000}
    part: dict[str, Any] = {
        "family": "fp32", "scenario": "batch 1", "text": "Text.", "unit": "tokens/s", "measures": ["greedy"],
        "within": None, "bandwidth": [1e4, 4e4, 1e4], "finished": "2026-01-01T00:00:00+00:00",
        "figures": {"gpt2onnx": {"greedy": ours}, "peer": {"greedy": theirs}},
        "missing": {"other": "not offered"}, "same_tokens": {},
    }  # fmt: skip
    run = {"machine": {"processor": "P", "cores": 2, "system": "S", "commit": "c"}, "threads": 2, "rounds": 3}
    run |= {"contenders": {name: contender | {"ours": name == "gpt2onnx"} for name in part["figures"]}, "parts": [part]}
    (tmp_path / "results.json").write_text(json.dumps(run))
    succeed("report", str(tmp_path / "results.json"), "--no-plots")
    return (tmp_path / "README.md").read_text()


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    page = figures(tmp_path, ours=[4.0, 40.0, 10.0], theirs=[1.0, 10.0, 40.0])
    # 4 : 1, 40 : 10 and 10 : 40. The ratio of the medians would be 1, that of the means near it.
    assert "4.00 [0.25 to 4.00]" in page
    assert "4.00 peer" in page
    # 4 of 10, 40 of 40 and 10 of 10 tokens a second that the bandwidth of the round would allow.
    assert "| gpt2onnx | fp32 | 10.0 [4.00 to 40.0] |  | 100% |" in page
    assert "No peer is ahead" in page


def test_a_peer_that_is_ahead_is_named(tmp_path: Path) -> None:
    page = figures(tmp_path, ours=[5.0, 5.0, 5.0], theirs=[10.0, 20.0, 10.0])
    assert "A peer is ahead in 1 of 1 comparisons" in page
    assert "gpt2onnx in batch 1, class fp32: 0.50 of peer" in page
    assert "| peer | **10.0** |" in page
    assert "Not measured: other: not offered." in page


def test_a_run_is_not_continued_otherwise(tmp_path: Path) -> None:
    figures(tmp_path, ours=[1.0] * 3, theirs=[1.0] * 3)
    refused = module("run", "--out", str(tmp_path / "results.json"), "--rounds", "1")
    assert refused.returncode == 1
    assert "begun with other --threads or --rounds" in refused.stderr


def test_what_is_prepared_can_be_listed_and_named(tmp_path: Path) -> None:
    names = succeed("prepare", "--list", "--work", str(tmp_path)).stdout.split()
    assert {"gpt2onnx", "transformers", "llama.cpp", "gpt2-q8_0.gguf", "gpt2onnx-int4-pure"} <= set(names)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    unknown = module("prepare", "llama")
    assert unknown.returncode == 2
    assert "unknown: llama" in unknown.stderr
