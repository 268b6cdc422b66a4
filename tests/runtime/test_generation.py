"""Whole generations against transformers.generate, token for token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden, assert_close, digest
from support.reference import Reference, assert_as_transformers
from support.tokens import assert_same_tokens
from tokenizers import Tokenizer

import gpt2onnx
from gpt2onnx.errors import PromptError
from gpt2onnx.exporter.validate.cases import cases
from gpt2onnx.runtime.decoding.torch_random import Candidates, Generator, log_softmax
from gpt2onnx.runtime.decoding.torch_topk import ascending, largest

CHECKPOINTS = {
    "97 tokens, tied": {"vocab_size": 97, "n_layer": 2, "weights_seed": 0},
    "130 tokens, untied": {"vocab_size": 130, "n_layer": 3, "tie_word_embeddings": False, "weights_seed": 1},
    "257 tokens, one layer": {"vocab_size": 257, "n_layer": 1, "weights_seed": 2},
    "500 tokens, untied": {"vocab_size": 500, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False, "weights_seed": 3},
    "300 tokens, 48 positions": {"vocab_size": 300, "n_layer": 2, "n_positions": 48, "weights_seed": 4},
}  # fmt: skip
PARTS = 3  # tests that a checkpoint's cases are dealt out to


Pair = tuple[gpt2onnx.Model, Reference]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(
    request: pytest.FixtureRequest,
    make_checkpoint: MakeCheckpoint,
    reference_of: type[Reference],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    folder = make_checkpoint(**CHECKPOINTS[request.param])
    bundle = gpt2onnx.export(folder, tmp_path_factory.mktemp("bundle") / "fp32").folder
    return gpt2onnx.load(bundle, threads=1), reference_of(folder)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_checkpoints(pair: Pair, part: int) -> None:
    model, reference = pair
    everything = cases(model.config.vocab_size, model.config.n_positions, "full")
    assert len(everything) > 200
    # Each checkpoint takes other cases, so that together they cover most; `gpt2onnx parity` runs them all.
    for case in everything[part + PARTS * (model.config.vocab_size % 4) :: 4 * PARTS]:
        assert_as_transformers(model, reference, case.prompt_ids, case.options)


def test_tales(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    selected = cases(tales_model.config.vocab_size, 80, "quick")
    for case in selected:
        assert_as_transformers(tales_model, tales_reference, case.prompt_ids, case.options)


def test_ties_of_sampled_beams(make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path) -> None:
    """Where the end is forced, two tokens are equally likely after each beam."""
    folder = make_checkpoint(n_layer=1, vocab_size=40, n_positions=48)
    model, reference = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / "bundle").folder), reference_of(folder)
    forced = [case for case in cases(40, 48) if case.name.endswith("beams sampled, forced")]
    assert len(forced) == 3
    for case in forced:
        for seed in (case.options["seed"], 1, 2, 3):
            assert_as_transformers(model, reference, case.prompt_ids, case.options | {"seed": seed})


def test_cases_vary() -> None:
    """The cases meet what they are for."""
    for case_list in (cases(97, 64), cases(8192, 512)):
        options = [case.options for case in case_list]
        assert {one.get("num_beams", 1) for one in options} >= {1, 2, 3, 4, 5, 6}
        assert {one.get("early_stopping", False) for one in options} == {True, False, "never"}
        assert any(one.get("length_penalty", 1) < 0 for one in options)
        assert any(len(one["eos_token_id"]) > 3 for one in options if isinstance(one.get("eos_token_id"), list))
        assert len({case.name for case in case_list}) == len(case_list)


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_the_seed_of_a_result_repeats_it(strategy: dict[str, Any], tales_model: gpt2onnx.Model) -> None:
    first = tales_model.generate("The old king", do_sample=True, max_new_tokens=20, **strategy)
    assert first.seed is not None
    assert (
        tales_model.generate("The old king", seed=first.seed, max_new_tokens=20, **strategy).sequences
        == first.sequences
    )
    assert tales_model.generate("The old king", max_new_tokens=2).seed is None


def test_min_new_tokens_replaces_min_length(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    """Also a larger one, and one that the bundle sets."""
    prompt, ends = [446, 306, 258], list(range(0, 8192, 3))
    for least in ({"min_length": 12, "min_new_tokens": 2}, {"min_length": 12}, {"min_new_tokens": 5, "min_length": 2}):
        options = {"eos_token_id": ends, "max_new_tokens": 15} | least
        (expected,) = tales_reference.tokens(prompt, **options)
        assert_same_tokens(tales_model.generate(prompt, **options).sequences[0].token_ids, expected, least)


def test_context_window_ends_a_sequence(pair: Pair) -> None:
    """The last token needs no position: a prompt that fills the window still gets one."""
    model, reference = pair
    n = model.config.n_positions
    prompt = [index % 90 for index in range(n)]
    for strategy in ({}, {"do_sample": True, "seed": 3}, {"num_beams": 3}, {"prompt_lookup": 5}):
        options = {"eos_token_id": 96, "suppress_tokens": [96]} | strategy
        whole = model.generate(prompt, max_new_tokens=50, **options).sequences[0]
        assert (whole.finish_reason, len(whole.token_ids)) == ("context", 1)
        near = model.generate(prompt[: n - 4], max_new_tokens=50, **options).sequences[0]
        assert (near.finish_reason, len(near.token_ids)) == ("context", 5)
        exact = model.generate(prompt[: n - 4], max_new_tokens=5, **options).sequences[0]
        assert exact.finish_reason == "length"
        assert exact.token_ids == near.token_ids
    (expected,) = reference.tokens(prompt, max_new_tokens=1)
    assert model.generate(prompt, max_new_tokens=1).sequences[0].token_ids == expected


def test_finish_reasons(pair: Pair) -> None:
    model, _ = pair
    prompt = [1, 2, 3]
    plain = model.generate(prompt, max_new_tokens=8, eos_token_id=-1).sequences[0]
    assert (plain.finish_reason, len(plain.token_ids)) == ("length", 8)
    end = plain.token_ids[3]
    stopped = model.generate(prompt, max_new_tokens=8, eos_token_id=end).sequences[0]
    first = plain.token_ids.index(end)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", plain.token_ids[: first + 1])


def test_seed_counts_modulo_2_to_the_32(pair: Pair) -> None:
    model, reference = pair
    for seed in (0, 2**32 - 1, 2**32, 2**40 + 77):
        ours = model.generate([5, 6], seed=seed, max_new_tokens=10).sequences[0].token_ids
        assert_same_tokens(ours, reference.tokens([5, 6], seed, do_sample=True, max_new_tokens=10)[0], seed)


def scores_to_draw_from(size: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(size)
    for _ in range(12):
        scores = rng.normal(0, 3, size).astype(np.float32)
        scores[rng.random(size) < rng.choice([0.0, 0.5, 0.9])] = -np.inf
        scores[3] = 1.0
        yield scores


@pytest.mark.parametrize("size", [7, 300, 50257])
@pytest.mark.parametrize("count", [1, 6])
def test_multinomial_draws_as_torch_does(size: int, count: int, golden: Golden) -> None:
    def torchs() -> list[list[list[int]]]:
        import torch

        drawn = []
        for seed, scores in enumerate(scores_to_draw_from(size)):
            torch.manual_seed(seed)
            probabilities = torch.from_numpy(scores).softmax(-1)
            drawn.append([torch.multinomial(probabilities, count).tolist() for _ in range(3)])
        return drawn

    expected = golden.answer(["multinomial", size, count], torchs)
    for seed, scores in enumerate(scores_to_draw_from(size)):
        generator = Generator(seed)
        drawn = [generator.multinomial(Candidates.all(scores), count).tolist() for _ in range(3)]
        assert drawn == expected[seed], f"seed {seed}"


def values_with_ties() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    for size in (1, 2, 3, 8, 16, 17, 40, 130, 582, 3000):
        for kinds in (1, 2, 5, size):
            values = rng.integers(0, kinds, size).astype(np.float32)
            values[rng.random(size) < 0.2] = -np.inf
            yield values


def counts(size: int) -> list[int]:
    return sorted({1, 2, 7, 20, size} & set(range(size + 1)))


def test_order_of_ties_is_torchs(golden: Golden) -> None:
    def torchs() -> list[list[str]]:
        from torch import from_numpy

        return [
            [digest(from_numpy(values).sort().indices.tolist())]
            + [digest(from_numpy(values).topk(count).indices.tolist()) for count in counts(len(values))]
            for values in values_with_ties()
        ]

    expected = golden.answer("order of ties", torchs)
    for number, values in enumerate(values_with_ties()):
        order = [digest(ascending(values))] + [digest(largest(values, count)) for count in counts(len(values))]
        assert order == expected[number], f"{len(values)} values with {len(set(values.tolist()))} kinds"


@pytest.mark.parametrize("steps", [2, 40, 1000, 10**9])
def test_order_of_ties_is_torchs_in_a_beams_vocabularies(steps: int, golden: Golden) -> None:
    """In six times GPT-2's vocabulary; the fewer steps between values, the more of them are equal."""
    values = np.random.default_rng(steps).normal(-10, 2, 6 * 50257)
    values = (np.round(values * steps) / steps).astype(np.float32)
    values[:50257] = -np.inf

    def torchs(count: int) -> list[int]:
        from torch import from_numpy

        return from_numpy(values).topk(count).indices.tolist()

    for count in (1, 12, 18, 300):
        expected = golden.answer(["largest", steps, count], lambda count=count: torchs(count))
        assert_same_tokens(largest(values, count).tolist(), expected, f"{count} largest")


