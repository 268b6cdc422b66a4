"""`gpt2onnx inspect`: parameters as in transformers, sizes as in exported files."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import FOLDER as GOLDEN
from support.golden import Golden
from support.hub import MAIN, REPOSITORY, Hub, checkpoints, hub
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.models.bundle import GRAPH, MANIFEST, Manifest
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.inspection import Layer, layers
from gpt2onnx.models.precision import DTYPES, memory
from gpt2onnx.models.tales import FOLDER

__all__ = ["checkpoints", "hub"]  # fixtures

SIZES = {
    "gpt2": ({}, 124_439_808),
    "gpt2-medium": ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    "gpt2-large": ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "gpt2-xl": ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "distilgpt2": ({"n_layer": 6}, 81_912_576),
    "untied": ({"tie_word_embeddings": False}, 124_439_808 + 50_257 * 768),
    "of other shapes": ({"n_embd": 48, "n_inner": 100, "n_layer": 3, "n_head": 3, "vocab_size": 101}, None),
}


def parameters(settings: dict[str, Any]) -> dict[str, Any]:
    """Count and shapes of parameters in transformers; on the meta device, without memory for weights."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    named = {name.removeprefix("transformer."): list(tensor.shape) for name, tensor in model.named_parameters()}
    return {"count": model.num_parameters(), "shapes": named}


