"""The portable graph, which optimum traced, against the fused one, which is written here."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers
import pytest
from conftest import MakeCheckpoint, assert_same_tokens
from test_graph import assert_matches_pytorch

import gpt2onnx
from gpt2onnx.errors import MissingExtraError
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.runtime.session import Session

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"n_embd": 60, "n_head": 5, "n_inner": 50, "vocab_size": 97, "tie_word_embeddings": False, "n_layer": 3}
    | {"activation_function": "quick_gelu", "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> dict[str, tuple[Path, Path]]:
    """Each configuration's checkpoint and its portable bundle, made where optimum is installed."""
    interpreter, made = peers.python(), {}
    for name, config in CONFIGS.items():
        checkpoint, folder = make_checkpoint(**config), tmp_path_factory.mktemp("portable") / name
        command = [
            str(interpreter),
            "-m",
            "gpt2onnx",
            "export",
            str(checkpoint),
            str(folder),
            "--graph",
            "portable",
            "--no-parity",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made[name] = (checkpoint, folder)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_portable_logits_are_those_of_pytorch(name: str, exports: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, folder = exports[name]
    assert Bundle.open(folder).manifest.graph == "portable"
    assert_matches_pytorch(folder, checkpoint)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_portable_logits_agree(name: str, exports: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, folder = exports[name]
    fused = gpt2onnx.export(checkpoint, tmp_path / "fused")
    tokens = np.random.default_rng(3).integers(fused.config.vocab_size, size=(1, 40))
    logits = []
    for opened in (fused, Bundle.open(folder)):
        session = Session(opened, threads=1)
        logits.append(session.forward(session.new_cache(1, 40), slice(0, 1), tokens, keep=40).copy())
    difference = np.abs(logits[0] - logits[1]).max()
    assert difference <= 1e-4, f"logits differ by up to {difference:.3g}"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5, "temperature": 0.9}])
def test_fused_and_portable_bundles_generate_the_same(
    options: dict[str, Any], exports: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, folder = exports["plain"]
    gpt2onnx.export(checkpoint, tmp_path / "fused")
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8]]
    fused, portable = (
        gpt2onnx.load(each, threads=1).generate(prompts, max_new_tokens=16, **options)
        for each in (tmp_path / "fused", folder)
    )
    for one, other in zip(portable, fused, strict=True):
        assert_same_tokens(one.sequences[0].token_ids, other.sequences[0].token_ids, options)


def test_portable_graph_has_standard_operators_only(exports: dict[str, tuple[Path, Path]]) -> None:
    model = onnx.load(exports["plain"][1] / bundle.GRAPH, load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_without_optimum_the_extra_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"gpt2onnx\[optimum\]"):
        gpt2onnx.export(make_checkpoint(), tmp_path / "bundle", graph="portable")
    assert not any(tmp_path.iterdir())
