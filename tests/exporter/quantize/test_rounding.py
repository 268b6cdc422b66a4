"""Rounding of activations, and the choice of the layers that a second graph rounds per tensor: against ONNX Runtime and PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from support.checkpoints import MakeCheckpoint
from support.golden import assert_close
from support.graphs import expected_logits, random_tokens
from support.quantized import (
    add_second_graph,
    assert_second_graph_rounds_as_said,
    few_texts,
    in_numpy,
    many_tokens,
)
from support.reference import Reference

import gpt2onnx
from gpt2onnx.exporter.graph.input_rounding import Blockwise, PerTensor
from gpt2onnx.exporter.quantize.per_tensor import choose
from gpt2onnx.exporter.quantize.statistics import number_of_texts
from gpt2onnx.exporter.validate.bundle_weights import BundleWeights
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.host import resources

WIDTH, BLOCK = 256, 32
LARGEST = np.int8(127)  # of 8-bit weights


def multiplied_by_one(x: np.ndarray, kind: str) -> np.ndarray:
    """x times the identity by an operator: x as the operator rounds it."""
    size = x.shape[-1]
    if kind == "DynamicQuantizeMatMul":
        weights: dict[str, np.ndarray] = {
            "w": LARGEST * np.eye(size, dtype=np.int8),
            "s": np.full(size, 1 / LARGEST, np.float32),
        }
        attributes: dict[str, Any] = {}
    else:
        values = (np.uint8(LARGEST) * np.eye(size, dtype=np.uint8) + 128).reshape(size, -1, BLOCK)
        weights = {"w": values, "s": np.full((size, size // BLOCK), 1 / LARGEST, np.float32)}
        attributes = {"K": size, "N": size, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    node = helper.make_node(kind, ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


NUMBERS = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
LARGER_ROW = np.array([[1], [50], [1], [1], [1]], np.float32)


@pytest.mark.parametrize("x", [NUMBERS, np.abs(NUMBERS) + 1, NUMBERS * LARGER_ROW, 0 * NUMBERS])
def test_rounding_is_that_of_the_operators(x: np.ndarray) -> None:
    for kind, rounding in (("DynamicQuantizeMatMul", PerTensor()), ("MatMulNBits", Blockwise(BLOCK))):
        found = multiplied_by_one(x, kind)
        off = np.abs(found - rounding.rounded(x)) / max(1, np.abs(x).max())
        # What lies halfway between two of at least 127 steps may go either way.
        assert off.max() <= 1 / 126, f"{kind}: {off.max()}"
        assert np.mean(off <= 1e-4) > 0.99, f"{kind}: {np.sort(off)[-20:]}"


def test_outliers_decide_about_the_operator() -> None:
    random = np.random.default_rng(0)
    usual = random.standard_normal((64, WIDTH)).astype(np.float32)
    weight = random.standard_normal((WIDTH, 40)).astype(np.float32)
    assert choose(usual, weight, BLOCK) == PerTensor()
    # A few tokens whose numbers are all far larger: rows have to be scaled.
    rows = usual.copy()
    rows[:3] *= 200
    found = choose(rows, weight, BLOCK)
    assert isinstance(found, PerTensor)
    assert found.min_row_scale is not None
    assert 0 < found.min_row_scale < np.median(rows.max(-1))
    # A few channels: blocks keep them from the others.
    channels = usual.copy()
    channels[:, :3] *= 200
    assert choose(channels, weight, BLOCK) == Blockwise(BLOCK)
    assert choose(np.zeros_like(usual), weight, BLOCK) == Blockwise(BLOCK)


@pytest.fixture(scope="module")
def int8(export_short_tales: Callable[..., Bundle]) -> Bundle:
    """Blocks of the embedded model as if they were wide enough for a second graph."""
    return export_short_tales(second_graph=True, dtype="int8", calibrate=True, quality=False)


def operators(made: Bundle, name: str = bundle.GRAPH) -> list[str]:
    graph = onnx.load(made.folder / name, load_external_data=False).graph
    return [node.op_type for node in graph.node if "MatMul" in node.op_type]


def test_many_inputs_are_rounded_with_one_scale(int8: Bundle) -> None:
    *blocks, head = operators(int8, bundle.SECOND_GRAPH)
    assert blocks.count("DynamicQuantizeMatMul") > 6  # of 8
    assert head == "DynamicQuantizeMatMul"
    assert set(operators(int8)) == {"MatMulNBits"}


@pytest.mark.parametrize("width", [504, 512])
def test_only_wide_networks_have_a_second_graph(width: int, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(n_embd=width, n_inner=64, n_layer=1)
    with few_texts():
        made = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype="int8", quality=False)
    assert (bundle.SECOND_GRAPH in made.manifest.files) == (width == 512)


@pytest.mark.usefixtures("second_graph_at_any_width")
@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"dtype": "int8", "calibrate": False}])
def test_second_graph_needs_calibration(
    options: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = gpt2onnx.export(make_checkpoint(), tmp_path / "bundle", **options)
    assert {bundle.SECOND_GRAPH, bundle.SECOND_GRAPH_WEIGHTS}.isdisjoint(made.manifest.files)


def test_exact_sums_where_the_processor_has_none(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for processors without VNNI are asked for there, and give what those with it give."""
    tokens = many_tokens(int8.config)
    asked: list[str] = []
    # Once in a process, another graph asks how ONNX Runtime keeps weights.
    Runner(int8, threads=1, wide_after=0).open_second_graph()
    real = onnxruntime.InferenceSession

    def create(graph: object, options: onnxruntime.SessionOptions, **others: Any) -> object:
        try:
            asked.append(options.get_session_config_entry("session.x64quantprecision"))
        except RuntimeError:  # not set
            asked.append("")
        return real(graph, options, **others)

    def logits() -> np.ndarray:
        session = Runner(int8, threads=1, wide_after=0)
        return session.forward(session.new_cache(1, 64), slice(0, 1), tokens, logits="all")[None].copy()

    usual = logits()
    monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    for overflow in (False, True):
        monkeypatch.setattr(resources, "sums_of_byte_products_overflow", lambda overflow=overflow: overflow)
        exact = logits()
    assert asked == ["", "", "", "1", "1", "1"]
    np.testing.assert_allclose(exact, usual, rtol=0, atol=1e-4)
    # Sums that overflow put them off by four times as much.
    assert_second_graph_rounds_as_said(int8)


