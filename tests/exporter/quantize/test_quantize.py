"""What calibration collects, and the network in NumPy that judges quantised bundles, against PyTorch."""

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden, assert_close, digest
from support.graphs import CONFIGS, expected_logits, logits_of_prompt, random_tokens
from support.quantized import QUANTIZED, fixed_texts, in_numpy, rebuild
from support.reference import Reference

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.quantize.statistics import Statistics, collect
from gpt2onnx.exporter.quantize.transforms import centre
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.models.config import GPT2Config


@pytest.mark.parametrize("name", QUANTIZED)
def test_judge_is_pytorch(name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference]) -> None:
    """The judge in NumPy computes what PyTorch computes."""
    reference = reference_of(make_checkpoint(**CONFIGS[name]))
    config = GPT2Config.from_file(reference.folder / "config.json")
    expected = expected_logits(reference, config)
    assert_close(in_numpy(reference.folder).logits(random_tokens(config, 2)), expected, 1e-4)


def test_judge_of_tales_is_pytorch(tales_reference: Reference) -> None:
    ids = np.random.default_rng(0).integers(8192, size=200)
    logits = in_numpy(tales_reference.folder).logits(ids[None])[0]
    assert_close(logits, tales_reference.logits(ids), 1e-4)


@pytest.fixture(scope="module")
def collected(tales_bundle: Path) -> Statistics:
    made = Bundle.open(tales_bundle)
    return collect(made, fixed_texts(made.config, 4), gradients=False)


def test_inputs_are_those_of_pytorch(collected: Statistics, tales_reference: Reference, golden: Golden) -> None:
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{layer}.{name}" for layer in (0, 5) for name in matrices]
    texts, length = collected.tokens.shape
    about = ["inputs", digest(collected.tokens.flat)]

    @functools.cache
    def torchs() -> dict[str, np.ndarray]:
        """What reaches the matrices and the head, [texts * length, in]."""
        import torch

        transformer, seen = tales_reference.model.transformer, {}
        hooks = [
            transformer.get_submodule(name).register_forward_pre_hook(
                lambda module, arguments, name=name: seen.update({name: arguments[0].flatten(0, -2)})
            )
            for name in names
        ]
        hooks.append(
            transformer.ln_f.register_forward_hook(
                lambda module, arguments, output: seen.update(head=output.flatten(0, -2))
            )
        )
        with torch.no_grad():
            tales_reference.model(torch.from_numpy(collected.tokens))
        for hook in hooks:
            hook.remove()
        return {name: x.double().numpy() for name, x in seen.items()}

    def mean(name: str) -> np.ndarray:
        return torchs()[name].mean(0) / torchs()[name].std()

    def first_rows(name: str) -> np.ndarray:
        """Of each text the token that the sample begins with: the first of the first text, the second of the second."""
        return torchs()[name][np.arange(texts) * (length + 1)] / torchs()[name].std()

    spreads = golden.answer([*about, "spreads"], lambda: {name: torchs()[name].std() for name in names})
    for name in names:
        inputs, spread = collected.inputs[name], spreads[name]
        expected = golden.array([*about, name, "mean"], lambda name=name: mean(name))
        assert_close(inputs.mean / spread, expected, 1e-3, name)
        expected = golden.array([*about, name, "rows"], lambda name=name: first_rows(name))
        assert_close(inputs.sample[:: len(inputs.sample) // texts] / spread, expected, 1e-3, name)

    def second_moment() -> np.ndarray:
        x = torchs()["head"]
        return x.T @ x / len(x)

    square = golden.answer([*about, "square"], lambda: np.square(torchs()["head"]).mean())
    assert collected.head_moment is not None
    moment = golden.array([*about, "second moment"], lambda: second_moment() / square)
    assert_close(collected.head_moment / square, moment, 3e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False, "n_embd": 15, "n_head": 3},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_head": 1},
        {"scale_attn_weights": False, "layer_norm_epsilon": 0.1, "initializer_range": 0.1},
        {"n_inner": 99, "n_layer": 1},
        *({"activation_function": each} for each in ("gelu", "relu2", "quick_gelu", "laplace", "linear")),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_gradients_are_those_of_pytorch(
    settings: dict[str, Any], make_checkpoint: MakeCheckpoint, reference_of: type[Reference], golden: Golden,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = make_checkpoint(**{"n_embd": 16} | settings)
    made, reference = gpt2onnx.export(source, tmp_path / "fp32"), reference_of(source)
    tokens = fixed_texts(made.config, 3)
    gradients = collect(made, tokens).gradients
    names = [f"h.{layer}.{each}" for layer in range(made.config.n_layer) for each in ("attn.c_attn", "mlp.c_proj")]
    about = ["gradients", reference.name, digest(tokens.flat)]

    @functools.cache
    def torchs() -> dict[str, np.ndarray]:
        import torch

        outputs: dict[str, torch.Tensor] = {}
        for name in names:
            reference.model.transformer.get_submodule(name).register_forward_hook(
                lambda module, arguments, output, name=name: outputs.update({name: output})
            )
        moments = dict.fromkeys(names, 0.0)
        for text in torch.from_numpy(tokens):
            logits = reference.model(text[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
            for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[each] for each in names]), strict=True):
                moments[name] += (gradient[0].T @ gradient[0]).numpy() / tokens.size
        return moments

    largest = golden.answer([*about, "largest"], lambda: {name: float(np.abs(x).max()) for name, x in torchs().items()})
    for name in names:
        found = gradients[name] / largest[name]
        triangle = np.triu_indices(len(found))  # half of a symmetric matrix
        expected = golden.array([*about, name], lambda name=name, at=triangle: (torchs()[name] / largest[name])[at])
        assert_close(found[triangle], expected, 1e-3, name)
        np.testing.assert_array_equal(found, found.T)


def test_centred_network_is_the_same_network(
    collected: Statistics, tales_bundle: Path, tales_reference: Reference, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open("tales")
    tensor, after = centre(checkpoint.config, checkpoint.tensor, collected.inputs)
    folder = shutil.copytree(tales_bundle, tmp_path / "centred")
    rebuild(folder, checkpoint, tensor)

    opened = Bundle.open(folder)
    tokens = random_tokens(checkpoint.config, 1)
    expected = tales_reference.logits(tokens)
    assert_close(logits_of_prompt(opened, tokens), expected, 1e-5 * np.nanmax(np.abs(expected)), "centred")

    again = collect(opened, collected.tokens, gradients=False)
    for name, inputs in again.inputs.items():
        if not name.endswith(("mlp.c_proj", "lm_head")):
            assert not after[name].mean.any()
            largest = np.abs(inputs.mean).max() / np.sqrt(inputs.sample.var(0).mean())
            assert largest < 0.02, f"{name}: a mean is {largest:.3f} of the spread"
