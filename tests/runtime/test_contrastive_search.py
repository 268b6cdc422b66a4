"""Contrastive search against the last transformers that has it in its core: see the Makefile's `former`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file
from support.bundles import edit_graphs, remove_output
from support.checkpoints import MakeCheckpoint
from support.reference import Reference, assert_as_transformers

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.models import contract
from gpt2onnx.models.bundle import GRAPH, RAGGED_GRAPH
from gpt2onnx.runtime.engine.graphs import runs_ragged

pytestmark = pytest.mark.skipif(not runs_ragged(), reason="hidden states come with ONNX Runtime 1.32")
PROMPT = [5, 60, 7, 31]
OTHERS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "min_new_tokens": 5, "eos_token_id": [7, 8, 9, 10]},
    {"no_repeat_ngram_size": 2, "sequence_bias": [[[3], 2.5], [[9, 9], -4.0]], "renormalize_logits": True},
    {"suppress_tokens": [1, 2, 17], "eos_token_id": list(range(40, 60))},
]


@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_random_checkpoint(pair: tuple[gpt2onnx.Model, Reference], others: dict[str, Any]) -> None:
    for penalty in (0.1, 0.6, 1.0):
        for top_k in (2, 5, 50):
            given = {"penalty_alpha": penalty, "top_k": top_k, "max_new_tokens": 24}
            assert_as_transformers(*pair, PROMPT, given | others)


def test_tales(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    for text in ("Once upon a time there was a", "The king"):
        prompt = tales_model.tokenizer.encode(text)
        for penalty, top_k in ((0.4, 3), (0.6, 4), (0.8, 8)):
            options = {"penalty_alpha": penalty, "top_k": top_k, "max_new_tokens": 60}
            assert_as_transformers(tales_model, tales_reference, prompt, options)


def test_beside_others_and_streamed(tales_model: gpt2onnx.Model) -> None:
    """Batches, streams, stop strings and log probabilities; the last prompt is read in several parts."""
    prompts = ["Once upon a time", "The king", "In the forest there lived", "He said: 'I am a very old man.' " * 12]
    given: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 24}
    for options, batch_sizes in (({}, (2, 8)), ({"stop": [" the"], "logprobs": 2}, (2,)), ({"prompt_lookup": 5}, (8,))):
        alone = [tales_model.generate(prompt, **given, **options).sequences[0] for prompt in prompts]
        assert len({each.text for each in alone}) == len(prompts)
        for batch_size in batch_sizes:
            together = tales_model.generate(prompts, batch_size=batch_size, **given, **options)
            assert [each.sequences[0].token_ids for each in together] == [each.token_ids for each in alone]
        for prompt, sequence in zip(prompts, alone, strict=True):
            stream = tales_model.stream(prompt, **given, **options)
            assert "".join(stream) == sequence.text
            assert len(sequence.logprobs or sequence.token_ids) == len(sequence.token_ids)


def test_extensions(pair: tuple[gpt2onnx.Model, Reference]) -> None:
    """A criterion ends it; the caller's functions see each token once, and none are asked behind the last one."""
    model, _ = pair
    given: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": -1, "max_new_tokens": 9}
    whole = model.generate(PROMPT, **given).sequences[0].token_ids
    seen: list[list[int]] = []
    result = model.generate(
        PROMPT,
        prefix_allowed_tokens_fn=lambda index, ids: list(range(97)) if len(ids) < 9 else [],
        stopping_criteria=[lambda ids, scores: seen.append(ids[0].tolist()) or ids.shape[1] == 9],
        **given,
    )
    assert (result.sequences[0].token_ids, result.sequences[0].finish_reason) == (whole[:5], "stop")
    assert seen == [PROMPT + whole[:count] for count in range(1, 6)]


