"""The parity report: it passes what is right however sensitive the network is, and fails what isn't."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from support.bundles import edit_graphs
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine, at_a_terminal
from support.golden import FOLDER
from support.systems import posix

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.validate.cases import PROCESSORS, STRATEGIES, cases, why_left_out
from gpt2onnx.exporter.validate.parity import check
from gpt2onnx.models.bundle import GRAPH, RAGGED_GRAPH, SECOND_GRAPH, SECOND_GRAPH_WEIGHTS

pytestmark = pytest.mark.usefixtures("second_graph_at_any_width")
# Networks this small gain nothing by more, and lose much beside other work.
torch.set_num_threads(1)
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"dtype": "int8", "quality": False, "calibrate": False},
    "int4": {"dtype": "int4", "quality": False, "calibrate": False},
    "int4 pure": {"dtype": "int4", "pure": True, "quality": False, "calibrate": False},
    "int4 calibrated": {"dtype": "int4", "quality": False, "calibrate": True},
    "int8 calibrated": {"dtype": "int8", "quality": False, "calibrate": True},
}
# A vocabulary too small for the token cases, which would only cost time here.
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large weights": {"initializer_range": 1.5},
    "small weights": {"initializer_range": 0.002},
    "20 layers": {"n_layer": 20, "n_embd": 16, "n_head": 2},
    "1 wide": {"n_embd": 1, "n_head": 1, "initializer_range": 1.0},
    "untied": {"tie_word_embeddings": False},
    "untied, odd": {"n_embd": 35, "n_head": 7, "n_inner": 51, "tie_word_embeddings": False},
    "3 positions": {"n_positions": 3},
}

ExportAs = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def plain(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint to put faults into bundles of."""
    return make_checkpoint(vocab_size=29)


@pytest.fixture(scope="module")
def exports() -> dict[str, Path]:
    """Bundles of it, made once."""
    return {}


