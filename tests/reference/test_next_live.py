"""`gpt2onnx next` on a model's own logits, which each machine rounds in its own way."""

from typing import Any

import numpy as np
import pytest
from support.golden import assert_close
from support.logits import FILTERS, assert_same, options_of, reference_steps, softmax_of_torch
from support.reference import Reference
from support.versions import skip_with_transformers_4

import gpt2onnx
from gpt2onnx.experiments.next_token import next_token, stages

PROMPT = "Once upon a time there was a"


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_stage_is_that_of_transformers(
    temperature: float, filters: dict[str, Any], tales_model: gpt2onnx.Model, tales_reference: Reference
) -> None:
    if "top_h" in filters:
        skip_with_transformers_4("it has no top_h")
    ids = tales_model.tokenizer.encode(PROMPT)
    values = {"temperature": temperature} | filters
    if "penalties" in filters:
        # One more option than sampling has: what holds without sampling comes first.
        logits = next_token(tales_model, PROMPT).choices[0].stages[0].scores
        way = stages(logits, options_of(values), np.array(ids))
    else:
        (choice,) = next_token(tales_model, PROMPT, temperatures=[temperature], **{"top_k": 0} | filters).choices
        way = choice.stages
    assert_close(way[0].scores, tales_reference.live_logits(np.array(ids))[-1], 1e-4)
    # From here on the same numbers on both sides, so that whatever differs is the step's own.
    expected = reference_steps(values, ids, way[0].scores)
    assert [stage.name for stage in way] == [name for name, _ in expected]
    for stage, (name, scores) in zip(way, expected, strict=True):
        assert_same(stage.scores, scores, name)
        assert_close(stage.probabilities, softmax_of_torch(scores), 1e-6, name)
