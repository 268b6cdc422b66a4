"""Processors and warpers composed as transformers composes them, for options drawn at random."""

from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.logits import INF, SIZE, SMALL, apply_reference, assert_same, reference_chain
from support.versions import skip_with_transformers_4

from gpt2onnx.runtime.decoding import filters as our_warpers
from gpt2onnx.runtime.decoding import processors as ours
from gpt2onnx.runtime.decoding.torch_random import Candidates, softmax
from gpt2onnx.runtime.options import GenerationConfig

OPTIONS = st.fixed_dictionaries(
    {
        "do_sample": st.booleans(),
        "eos_token_id": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3, unique=True),
        "max_length": st.integers(4, 13),
    },
    optional={
        "sequence_bias": st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.floats(-9, 9)).map(list), min_size=1, max_size=4),
        "encoder_repetition_penalty": st.sampled_from([0.7, 1.2, 3.0]),
        "encoder_no_repeat_ngram_size": st.integers(1, 4),
        "forced_bos_token_id": st.integers(0, SIZE - 1),
        "forced_eos_token_id": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3) | st.integers(0, SIZE - 1),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 5), st.sampled_from([0.8, 1.1, 2.0])),
        "begin_suppress_tokens": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30),
        "top_h": st.sampled_from([0.13, 0.51, 0.93]),
        "epsilon_cutoff": st.sampled_from([0.0, 0.01, 0.1, 1.0]),
        "eta_cutoff": st.sampled_from([0.0, 0.01, 0.1, 1.0]),
        "num_beams": st.integers(1, 3),
        "repetition_penalty": st.sampled_from([0.7, 1.2, 3.0]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4),
        "min_length": st.integers(1, 20),
        "min_new_tokens": st.integers(1, 10),
        "suppress_tokens": st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30),
        "temperature": st.sampled_from([0.3, 0.9, 2.5]),
        "top_k": st.sampled_from([0, 1, 7, 30, 100]),
        "top_p": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "typical_p": st.sampled_from([0.2, 0.9, 1.0]),
    },
)  # fmt: skip


@settings(max_examples=300)
@given(
    options=OPTIONS,
    length=st.sampled_from([1, 3]),
    scores=st.sampled_from([name for name in SMALL if name != "one survivor"]),
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_composed_as_transformers_does(options: dict[str, Any], length: int, scores: str, tokens: list[int]) -> None:
    skip_with_transformers_4("it has no top_h, keeps others of tokens that tie, and makes NaN of what is forbidden")
    # Neither transformers nor this takes options that force and suppress the same token.
    end = options.get("forced_eos_token_id", [])
    for forced in ([options.get("forced_bos_token_id", -1)], end if isinstance(end, list) else [end]):
        assume(not forced or not set(forced) <= set(options.get("suppress_tokens", ())))
    chain = ours.processors(GenerationConfig(**options), np.array(tokens[:length]))
    warpers = our_warpers.warpers(GenerationConfig(**options))
    expected = SMALL[scores]
    theirs = reference_chain(options | {"top_k": options.get("top_k", 50)}, tokens[:length])
    # Compared after each one, as later ones may find nothing but -inf, and transformers NaN.
    assert len(chain) + len(warpers) == len(theirs), f"transformers has {[type(one).__name__ for one in theirs]}"
    for mine, their in zip(chain, theirs, strict=False):
        actual = ours.process([mine], np.array(tokens), expected)
        expected = apply_reference(their, tokens, expected)
        assert_same(actual, expected, type(their).__name__)
    candidates = Candidates.all(expected)
    for warper, their in zip(warpers, theirs[len(chain) :], strict=True):
        if (expected == -INF).all():
            return
        probabilities = softmax(expected)
        candidates = warper(candidates)
        expected = apply_reference(their, tokens, expected)
        if type(their).__name__ == "TopHLogitsWarper":
            # Where one entry has nearly all weight, the entropy is little more than PyTorch's own rounding of it.
            differing = candidates.dense() != expected
            assert probabilities[differing].sum() < 1e-6
            candidates = Candidates.all(expected).possible()
        assert_same(candidates.dense(), expected, type(their).__name__)