def weights(layer: Layer, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of a tree, by their whole names."""
    found = {f"{prefix}{name}": shape for name, shape in layer.weights.items()}
    for inner in layer.layers:
        found |= weights(inner, f"{prefix}{inner.name}.")
    return found


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_transformers(name: str, golden: Golden) -> None:
    settings, published = SIZES[name]
    expected = golden.answer(settings, lambda: parameters(settings))
    shapes = {weight: tuple(shape) for weight, shape in expected["shapes"].items()}
    network = layers(GPT2Config.from_dict(settings))
    assert weights(network) == shapes
    assert network.parameters == expected["count"] == (published or expected["count"])
    parts = {layer.name: layer.parameters for layer in network.layers}
    assert sum(parts.values()) == network.parameters
    for part, count in parts.items():
        assert count == sum(math.prod(shape) for weight, shape in shapes.items() if weight.startswith(f"{part}.")), part
    assert (parts["lm_head"] > 0) == (not settings.get("tie_word_embeddings", True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"n_embd": 96, "n_head": 3, "vocab_size": 300},
        {"n_embd": 40, "n_head": 5, "n_inner": 70, "tie_word_embeddings": False},
    ],
    ids=["tied", "untied, of odd widths"],
)
def test_memory_is_what_an_export_stores(
    settings: dict[str, Any], dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    options = {"quality": False, "calibrate": False} if dtype in ("int8", "int4") else {}
    bundle = gpt2onnx.export(make_checkpoint(**settings), tmp_path / "bundle", dtype=dtype, **options)
    graph = onnx.load(bundle.folder / GRAPH, load_external_data=False).graph
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    # Two names may stand for the same bytes.
    lengths = {int(place["offset"]): int(place["length"]) for place in places if place}
    assert memory(bundle.config, dtype).weights == sum(lengths.values())
    # The cache of the runtime for one sequence of the context's length.
    model = gpt2onnx.load(bundle.folder, threads=1)
    positions = bundle.config.n_positions
    assert memory(bundle.config, dtype).cache_full == model.runner.new_cache(1, positions).nbytes
    assert memory(bundle.config, dtype).cache_per_token * positions == memory(bundle.config, dtype).cache_full


def tales_parameters(golden: Golden) -> dict[str, int]:
    """Parameters of the embedded model in transformers: all, and of its fourth block."""

    def transformers() -> dict[str, int]:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(FOLDER)
        block = sum(weight.numel() for weight in model.transformer.h[3].parameters())
        return {"all": model.num_parameters(), "h.3": block}

    return golden.answer("tales", transformers)


def test_json_of_a_bundle(command_line: CommandLine, tales_int8_bundle: Path, golden: Golden) -> None:
    done = command_line("inspect", tales_int8_bundle, "--json")
    assert (done.code, done.err) == (0, "")
    record = json.loads(done.out)
    expected = tales_parameters(golden)
    assert record["parameters"] == expected["all"] == sum(record["components"].values())
    assert record["components"]["h.3"] == expected["h.3"]
    assert record["tied"] is True
    assert [layer["name"] for layer in record["layers"]] == list(record["components"])
    assert record["layers"][-1]["tied_to"] == "wte.weight"
    manifest = json.loads((tales_int8_bundle / MANIFEST).read_text("utf-8"))
    assert record["bundle"] == {"folder": str(tales_int8_bundle), **manifest}
    for name, facts in record["bundle"]["files"].items():
        assert facts["size"] == (tales_int8_bundle / name).stat().st_size


def test_a_bundle_for_a_person(command_line: CommandLine, tales_int8_bundle: Path, golden: Golden) -> None:
    done = command_line("inspect", tales_int8_bundle)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith("6 layers, 8 heads of 32, 256 wide, 512 positions, vocabulary of 8,192, gelu_new")
    total = tales_parameters(golden)["all"]
    assert [line for line in lines if line.split() == ["total", f"{total:,}"]]
    assert [line for line in lines if line.split() == ["h.1", "to", "h.5", "each", "as", "h.0", "3,948,800"]]
    assert [line for line in lines if line.split() == ["lm_head", "wte.weight", "0"]]
    for name, record in Manifest.read(tales_int8_bundle).files.items():
        assert [line for line in lines if line.split() == [name, f"{record.size:,}"]], name
    for fact in ("int8, blocks of 128", "sha256", "parity: not checked", "quality against fp32", "KL "):
        assert fact in done.out
    assert command_line("inspect", tales_int8_bundle, "-q").out == done.out.partition("\n\n")[2]


def test_a_parity_report(
    command_line: CommandLine, make_checkpoint: MakeCheckpoint, tmp_path: Path, golden: Golden
) -> None:
    folder = gpt2onnx.export(make_checkpoint(), tmp_path / "bundle").folder

    def report() -> dict[str, Any]:
        import transformers

        checked = gpt2onnx.export(make_checkpoint(), tmp_path / "checked", parity=True).manifest.parity
        assert checked is not None
        assert checked["reference"].startswith(f"transformers {transformers.__version__}")
        # So that neither another version nor another processor makes it another report.
        rounded = json.loads(json.dumps(checked), parse_float=lambda figure: round(float(figure), 3))
        return rounded | {"reference": "transformers 5.0"}

    replace(Manifest.read(folder), parity=golden.answer("parity", report)).write(folder)
    done = command_line("inspect", folder)
    assert (done.code, done.err) == (0, "")
    assert "parity against transformers 5.0" in done.out
    assert "FAILED" not in done.out
    manifest = Manifest.read(folder)
    assert manifest.parity is not None
    failed = manifest.parity["tokens"] | {"passed": False, "first_difference": {"position": 7}}
    replace(manifest, parity=manifest.parity | {"passed": False, "tokens": failed}).write(folder)
    assert "FAILED" in command_line("inspect", folder).out
    # A report of another version has other figures.
    replace(manifest, parity={"reference": "PyTorch 1", "passed": False}).write(folder)
    assert "parity with PyTorch 1: FAILED" in command_line("inspect", folder).out
    for odd in ({}, {"x": 1}, {"passed": True}, {"reference": "a", "tokens": 3}):
        replace(manifest, parity=odd, quality=odd).write(folder)
        done = command_line("inspect", folder)
        assert (done.code, done.err) == (0, "")
        assert f"parity with {odd.get('reference', 'what the report does not name')}: " in done.out
        assert "quality: in a report that this version can't read" in done.out


def test_a_source_that_was_never_exported(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint
) -> None:
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    only_config = tmp_path / "config"
    only_config.mkdir()
    (only_config / "config.json").write_text('{"model_type": "gpt2"}')
    for source, parameters in (("tales", 6_967_296), (only_config, 124_439_808)):
        record = json.loads(command_line("inspect", source, "--json").out)
        assert (record["parameters"], record["bundle"]) == (parameters, None)
        done = command_line("inspect", source)
        assert (done.code, done.err) == (0, "")
        assert f"{parameters:,}" in done.out
        assert "parity" not in done.out
    assert not (tmp_path / "cache").exists(), "inspect exported something"
    # A checkpoint that GPTQ quantised.
    quantized = GOLDEN / "other_formats" / "gptq"
    record = json.loads(command_line("inspect", quantized, "--json").out)
    assert record["parameters"] == layers(Checkpoint.open(str(quantized)).config).parameters
    # One weights file without a configuration: read off the weights.
    folder = make_checkpoint(n_embd=64, n_head=2)
    exported = gpt2onnx.export(folder, tmp_path / "bundle").config
    shutil.copy(folder / "model.safetensors", only_config)
    (only_config / "config.json").write_bytes((folder / "config.json").read_bytes())
    record = json.loads(command_line("inspect", only_config / "model.safetensors", "--json").out)
    assert record["parameters"] == layers(exported).parameters
    # Once it has been exported into the cache, that bundle is shown.
    gpt2onnx.load("tales")
    record = json.loads(command_line("inspect", "tales", "--json").out)
    assert record["bundle"]["source"] == "tales"
    assert Path(record["bundle"]["folder"]).parent == tmp_path / "cache"


def test_a_source_is_exported_again_when_a_file_of_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint
) -> None:
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    folder = make_checkpoint(tokenizer=True)
    bundle = gpt2onnx.load(folder, threads=1).bundle.folder
    (folder / ".#config.json").symlink_to("nobody@nowhere")  # an editor's lock file
    (folder / "leads-nowhere").symlink_to(tmp_path / "nothing")
    assert gpt2onnx.load(folder, threads=1).bundle.folder == bundle
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.01}))
    assert gpt2onnx.load(folder, threads=1).config.layer_norm_epsilon == 0.01


def test_of_a_repository_only_the_configuration_is_fetched(
    hub: Hub, tmp_path: Path, golden: Golden, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    with hub.asked(tmp_path / "hub"):
        done = command_line("inspect", REPOSITORY, "--json")
        nothing = command_line("inspect", "someone/nothing")
    assert (done.code, done.err) == (0, "")
    config = json.loads(hub.commits[MAIN]["config.json"])
    expected = golden.answer(config, lambda: parameters(config))
    assert json.loads(done.out)["parameters"] == expected["count"]
    assert hub.fetched == ["config.json"]
    assert (nothing.code, nothing.out, nothing.err.count("\n")) == (1, "", 1)


def test_needs_nothing_but_the_base_install(tales_bundle: Path, tmp_path: Path) -> None:
    without = (*REFERENCES, *EXPORT_ONLY, "onnxruntime", "numpy", "tokenizers")
    for model in (tales_bundle, "tales"):
        code, out, err = run(COMMAND_LINE, "inspect", model, without=without, GPT2ONNX_CACHE=str(tmp_path / "cache"))
        assert (code, err) == (0, "")
        assert "6,967,296" in out
