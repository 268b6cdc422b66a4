"""The portable graph, which optimum traced, against the fused one, which is written here."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import peers
from support.checkpoints import MakeCheckpoint
from support.golden import assert_close
from support.graphs import assert_matches_pytorch, expected_logits, logits_of_prompt
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import MissingExtraError
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {"n_embd": 60, "n_head": 5, "n_inner": 50, "vocab_size": 97, "tie_word_embeddings": False, "n_layer": 3}
    | {"activation_function": "quick_gelu", "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    return {name: make_checkpoint(**config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each configuration's portable bundle, made where optimum is installed."""
    interpreter, made = peers.python(), {}
    for name, checkpoint in checkpoints.items():
        made[name] = tmp_path_factory.mktemp("portable") / name
        export = ["-m", "gpt2onnx", "export", checkpoint, made[name], "--graph", "portable", "--no-parity"]
        done = subprocess.run([interpreter, *export], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_portable_logits_are_those_of_pytorch(
    name: str, checkpoints: dict[str, Path], reference_of: type[Reference], request: pytest.FixtureRequest
) -> None:
    reference = reference_of(checkpoints[name])
    # Asked even where the test is skipped, so that golden answers can be made without optimum.
    expected_logits(reference, GPT2Config.from_file(reference.folder / "config.json"))
    folder = request.getfixturevalue("exports")[name]
    assert Bundle.open(folder).manifest.graph == "portable"
    assert_matches_pytorch(folder, reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_portable_logits_agree(
    name: str, checkpoints: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    fused, portable = gpt2onnx.export(checkpoints[name], tmp_path / "fused"), Bundle.open(exports[name])
    tokens = np.random.default_rng(3).integers(fused.config.vocab_size, size=(1, 40))
    assert_close(logits_of_prompt(portable, tokens), logits_of_prompt(fused, tokens), 1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5, "temperature": 0.9}])
def test_fused_and_portable_bundles_generate_the_same(
    options: dict[str, Any], checkpoints: dict[str, Path], exports: dict[str, Path], tmp_path: Path
) -> None:
    gpt2onnx.export(checkpoints["plain"], tmp_path / "fused")
    prompts = [[1, 2, 3], [9], [4, 5, 6, 7, 8]]
    fused, portable = (
        gpt2onnx.load(each, threads=1).generate(prompts, max_new_tokens=16, **options)
        for each in (tmp_path / "fused", exports["plain"])
    )
    for one, other in zip(portable, fused, strict=True):
        assert_same_tokens(one.sequences[0].token_ids, other.sequences[0].token_ids, options)


def test_portable_graph_has_standard_operators_only(exports: dict[str, Path]) -> None:
    model = onnx.load(exports["plain"] / bundle.GRAPH, load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_without_optimum_the_extra_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"needs the package optimum: pip install .*\[optimum\]"):
        gpt2onnx.export(make_checkpoint(), tmp_path / "bundle", graph="portable")
    assert not any(tmp_path.iterdir())