def test_norms_stay_apart_from_the_sums_before_them(int8: Bundle, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file is for this machine only
    onnxruntime.InferenceSession(int8.folder / bundle.GRAPH, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph
    norms = [node.op_type for node in graph.node if "Normalization" in node.op_type]
    assert norms == ["LayerNormalization"] * (2 * int8.config.n_layer + 1)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"dtype": "int8"}, 128),
        ({"dtype": "int4"}, 32),
        ({"dtype": "int4", "pure": True}, 64),
        ({"dtype": "int4", "pure": True, "block_size": 16}, 16),
    ],
)
def test_blocks_are_those_of_the_documents(
    options: dict[str, Any], size: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(n_embd=128)
    made = gpt2onnx.export(source, tmp_path / "bundle", calibrate=False, quality=False, **options)
    assert made.manifest.block_size == size
    graph = onnx.load(made.folder / bundle.GRAPH, load_external_data=False).graph
    sizes = [each.i for node in graph.node for each in node.attribute if each.name == "block_size"]
    assert set(sizes) == {size} if options.get("pure") else size in sizes


def test_texts_are_those_of_the_documents() -> None:
    many = 50_000_000
    assert [number_of_texts("int4", weights, pure=False) for weights in (many, many + 1)] == [64, 32]
    assert [number_of_texts("int4", weights, pure=True) for weights in (many, many + 1)] == [32, 32]
    assert [number_of_texts("int8", weights, pure=False) for weights in (many, many + 1)] == [16, 16]


@pytest.mark.parametrize("pure", [False, True])
def test_matrices_with_8_bits_in_int4_are_those_of_the_documents(
    pure: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    made = gpt2onnx.export(
        make_checkpoint(n_layer=5), tmp_path / "bundle", dtype="int4", pure=pure, calibrate=False, quality=False
    )
    graph = onnx.load(made.folder / bundle.GRAPH, load_external_data=False).graph
    bits = {node.name: each.i for node in graph.node for each in node.attribute if each.name == "bits"}
    eight = {name for name, number in bits.items() if number == 8}
    attention = {f"h.{layer}.attn.c_proj.matmul" for layer in range(5)}
    expected = {"wte.gather", "logits", *attention, *(f"h.{layer}.mlp.c_fc.matmul" for layer in (2, 3, 4))}
    assert eight == (set() if pure else expected)
    assert len(bits) == 2 + 4 * 5


@pytest.mark.parametrize("function", ["relu", "relu2", "gelu_new"])
def test_rows_are_scaled_where_some_are_large_or_all_zero(
    function: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Per-tensor rounding of scaled rows in every layer; zeros are what is left of most rows by relu."""
    source = make_checkpoint(activation_function=function, initializer_range=0.1)
    made = gpt2onnx.export(source, tmp_path / "bundle", dtype="int8", calibrate=False, quality=False)
    made = add_second_graph(made, PerTensor(0.01))
    assert operators(made, bundle.SECOND_GRAPH).count("DynamicQuantizeMatMul") == 4 * made.config.n_layer + 1
    first, second = BundleWeights(made), BundleWeights(made, second_graph=True)
    for name, step in second.made_scales():
        off = np.abs(second.tensor(name) - first.tensor(name)) / step
        assert off.max() <= 0.501, f"{name}: rounding to steps is off by {off.max()} steps"
    assert_second_graph_rounds_as_said(made)


@pytest.mark.parametrize("function", ["relu", "relu2"])
def test_judge_is_pytorch(function: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference]) -> None:
    """What stands in for PyTorch computes what PyTorch computes; test_quantize has this of other networks."""
    reference = reference_of(make_checkpoint(activation_function=function, vocab_size=61))
    config = GPT2Config.from_file(reference.folder / "config.json")
    expected = expected_logits(reference, config)
    assert_close(in_numpy(reference.folder).logits(random_tokens(config, 2)), expected, 1e-4)


@pytest.mark.parametrize(
    ("machine", "flags", "overflow"),
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("x86_64", "fpu avx2 avx_vnni", False),
        ("x86_64", "fpu avx2 avx512f", True),
        ("AMD64", None, True),
        ("aarch64", "asimd", False),
    ],
)
def test_processors_without_exact_sums_are_known(
    machine: str, flags: str | None, overflow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources.platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert resources.sums_of_byte_products_overflow(tmp_path) is overflow