def test_one_candidate_is_greedy_search(tales_model: gpt2onnx.Model) -> None:
    """Also where the likeness to earlier tokens has next to no weight."""
    greedy = tales_model.generate("The king", max_new_tokens=20).sequences
    assert tales_model.generate("The king", max_new_tokens=20, penalty_alpha=0.6, top_k=1).sequences == greedy
    light = tales_model.generate("The king", max_new_tokens=20, penalty_alpha=1e-6, top_k=4).sequences
    assert light[0].token_ids == greedy[0].token_ids


def test_the_context_window_ends_it(pair: tuple[gpt2onnx.Model, Reference]) -> None:
    """Its last token needs a position, too."""
    model, _ = pair
    context, options = model.config.n_positions, {"penalty_alpha": 0.5, "top_k": 3, "eos_token_id": -1}
    for length in (5, context - 1, context):
        (sequence,) = model.generate([7] * length, max_new_tokens=200, **options).sequences
        assert (sequence.finish_reason, len(sequence.token_ids)) == ("context", context - length)


def test_hidden_states_leave_the_graph_that_others_load_as_it_is(pair: tuple[gpt2onnx.Model, Reference]) -> None:
    folder = pair[0].bundle.folder
    graphs = [onnx.load(folder / name, load_external_data=False).graph for name in (GRAPH, RAGGED_GRAPH)]
    interchange, own = [{each.name for each in graph.output} for graph in graphs]
    assert own == interchange | {contract.HIDDEN}


def test_hidden_states_of_all_precisions(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """What comes with the logits is what the head multiplies: in fp32 up to rounding, in fp16 as halves."""
    folder = make_checkpoint(vocab_size=97, weights_seed=6, tie_word_embeddings=False)
    for dtype, tolerance in (("fp32", 1e-4), ("fp16", 2e-2)):
        model = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / dtype, dtype=dtype).folder)
        runner = model.runner
        tokens = np.array([[5, 60, 7, 31], [9, 9, 0, 0]])
        logits = runner.forward(runner.new_cache(2, 8), slice(0, 2), tokens, np.array([4, 2]), "all")
        assert runner.hidden.shape == (6, 32)
        head = load_file(folder / "model.safetensors")["lm_head.weight"]
        np.testing.assert_allclose(runner.hidden @ head.T, logits, atol=tolerance)


def test_refused(pair: tuple[gpt2onnx.Model, Reference], tmp_path: Path) -> None:
    model, _ = pair
    given: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4}
    for options, message in (
        ({"guidance_scale": 2.0}, "can't be guided"),
        ({"num_return_sequences": 2}, "contrastive search has one result"),
        ({"top_k": 98}, "top_k 98 is above the vocabulary's 97"),
        ({"penalty_alpha": 1.5}, "penalty_alpha must be a number from 0 to 1"),
    ):
        with pytest.raises(OptionError, match=message):
            model.generate(PROMPT, **given | options)


def test_a_bundle_of_an_earlier_version_says_how_to_mend_it(
    pair: tuple[gpt2onnx.Model, Reference], tmp_path: Path
) -> None:
    """Bundles whose graph doesn't return hidden states do all else."""
    folder = shutil.copytree(pair[0].bundle.folder, tmp_path / "earlier")
    edit_graphs(folder, lambda model: remove_output(model, contract.HIDDEN), RAGGED_GRAPH)
    earlier = gpt2onnx.load(folder)
    assert earlier.generate(PROMPT).sequences == pair[0].generate(PROMPT).sequences
    with pytest.raises(
        OptionError, match="hidden states, which the bundle doesn't return on cpu: export it again"
    ) as error:
        earlier.generate(PROMPT, penalty_alpha=0.6, top_k=4)
    assert "\n" not in str(error.value)


def test_sampling_options_beside_it() -> None:
    """top_k belongs to contrastive search and so doesn't turn sampling on; other sampling options do."""
    options = gpt2onnx.GenerationConfig().merged({"penalty_alpha": 0.6, "top_k": 4})
    assert options.strategy == "contrastive search"
    assert options.merged({"temperature": 0.7}).strategy == "sampling"
    assert options.merged({"do_sample": True}).strategy == "sampling"
    assert options.merged({"num_beams": 2}).strategy == "beam search"