def test_nothing_possible_is_no_crash(pair: Pair) -> None:
    """Where transformers fails, because every token is forbidden, decoding goes on somehow."""
    model, _ = pair
    everything = list(range(model.config.vocab_size))
    everywhere = {"do_sample": True, "seed": 0, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.5}
    for strategy in ({}, {"do_sample": True, "seed": 0}, everywhere, {"num_beams": 2}, everywhere | {"num_beams": 2}):
        result = model.generate([1], max_new_tokens=3, suppress_tokens=everything, **strategy)
        assert len(result.sequences) == 1


def chosen(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of each token but the first, given those before it."""
    return logprobs[np.arange(len(ids) - 1), ids[1:]]


def test_score_agrees_with_transformers(pair: Pair, golden: Golden) -> None:
    model, reference = pair
    ids = np.random.default_rng(0).integers(0, 90, 40)
    expected = golden.array(["score", reference.name], lambda: chosen(log_softmax(reference.live_logits(ids)), ids))
    assert_close(np.array(model.score(ids.tolist()).logprobs), expected, 2e-4)


def test_a_text_may_have_a_token_more_than_the_context_window(tales_model: gpt2onnx.Model) -> None:
    """The last token is only predicted."""
    ids = np.random.default_rng(0).integers(1000, size=tales_model.config.n_positions + 2).tolist()
    assert tales_model.score(ids[:-1]).logprobs == tales_model.score(ids[1:-1], prompt=ids[:1]).logprobs
    with pytest.raises(PromptError, match="evaluate"):
        tales_model.score(ids)


def test_logprobs(pair: Pair, golden: Golden) -> None:
    model, reference = pair
    prompt = [4, 5, 6]
    sequence = model.generate(prompt, max_new_tokens=10, logprobs=4, temperature=0.7, top_k=5, seed=1).sequences[0]
    assert sequence.logprobs is not None
    assert [one.token_id for one in sequence.logprobs] == sequence.token_ids
    ids = prompt + sequence.token_ids

    def torchs() -> list[dict[str, Any]]:
        import torch

        rows = torch.from_numpy(reference.live_logits(np.array(ids)))[len(prompt) - 1 : -1]
        return [
            {
                "logprob": float(row.log_softmax(-1)[token]),
                "processed": (row / 0.7).topk(5).values.log_softmax(-1).tolist(),
                "top": list(zip(*(part.tolist() for part in reversed(row.log_softmax(-1).topk(4))), strict=True)),
            }
            for token, row in zip(sequence.token_ids, rows, strict=True)
        ]

    for one, expected in zip(sequence.logprobs, golden.answer(["logprobs", reference.name, ids], torchs), strict=True):
        assert one.logprob == pytest.approx(expected["logprob"], abs=2e-4)
        assert min(abs(one.processed_logprob - value) for value in expected["processed"]) < 2e-4
        assert [token for token, _ in one.top] == [token for token, _ in expected["top"]]
        values = [value for _, value in expected["top"]]
        np.testing.assert_allclose([value for _, value in one.top], values, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5, "eos_token_id": list(range(40))},
        {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": True, "top_k": 5, "temperature": 0.7, "seed": 1},
    ],
    ids=["plain", "processed", "sampled"],
)
def test_logprobs_of_beams(pair: Pair, golden: Golden, options: dict[str, Any]) -> None:
    model, reference = pair
    if reference.leaves_out(options):
        return
    prompt = [4, 5, 6]
    result = model.generate(prompt, max_new_tokens=10, logprobs=2, **options)

    def transition_scores() -> list[list[float]]:
        import torch

        theirs = {name: value for name, value in options.items() if name != "seed"}
        torch.manual_seed(options.get("seed", 0))
        with torch.no_grad():
            made = reference.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, 3), max_new_tokens=10, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True, **theirs,
            )  # fmt: skip
        indices = made.beam_indices
        scores = reference.model.compute_transition_scores(made.sequences, made.scores, indices)
        return [row[: (index >= 0).sum()].tolist() for row, index in zip(scores, indices, strict=True)]

    expected = golden.answer(["transition scores", reference.name, options], transition_scores)
    for sequence, scores in zip(result.sequences, expected, strict=True):
        assert sequence.logprobs is not None
        assert [one.token_id for one in sequence.logprobs] == sequence.token_ids
        assert [one.processed_logprob for one in sequence.logprobs] == pytest.approx(scores, abs=2e-4)
        assert sum(scores) / len(scores) ** options.get("length_penalty", 1.0) == pytest.approx(
            sequence.score, abs=1e-3
        )
        # The network's own, as those of any other text.
        own = model.score(sequence.token_ids, prompt=prompt).logprobs
        assert [one.logprob for one in sequence.logprobs] == pytest.approx(own, abs=2e-4)
        assert all(len(one.top) == 2 and one.top[0][1] >= one.logprob for one in sequence.logprobs)


def test_special_tokens_stop_as_in_transformers(
    make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    """A stop string may be a special token, which no text shows, or hold one."""
    folder = make_checkpoint(vocab_size=290, eos_token_id=None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<{index}>" for index in range(290 - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    reference = reference_of(folder)
    model = gpt2onnx.load(gpt2onnx.export(folder, tmp_path / "bundle").folder, threads=1)
    met = 0
    for prompt in ("a", "the", "Once", "xyz", "0"):
        ids = model.generate(prompt, max_new_tokens=40).sequences[0].token_ids
        special = next((index for index, token in enumerate(ids) if index and token > 256), None)
        if special is None:
            continue
        met += 1
        stop = tokenizer.decode(ids[special : special + 1], skip_special_tokens=False)
        prompt_ids = model.prompt_ids(prompt).tolist()
        (expected,) = reference.tokens(prompt_ids, max_new_tokens=40, stop_strings=[stop])
        sequence = model.generate(prompt, max_new_tokens=40, stop=stop).sequences[0]
        assert_same_tokens(sequence.token_ids, expected, stop)
        assert (sequence.token_ids, sequence.finish_reason) == (ids[: special + 1], "stop")
        assert stop not in sequence.text
    assert met
