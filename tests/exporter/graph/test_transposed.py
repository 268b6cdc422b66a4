"""The second graph in fp32, which multiplies the other way round: what it computes, and where it is used."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.checkpoints import MakeCheckpoint

import gpt2onnx
from gpt2onnx.exporter.graph import fused
from gpt2onnx.exporter.validate.bundle_weights import BundleWeights
from gpt2onnx.models.bundle import SECOND_GRAPH, Bundle
from gpt2onnx.models.config import ACTIVATIONS
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.host import resources

ODD: dict[str, Any] = {"n_embd": 60, "n_head": 5, "n_inner": 50, "vocab_size": 263, "tie_word_embeddings": False}


@pytest.fixture
def bundle(make_checkpoint: MakeCheckpoint, tmp_path: Path, second_graph_at_any_width: None) -> Bundle:
    return gpt2onnx.export(make_checkpoint(), tmp_path / "bundle")


def logits(runner: Runner, parts: list[np.ndarray]) -> np.ndarray:
    """Of all positions of tokens [rows, count] that come in these parts."""
    rows, cache = slice(0, len(parts[0])), runner.new_cache(len(parts[0]), sum(part.shape[1] for part in parts))
    return np.concatenate([runner.forward(cache, rows, part, logits="all").copy() for part in parts])


def is_open(runner: Runner) -> bool:
    return runner._second_graph is not None and runner._second_graph._graph is not None


@pytest.mark.usefixtures("second_graph_at_any_width")
@pytest.mark.parametrize(
    "settings",
    [*({"activation_function": each} for each in ACTIVATIONS), ODD, {"scale_attn_by_inverse_layer_idx": True}],
    ids=lambda settings: str(next(iter(settings.values()))),
)
@pytest.mark.parametrize("in_parts", [False, True], ids=["one head", "head in parts"])
def test_it_computes_what_the_first_graph_does(
    settings: dict[str, Any],
    in_parts: bool,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_parts:
        monkeypatch.setattr(fused, "_LARGEST_PART", 4096)
        monkeypatch.setattr(fused, "_PART_ROWS_UNIT", 16)
    made = gpt2onnx.export(make_checkpoint(initializer_range=0.1, **settings), tmp_path / "bundle")
    first, both = Runner(made, threads=1, wide_after=None), Runner(made, threads=1, wide_after=0)
    assert is_open(both)
    assert not is_open(first)
    random = np.random.default_rng(0)
    # A prompt and steps behind it, a batch of prompts, a batch of steps.
    for shapes in ([(1, 9), (1, 1), (1, 8)], [(3, 7), (3, 2)], [(9, 1), (9, 1)]):
        parts = [random.integers(made.config.vocab_size, size=shape) for shape in shapes]
        expected = logits(first, parts)
        np.testing.assert_allclose(logits(both, parts), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_its_weights_are_the_first_graphs(bundle: Bundle) -> None:
    first, second = BundleWeights(bundle), BundleWeights(bundle, second_graph=True)
    own = dict(second.made_scales())
    assert len(own) == 4 * bundle.config.n_layer
    for name in weight_shapes(bundle.config, tied=True):
        np.testing.assert_array_equal(second.tensor(name), first.tensor(name), err_msg=name)


def test_it_adds_no_weights_to_the_bundle(bundle: Bundle) -> None:
    graph = onnx.load(bundle.folder / SECOND_GRAPH, load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Gemm") == 4 * bundle.config.n_layer + 1
    assert not [node for node in graph.node if node.op_type == "MatMul"]
    assert (bundle.folder / SECOND_GRAPH).stat().st_size < 100_000


@pytest.mark.parametrize(
    ("tokens", "logits", "taken"),
    [(8, 8, True), (48, 48, True), (99, 8, True), (7, 7, False), (49, 49, False), (500, 1, False)],
)
def test_passes_that_take_it(tokens: int, logits: int, taken: bool, bundle: Bundle) -> None:
    second = Runner(bundle, wide_after=0)._second_graph
    assert second is not None
    assert (second.take(tokens, logits) is not None) == taken


def test_only_with_avx512(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With shorter vectors it isn't faster."""
    monkeypatch.setattr(resources, "has_avx512", lambda: False)
    assert not is_open(Runner(bundle, wide_after=0))
    monkeypatch.undo()
    for name, flags, expected in (
        ("with", "avx512f avx512bw", True),
        ("without", "avx512fp16", False),
        ("empty", "", False),
    ):
        (tmp_path / name / "proc").mkdir(parents=True)
        (tmp_path / name / "proc/cpuinfo").write_text(f"processor : 0\nflags : fpu avx2 {flags}\n")
        assert resources.has_avx512(tmp_path / name) == expected


@pytest.mark.parametrize("width", [504, 512])
def test_only_wide_networks_have_one(width: int, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = gpt2onnx.export(make_checkpoint(n_embd=width, n_inner=64, n_layer=1), tmp_path / "bundle")
    assert (SECOND_GRAPH in made.manifest.files) == (width == 512)