@pytest.fixture
def export_as(
    plain: Path, exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> ExportAs:
    """Gives a bundle in a precision, to be changed, and its checkpoint."""

    def export_as(precision: str) -> tuple[Path, Path]:
        if precision not in exports:
            folder = tmp_path_factory.mktemp("exports") / "bundle"
            exports[precision] = gpt2onnx.export(plain, folder, **PRECISIONS[precision]).folder
        return shutil.copytree(exports[precision], tmp_path / "bundle"), plain

    return export_as


def test_fp32_bundle_of_tales_passes(tales_bundle: Path) -> None:
    report = check(tales_bundle, Checkpoint.open("tales"))
    assert report["passed"], json.dumps(report, indent=2)
    assert report["whole"]["max_abs"] < 1e-4
    assert report["tokens"]["equal"] == report["tokens"]["cases"] > 20


def test_attention_is_scaled_by_the_layer_where_the_checkpoint_says_so(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine
) -> None:
    """transformers 4 does so with eager attention only, which the report names."""
    folder = make_checkpoint(n_layer=4, initializer_range=0.5, scale_attn_by_inverse_layer_idx=True)
    gpt2onnx.export(folder, tmp_path / "bundle")
    done = command_line("parity", tmp_path / "bundle", folder)
    assert done.code == 0, done.out + done.err
    assert done.out.startswith(f"against transformers {version('transformers')} (eager attention), torch ")


@posix
def test_a_person_at_a_terminal_sees_how_many_requests_are_compared(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = make_checkpoint()
    gpt2onnx.export(folder, tmp_path / "bundle")
    arguments = ("parity", tmp_path / "bundle", folder)
    shown = at_a_terminal(command_line, *arguments)
    assert shown.code == 0, shown.out
    assert re.search(r"Comparing with PyTorch: +\d+%.* requests/s", shown.err)
    assert at_a_terminal(command_line, *arguments, "-q").err == ""
    assert command_line(*arguments).err == ""


@pytest.mark.parametrize("layout", ["torch.compile", "mlx", "gptq"])
def test_other_layouts_in_transformers_own_files_pass(
    layout: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """transformers finds no tensors by their names there, and would compute with random weights."""
    folder = tmp_path / "checkpoint"
    if layout == "torch.compile":
        shutil.copytree(make_checkpoint(vocab_size=29), folder)
        weights = load_file(folder / "model.safetensors")
        save_file({f"_orig_mod.{name}": array for name, array in weights.items()}, folder / "model.safetensors")
    else:
        shutil.copytree(FOLDER / "other_formats" / layout, folder)
        for file in folder.glob("gptq_model*.safetensors"):
            file.rename(folder / "model.safetensors")
    made = gpt2onnx.export(folder, tmp_path / "bundle")
    report = check(made.folder, Checkpoint.open(str(folder)))
    assert report["passed"], json.dumps(report, indent=2)


@pytest.mark.parametrize("name", ["lora", "grown_saved"])
def test_a_merged_adapter_passes(
    name: str, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER / "adapters")
    gpt2onnx.export("base", tmp_path / "bundle", adapter=name)
    for source in (["base", "--adapter", name], [name]):
        done = command_line("parity", tmp_path / "bundle", *source)
        assert done.code == 0, done.out + done.err
    if name == "lora":
        assert command_line("parity", tmp_path / "bundle", "base").code == 1


def test_int8_bundle_of_tales_passes(tales_int8_bundle: Path) -> None:
    report = check(tales_int8_bundle, Checkpoint.open("tales"))
    assert report["passed"], json.dumps(report, indent=2)
    assert report["loss"]["max_abs"] > 1e-4, "int8 can't be this close: is it what was compared?"


@pytest.mark.parametrize("precision", ["int8", "int4", "int4 pure"])
def test_channels_that_are_nearly_dead_are_stored_as_well_as_others(
    precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Scales of weights this small are beyond what float16 tells apart."""
    folder = make_checkpoint(vocab_size=29)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][:, 3] *= 3e-3
    weights["transformer.h.1.mlp.c_fc.weight"][:, 5] *= 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = gpt2onnx.export(folder, tmp_path / "bundle", **PRECISIONS[precision])
    report = check(made.folder, Checkpoint.open(str(folder)))
    assert report["passed"], json.dumps(report, indent=2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_right_bundles_pass(network: str, precision: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(**{"vocab_size": 29} | NETWORKS[network])
    gpt2onnx.export(folder, tmp_path / "bundle", **PRECISIONS[precision])
    report = check(tmp_path / "bundle", Checkpoint.open(str(folder)))
    assert report["passed"], json.dumps(report, indent=2)


# Each takes a bundle's graph and may change it, or what lies beside it.
Fault = Callable[[Path, ModelProto], None]


def change_stored(folder: Path, graph: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Overwrites a weight in the external data; it keeps its size."""
    (tensor,) = [each for each in graph.graph.initializer if each.name in (name, f"{name}.half")]
    place = {entry.key: entry.value for entry in tensor.external_data}
    path = (folder / GRAPH).parent / place["location"]
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.memmap(path, dtype, "r+", int(place["offset"]), tuple(tensor.dims))
    array[:] = change(array.copy())
    array.flush()


def one_scale(folder: Path, graph: ModelProto) -> None:
    def change(scales: np.ndarray) -> np.ndarray:
        scales.reshape(-1)[5] *= 2
        return scales

    change_stored(folder, graph, "h.1.mlp.c_fc.scales", change)


def one_norm_weight(folder: Path, graph: ModelProto) -> None:
    """As if smoothing had divided by another factor than it multiplied by."""

    def change(weights: np.ndarray) -> np.ndarray:
        weights[5] *= 2
        return weights

    change_stored(folder, graph, "h.1.ln_2.weight", change)


def no_stored_bias(folder: Path, graph: ModelProto) -> None:
    change_stored(folder, graph, "h.1.mlp.c_fc.bias", np.zeros_like)


def transposed(folder: Path, graph: ModelProto) -> None:
    change_stored(folder, graph, "h.0.attn.c_proj.weight", np.transpose)


def rename_inputs(graph: ModelProto, rename: Callable[[str], str]) -> None:
    for node in graph.graph.node:
        node.input[:] = [rename(name) for name in node.input]


def change_numbers(graph: ModelProto, name: str, change: Callable[[float], float]) -> None:
    """Changes the attributes of that name."""
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == name:
                attribute.f = change(attribute.f)


def swapped_layers(folder: Path, graph: ModelProto) -> None:
    swapped = (".ln_2.weight", ".ln_2.bias", ".mlp.c_fc.weight", ".mlp.c_fc.bias")
    others = {"h.0.": "h.1.", "h.1.": "h.0."}
    rename_inputs(graph, lambda name: others.get(name[:4], name[:4]) + name[4:] if name.endswith(swapped) else name)


def no_used_bias(folder: Path, graph: ModelProto) -> None:
    rename_inputs(graph, lambda name: "h.1.mlp.c_fc.bias" if name == "h.0.mlp.c_fc.bias" else name)


def wrong_epsilon(folder: Path, graph: ModelProto) -> None:
    change_numbers(graph, "epsilon", lambda _: 0.3)


def wrong_attention_scale(folder: Path, graph: ModelProto) -> None:
    change_numbers(graph, "scale", lambda scale: scale * 1.5)


def wrong_zero(folder: Path, graph: ModelProto) -> None:
    _lower_zero(graph, "h.0.mlp.c_fc")


def wrong_zero_of_head(folder: Path, graph: ModelProto) -> None:
    _lower_zero(graph, "lm_head")


def _lower_zero(graph: ModelProto, layer: str) -> None:
    (middle,) = [each for each in graph.graph.initializer if each.name == f"{layer}.0.middle"]
    middle.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(middle) - np.uint8(1), middle.name))


def with_fault(folder: Path, file: str, fault: Fault) -> Path:
    """The bundle with a fault in one of its graphs, and a manifest that agrees to it."""
    edit_graphs(folder, lambda graph: fault(folder, graph), file)
    return folder


EVERY: list[Fault] = [no_stored_bias, swapped_layers, wrong_epsilon, no_used_bias, wrong_attention_scale]


@pytest.mark.parametrize(
    ("precision", "file", "fault"),
    [(precision, GRAPH, fault) for precision in PRECISIONS if "calibrated" not in precision for fault in EVERY]
    + [(precision, GRAPH, one_scale) for precision in ("int8", "int4", "int4 pure")]
    + [(precision, GRAPH, one_norm_weight) for precision in ("fp32", "int8", "int4", "int4 pure")]
    + [(precision, GRAPH, transposed) for precision in ("fp32", "fp16")]
    + [(precision, RAGGED_GRAPH, fault) for precision in ("fp32", "int8") for fault in EVERY],
)
def test_faults_are_found(precision: str, file: str, fault: Fault, export_as: ExportAs) -> None:
    bundle, source = export_as(precision)
    report = check(with_fault(bundle, file, fault), Checkpoint.open(str(source)))
    assert not report["passed"], json.dumps(report, indent=2)


def made_of_another_layer(folder: Path, graph: ModelProto) -> None:
    rename_inputs(graph, lambda name: name.replace("h.0.mlp.c_proj", "h.1.mlp.c_proj"))


@pytest.mark.parametrize(
    ("precision", "file", "fault"),
    [
        (precision, file, fault)
        for precision in ("int8 calibrated", "int4 calibrated")
        for file, fault in (
            (SECOND_GRAPH, swapped_layers),
            (SECOND_GRAPH, wrong_epsilon),
            (SECOND_GRAPH, wrong_attention_scale),
            (SECOND_GRAPH_WEIGHTS, wrong_zero),
            (SECOND_GRAPH_WEIGHTS, wrong_zero_of_head),
        )
    ]
    + [
        ("fp32", SECOND_GRAPH, swapped_layers),
        ("fp32", SECOND_GRAPH, wrong_epsilon),
        ("fp32", SECOND_GRAPH, wrong_attention_scale),
        ("fp32", SECOND_GRAPH_WEIGHTS, made_of_another_layer),
    ],
)
def test_faults_of_the_second_graph_are_found(precision: str, file: str, fault: Fault, export_as: ExportAs) -> None:
    bundle, source = export_as(precision)
    report = check(with_fault(bundle, file, fault), Checkpoint.open(str(source)))
    parts = {name for name, part in report.items() if isinstance(part, dict) and not part.get("passed", True)}
    assert parts == {"wide"}, json.dumps(report, indent=2)


def test_changed_weight_is_found(make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine) -> None:
    folder = make_checkpoint()
    gpt2onnx.export(folder, tmp_path / "bundle")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][::2] += np.float32(0.5)
    save_file(weights, changed / "model.safetensors", {"format": "pt"})

    right = command_line("parity", tmp_path / "bundle", folder, "--json")
    assert right.code == 0, right.out + right.err
    wrong = command_line("parity", tmp_path / "bundle", changed, "--json")
    assert wrong.err.startswith("gpt2onnx: parity with transformers")
    assert wrong.err.count("\n") == 1
    assert wrong.code == 1
    report = json.loads(wrong.out)
    assert not report["whole"]["passed"]
    assert report["weights"]["unequal"] == ["h.1.mlp.c_proj.bias"]
    assert report["tokens"]["equal"] < report["tokens"]["cases"]
    assert report["tokens"]["first_difference"]["position"] >= 0


def test_the_full_suite_has_all_cases(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = make_checkpoint(n_layer=1, vocab_size=40, n_positions=48)
    gpt2onnx.export(folder, tmp_path / "bundle")
    done = command_line("parity", tmp_path / "bundle", folder, "--suite", "full", "--json")
    assert done.code == 0, done.out + done.err
    tokens = json.loads(done.out)["tokens"]
    reasons = [why_left_out(case.options, version("transformers")) for case in cases(40, 48)]
    assert len(reasons) > len(STRATEGIES) * len(PROCESSORS)
    assert tokens["equal"] == tokens["cases"] == reasons.count(None)
    assert tokens["left_out"] == {reason: reasons.count(reason) for reason in set(reasons) - {None}}


def test_export_puts_the_report_into_the_manifest(tmp_path: Path, command_line: CommandLine) -> None:
    """By default where PyTorch is installed, as it is here."""
    done = command_line("export", "tales", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    parity = json.loads(done.out)["parity"]
    assert parity["passed"]
    assert parity["tokens"]["equal"] == parity["tokens"]["cases"] > 0
    assert json.loads(command_line("verify", tmp_path / "bundle", "--json").out)["parity"] is True
