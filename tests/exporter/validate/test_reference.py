"""Logits and tokens against transformers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden, assert_close
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.models.bundle import WEIGHTS, Bundle
from gpt2onnx.runtime.decoding.torch_random import log_softmax
from gpt2onnx.runtime.engine.runner import Runner

TOLERANCE = 1e-4
PROMPTS = [
    "Once upon a time",
    "The old king",
    "“What is that?” said the little girl; and she",
    "In the middle of the forest there stood a house, and in the house lived a woman who had two daughters.",
    "x",
]
# How a sequence goes through the network: the lengths of its chunks, the last of which repeats.
WAYS = {"whole": [10_000], "chunks": [3, 1, 29, 100, 2, 17], "steps": [1]}


def ort_logits(session: Runner, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
    """Logits at every position, float32 [length, vocabulary], with the cache carrying from chunk to chunk."""
    cache = session.new_cache(1, len(ids))
    parts = []
    done = 0
    for index in range(len(ids)):
        size = min(chunks[min(index, len(chunks) - 1)], len(ids) - done)
        if not size:
            break
        parts.append(session.forward(cache, slice(0, 1), ids[None, done : done + size], logits="all").copy())
        done += size
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def tales_session(tales_bundle: Path) -> Runner:
    return Runner(Bundle.open(tales_bundle), threads=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 2, 33, 200, 512])
def test_logits_of_tales(length: int, way: str, tales_session: Runner, tales_reference: Reference) -> None:
    ids = np.random.default_rng(length).integers(0, tales_session.config.vocab_size, length)
    assert_close(ort_logits(tales_session, ids, WAYS[way]), tales_reference.logits(ids), TOLERANCE)


# Of what a whole window may show; tests/exporter/graph/test_graph.py has every configuration and activation.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "three layers, five heads": {"n_layer": 3, "n_head": 5, "n_embd": 40},
    "heads of 64": {"n_embd": 128, "n_head": 2, "initializer_range": 0.15},
    "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "quick_gelu": {"activation_function": "quick_gelu"},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_random_checkpoints(
    name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    folder = make_checkpoint(**CHECKPOINTS[name])
    session = Runner(gpt2onnx.export(folder, tmp_path / "bundle"), threads=1)
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, session.config.n_positions)
    expected = reference_of(folder).logits(ids)
    assert np.nanstd(expected) > 0.5, "such a checkpoint can't tell right from wrong"
    for length in (1, 6, len(ids)):
        for way, chunks in WAYS.items():
            found = ort_logits(session, ids[:length], chunks)
            assert_close(found, expected[:length], TOLERANCE, f"{length} tokens, {way}")


@pytest.mark.parametrize("name", ["plain", "untied", "three layers, five heads", "quick_gelu"])
def test_tokens_of_random_checkpoints(
    name: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference]
) -> None:
    folder = make_checkpoint(weights_seed=1, **CHECKPOINTS[name])
    model, reference = gpt2onnx.load(folder, threads=1), reference_of(folder)
    for prompt_ids in ([5], [100, 7, 256], list(range(40))):
        options = {"max_new_tokens": 64 - len(prompt_ids)}
        (expected,) = reference.tokens(prompt_ids, **options)
        assert_same_tokens(model.generate(prompt_ids, **options).sequences[0].token_ids, expected, prompt_ids)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_of_tales(prompt: str, tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    result = tales_model.generate(prompt, max_new_tokens=64)
    (expected,) = tales_reference.tokens(result.prompt_ids, max_new_tokens=64, do_sample=False)
    assert_same_tokens(result.sequences[0].token_ids, expected, prompt)


def test_fifty_seeds_give_the_tokens_of_transformers(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    distinct = set()
    for seed in range(50):
        prompt = PROMPTS[seed % len(PROMPTS)]
        options = {"temperature": 0.6 + seed / 50, "top_k": 5 + 4 * seed, "top_p": 0.75 + 0.005 * seed}
        options |= {"max_new_tokens": 24, "do_sample": True}
        result = tales_model.generate(prompt, seed=seed, **options)
        (expected,) = tales_reference.tokens(result.prompt_ids, seed, **options)
        assert_same_tokens(result.sequences[0].token_ids, expected, f"seed {seed}, prompt {prompt!r}")
        distinct.add(tuple(expected))
    assert len(distinct) > 45


def test_sampling_draws_from_the_whole_vocabulary(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    prompt = tales_model.tokenizer.encode(PROMPTS[0])
    for seed in (2**32 + 5, 5, 2**31, 12345):
        options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0, "temperature": 1.3}
        (expected,) = tales_reference.tokens(prompt, seed, **options)
        actual = tales_model.generate(prompt, seed=seed, **options).sequences[0].token_ids
        assert_same_tokens(actual, expected, f"seed {seed}")


def test_tied_weights_are_stored_once(tales_bundle: Path, tales_reference: Reference, golden: Golden) -> None:
    def parameters() -> int:  # tied ones count once
        return sum(parameter.numel() for parameter in tales_reference.model.parameters())

    weights = 4 * golden.answer("parameters of tales", parameters)
    size = (tales_bundle / WEIGHTS).stat().st_size
    assert weights <= size < 1.02 * weights, f"{size} bytes for weights of {weights}"


def test_int8_is_close_to_fp32(
    tales_bundle: Path, tales_int8_bundle: Path, tales_session: Runner, tales_model: gpt2onnx.Model
) -> None:
    session = Runner(Bundle.open(tales_int8_bundle), threads=1)
    text = tales_model.generate(PROMPTS[0], max_new_tokens=400, do_sample=True, seed=1).sequences[0].token_ids
    ids = np.array(tales_model.tokenizer.encode(PROMPTS[0]) + text)
    logits = [ort_logits(each, ids, WAYS["whole"]) for each in (tales_session, session)]
    exact, quantised = map(log_softmax, logits)
    divergence = float((np.exp(exact) * (exact - quantised)).sum(-1).mean())
    assert 0 < divergence < 0.002, f"KL {divergence:.5f} nats a token"

    # Two logits change places with the probability that their errors, which are nearly normal, outweigh what they lie apart.
    second, first = np.sort(logits[0], -1)[:, -2:].T
    apart = (first - second) / (math.sqrt(2) * (logits[1] - logits[0]).std(-1))
    expected = sum(math.erfc(each / math.sqrt(2)) / 2 for each in apart)
    differs = exact.argmax(-1) != quantised.argmax(-1)
    assert differs.sum() < expected + 4 * math.sqrt(expected) < 0.08 * len(ids)
    assert not (differs & (apart > 5)).any()
    small, large = ((bundle / WEIGHTS).stat().st_size for bundle in (tales_int8_bundle, tales_bundle))
    assert small < 0.3 * large
