"""Requests of all kinds with each source of drafts, on a real network: the tokens of plain decoding."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import inputs

import gpt2onnx
from gpt2onnx.runtime.engine.graphs import runs_ragged

WORDS = "Once upon a time there lived an old king in the forest , and his three sons said : let us go to the castle ."
PROMPTS = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=30).map(" ".join)
OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 40)},
    optional={
        "do_sample": st.just(True),
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 1.5]),
        "top_k": st.sampled_from([0, 1, 5, 50]),
        "top_p": st.sampled_from([0.5, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.2, 1.8]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_new_tokens": st.integers(0, 10),
        "bad_words_ids": st.just([[11], [262, 13]]),
        "stop": st.sampled_from([[" the"], ["\n", "king"]]),
        "logprobs": st.integers(0, 2),
        "num_return_sequences": st.integers(1, 3),
        "num_beams": st.sampled_from([1, 1, 1, 3]),
    },
)
SOURCES = {
    "lookup": {"draft": "lookup"},
    "twin": {"draft": "twin"},
    "twin, 4 tokens": {"draft": "twin", "draft_length": 4},
    "draft model": {"draft_length": 3},
}


@pytest.fixture(scope="module")
def plain(tales_twin_bundle: Path) -> gpt2onnx.Model:
    return gpt2onnx.load(tales_twin_bundle, draft="none", threads=1)


@pytest.fixture(scope="module", params=SOURCES)
def drafting(request: pytest.FixtureRequest, tales_twin_bundle: Path, tales_int8_bundle: Path) -> gpt2onnx.Model:
    if request.param.startswith("twin") and not runs_ragged():
        pytest.skip("twins run on ONNX Runtime from 1.32 on")
    other = {"draft_model": tales_int8_bundle} if request.param == "draft model" else {}
    return gpt2onnx.load(tales_twin_bundle, threads=1, **SOURCES[request.param], **other)


@inputs(few=6)
@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=4),
    options=OPTIONS,
    seed=st.integers(0, 2**32),
    batch_size=st.integers(1, 4),
)
def test_drafted_tokens_are_plain_ones(
    plain: gpt2onnx.Model, drafting: gpt2onnx.Model, prompts: list[str], options: dict[str, Any], seed: int, batch_size: int
) -> None:  # fmt: skip
    sampled = options.get("do_sample", False)
    if not sampled:  # these options would turn sampling on; several greedy sequences are refused without beams
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_k", "top_p")}
        options["num_return_sequences"] = min(options.get("num_return_sequences", 1), options.get("num_beams", 1))
    if "num_beams" in options:
        options["num_return_sequences"] = 1
    given_options = options | ({"seed": seed} if sampled else {})

    def tokens(model: gpt2onnx.Model) -> list[list[list[int]]]:
        results = model.generate(prompts, batch_size=batch_size, **given_options)
        return [[sequence.token_ids for sequence in result.sequences] for result in results]

    assert tokens(drafting) == tokens(plain)
