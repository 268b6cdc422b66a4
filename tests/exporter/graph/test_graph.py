"""The fused graph against transformers, for every configuration that transformers runs."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden, assert_close
from support.graphs import CONFIGS, assert_matches_pytorch, logits_of_prompt, random_tokens
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.graph import fused
from gpt2onnx.models import bundle
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import ACTIVATIONS

# What transformers 4 doesn't have yet.
NEW_FUNCTIONS = {"hardswish", "sqrtsoftplus"}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_pytorch(
    name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", reference_of(checkpoint))


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations(
    function: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], golden: Golden, tmp_path: Path
) -> None:
    if golden.mode != "stored" and function in NEW_FUNCTIONS - set(functions_of_transformers()):
        pytest.skip(f"this version of transformers has no {function}")
    checkpoint = make_checkpoint(activation_function=function, vocab_size=61)
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", reference_of(checkpoint))


def functions_of_transformers() -> list[str]:
    from transformers.activations import ACT2CLS

    return sorted(ACT2CLS)


def test_every_activation_of_transformers_without_weights_is_supported(golden: Golden) -> None:
    known = golden.answer("functions", lambda: sorted({*functions_of_transformers(), *NEW_FUNCTIONS}))
    assert set(known) - set(ACTIVATIONS) == {"prelu", "xielu"}


@pytest.mark.parametrize("name", ["100 wide, heads of 20", "35 wide, heads of 5", "vocabulary of 97"])
def test_greedy_tokens_of_odd_configurations(
    name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(**CONFIGS[name])
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    result = gpt2onnx.load(tmp_path / "bundle", threads=1).generate([5, 6, 7], max_new_tokens=20)
    (expected,) = reference_of(checkpoint).tokens([5, 6, 7], do_sample=False, max_new_tokens=20)
    assert_same_tokens(result.sequences[0].token_ids, expected, name)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_graph_is_valid_onnx(dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(n_embd=60, n_head=5)
    gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype=dtype, calibrate=False, quality=False)
    onnx.checker.check_model(tmp_path / "bundle" / bundle.GRAPH)


def test_cache_has_the_true_head_size_whatever_the_operator_wants(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    gpt2onnx.export(make_checkpoint(n_embd=60, n_head=5), tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / bundle.GRAPH, load_external_data=False)
    shapes = {
        value.name: [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past_key_values.0.key"] == ["batch_size", 5, "past_sequence_length", 12]
    assert shapes["present.1.value"] == ["batch_size", 5, "total_sequence_length", 12]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt_neo"}, "not a GPT-2"),
        ({"add_cross_attention": True}, "encoder"),
        ({"pruned_heads": {"0": [1]}}, "unequal heads"),
        ({"activation_function": "prelu"}, "prelu"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"activation_function": None}, "activation_function"),
        ({"n_head": 3}, "not divisible"),
        ({"n_head": 0}, "n_head"),
        ({"n_layer": "2"}, "n_layer"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"n_embd": True}, "n_embd"),
        ({"n_embd": None}, "n_embd"),
        ({"n_inner": 0}, "n_inner"),
        ({"n_positions": -1}, "n_positions"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"scale_attn_weights": 1}, "scale_attn_weights"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_config_that_cant_be_exported_is_refused_with_the_reason(
    change: dict[str, Any], words: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words) as caught:
        gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_general_names_of_config_fields(
    make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(n_positions=40, n_layer=1)
    config = json.loads((checkpoint / "config.json").read_text())
    general = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers"}
    renamed = {general.get(name, name): value for name, value in config.items()}
    # Where both names are there, the general one counts.
    (checkpoint / "config.json").write_text(json.dumps(renamed | {"n_layer": 2}))
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    assert_matches_pytorch(tmp_path / "bundle", reference_of(checkpoint))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_head_comes_in_parts(
    dtype: str, tied: bool, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each part begins with a page, where it can be mapped, and together they are the head."""
    monkeypatch.setattr(fused, "_LARGEST_PART", 40_000)
    checkpoint = make_checkpoint(vocab_size=5000, n_embd=8, n_head=1, tie_word_embeddings=tied, initializer_range=0.3)
    folder = gpt2onnx.export(checkpoint, tmp_path / "bundle", dtype=dtype, parity=False, quality=False).folder
    model = onnx.load(folder / bundle.GRAPH, load_external_data=False)
    weights = {each.name: each for each in model.graph.initializer}
    parts = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Gemm"]
    assert len(parts) == {"fp32": 3, "fp16": 2}[dtype], [list(part.dims) for part in parts]
    assert sum(part.dims[0] for part in parts) == 5000
    places = [
        {entry.key: int(entry.value) for entry in part.external_data if entry.key != "location"} for part in parts
    ]
    assert all((place["offset"] - places[0]["offset"]) % 4096 == 0 for place in places)
    reference = reference_of(checkpoint)
    if dtype == "fp32":
        assert_matches_pytorch(folder, reference)
    else:
        opened = Bundle.open(folder)
        tokens = random_tokens(opened.config, 2)
        assert_close(logits_of_prompt(opened, tokens[:1]), reference.logits(tokens)[:1], 0.05, dtype)
