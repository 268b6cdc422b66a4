"""Runs benchmarks/ on contenders that a test names."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import REPOSITORY

SCENARIOS = ["batch 8", "context", "sampling"]
PROCESSES = ["cold start", "memory"]
# Its context is long enough for all prompts.
CHECKPOINT: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": None,
}  # fmt: skip


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def succeed(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = module(name, *arguments)
    assert done.returncode == 0, f"{name} failed:\n{done.stderr[-4000:]}"
    return done


def contender(name: str, driver: str, model: Path, weights: Path) -> dict[str, Any]:
    """One in fp32, in this environment."""
    return {
        "name": name, "family": "fp32", "precision": "fp32", "python": sys.executable, "driver": driver,
        "model": str(model), "weights": str(weights),
    }  # fmt: skip


def ours(bundle: Path, name: str = "gpt2onnx") -> dict[str, Any]:
    """gpt2onnx itself."""
    return contender(name, "gpt2onnx_peer", bundle, bundle / "onnx" / "model.onnx_data")


def check_a_run(bundle: Path, peer: dict[str, Any], folder: Path) -> None:
    """Measures gpt2onnx, a peer that isn't installed, and a peer: figures are kept and reported."""
    results, list_of_two, list_of_all = folder / "results.json", folder / "two.json", folder / "all.json"
    contenders = [ours(bundle) | {"cold": True}, contender("absent", "no_such_peer", Path(), Path()), peer]
    list_of_two.write_text(json.dumps(contenders[:2]))
    list_of_all.write_text(json.dumps(contenders))
    options = ["--rounds", "1", "--threads", "1", "--out", str(results), "--contenders"]
    first = succeed("run", *options, str(list_of_two), "--scenarios", "cold", "mem")
    assert "absent: left out: its process ended: ModuleNotFoundError" in first.stderr
    before = json.loads(results.read_text())
    succeed("run", *options, str(list_of_all), "--scenarios", *SCENARIOS, *PROCESSES)
    run = json.loads(results.read_text())
    assert run["parts"][:2] == before["parts"], "a saved part was measured again"
    assert [part["scenario"] for part in run["parts"]] == [*PROCESSES, *SCENARIOS]
    for part in run["parts"]:
        assert part["missing"] == {}
        names = {"gpt2onnx"} if part["scenario"] in PROCESSES else {"gpt2onnx", peer["name"]}
        assert set(part["figures"]) == names
        for measures in part["figures"].values():
            assert set(part["measures"]) <= set(measures)
            assert all(len(values) == 1 and values[0] > 0 for values in measures.values())
        assert len(set(part["same_tokens"].values())) <= 1, f"other tokens than in {peer['name']}: {part}"
    assert run["parts"][2]["same_tokens"] == {"gpt2onnx": "8/8", peer["name"]: "8/8"}
    facts = run["contenders"][peer["name"]]
    assert facts["read_bytes"] == facts["weights_bytes"] == Path(peer["weights"]).stat().st_size

    succeed("report", str(results))
    page = (folder / "README.md").read_text()
    for scenario in SCENARIOS:
        assert f"### {scenario}\n" in page
    assert "Peak resident memory" in page
    assert "](context.svg)" in page
    assert "</svg>" in (folder / "context.svg").read_text()
