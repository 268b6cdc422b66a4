"""Every processor and warper against the transformers class of the same job, alone and composed."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from support.golden import Golden
from support.logits import (
    INF,
    LARGE,
    LOGITS,
    SIZE,
    SMALL,
    apply_reference,
    assert_same,
    coded,
    decoded,
    reference,
    reference_chain,
)
from support.versions import skip_with_transformers_4

from gpt2onnx.runtime.arrays import Logits, Tokens
from gpt2onnx.runtime.decoding import filters as our_warpers
from gpt2onnx.runtime.decoding import processors as ours
from gpt2onnx.runtime.decoding.strategy import Scores
from gpt2onnx.runtime.decoding.torch_random import Candidates, softmax
from gpt2onnx.runtime.extensions import Extensions
from gpt2onnx.runtime.options import GenerationConfig

PROMPTS = ([7], [3, 5, 3], [1, 2, 3, 1, 2, 3, 1, 2], list(range(12)) * 2)
# What makes scores out of tokens and scores.
Way = Callable[[np.ndarray, np.ndarray], np.ndarray]
PAIRS: dict[str, tuple[Way, Callable[[], Any]]] = {}


def pair(name: str, mine: Callable[[], ours.Processor], theirs: str, *arguments: Any) -> None:
    """Notes a processor of ours, and the class and arguments of transformers' own."""
    PAIRS[name] = lambda tokens, scores: ours.process([mine()], tokens, scores), lambda: reference(theirs, *arguments)


def warper_pair(
    name: str, mine: Callable[[], our_warpers.Warper], theirs: str, *arguments: Any, **options: Any
) -> None:
    PAIRS[name] = (
        lambda _, scores: our_warpers.warp([mine()], scores).dense(),
        lambda: reference(theirs, *arguments, **options),
    )


for penalty in (0.5, 1.3, 7.0):
    pair(f"repetition penalty {penalty}", lambda p=penalty: ours.repetition_penalty(p), "RepetitionPenaltyLogitsProcessor", penalty)  # fmt: skip
for size in (1, 2, 3, 5, 9, 40):
    pair(f"no {size}-grams", lambda n=size: ours.no_repeat_ngram(n), "NoRepeatNGramLogitsProcessor", size)
WORDS = [[4], [9], [3, 6], [5, 3, 8], [2, 3, 1, 2, 9], [1, 1], list(range(30))]
for ends in ([9], [4, 9], [1000], []):
    pair(f"bad words, ends {ends}", lambda e=ends: ours.bad_words(WORDS, e), "NoBadWordsLogitsProcessor", WORDS, np.array(ends))  # fmt: skip
for length, ends in ((0, [9]), (5, [9]), (50, [3, 9]), (50, [9, 100_000]), (3, [0])):
    pair(f"min length {length}, ends {ends}", lambda n=length, e=ends: ours.min_length(n, e), "MinLengthLogitsProcessor", length, ends)  # fmt: skip
for tokens in ([0], [3, 17, 30, 59], list(range(SIZE)), [2, 100_000]):
    pair(f"suppress {len(tokens)}, {tokens[-1]}", lambda t=tokens: ours.suppress(t), "SuppressTokensLogitsProcessor", tokens)  # fmt: skip
for penalty in (0.5, 1.3, 7.0):
    pair(f"repetition penalty {penalty} of a prompt", lambda p=penalty: ours.repetition_penalty(1 / p, np.array([7, 3, 3, 40])), "EncoderRepetitionPenaltyLogitsProcessor", penalty, np.array([[7, 3, 3, 40]]))  # fmt: skip
for size in (1, 2, 3, 5, 9):
    # Sequences that begin with it, as all do, and one that goes on.
    for begin in ([1], [1, 2, 3], [1, 2, 3, 1, 2, 3, 1, 2]):
        pair(f"no {size}-grams of {begin}", lambda n=size, b=begin: ours.no_repeat_ngram(n, np.array(b)), "EncoderNoRepeatNGramLogitsProcessor", size, np.array([begin]))  # fmt: skip
BIASES = [
    [[4], 1.5],
    [[3, 6], -0.3],
    [[2, 4], 0.7],
    [[5, 3, 4], 1e-3],
    [[3, 4], -2.0],
    [[9], -1e30],
    [[4], 2.5],
    [list(range(30)), 1.0],
]
pair("sequence bias", lambda: ours.sequence_bias(BIASES), "SequenceBiasLogitsProcessor", [[ids, float(bias)] for ids, bias in BIASES])  # fmt: skip
pair("forced first", lambda: ours.forced([9], 1), "ForcedBOSTokenLogitsProcessor", 9)
for ids in ([9], [3, 59]):
    for length in (1, 3, 8, 24, 25):
        pair(f"forced {ids} after {length}", lambda i=ids, n=length: ours.forced(i, n), "ForcedEOSTokenLogitsProcessor", length + 1, ids)  # fmt: skip
for start, factor, ends in ((0, 1.05, [9]), (2, 3.0, [3, 9, 59]), (5, 0.5, [9, 9]), (30, 2.0, [9]), (0, 1.0, [0])):
    pair(f"decay {factor} from {start}, ends {ends}", lambda s=start, f=factor, e=ends: ours.exponential_decay(s, f, e), "ExponentialDecayLengthPenalty", (start, factor), ends, 0)  # fmt: skip
for length in (1, 3, 8):
    pair(f"suppress after {length}", lambda n=length: ours.suppress([3, 17], n), "SuppressTokensAtBeginLogitsProcessor", [3, 17], length)  # fmt: skip
for value in (0.01, 0.7, 1.9, 300.0):
    warper_pair(f"temperature {value}", lambda t=value: our_warpers.temperature(t), "TemperatureLogitsWarper", value)
for keep in (1, 2, 3):
    for k in (1, 2, 5, 59, 60, 61, 10_000):
        warper_pair(f"top-k {k}, at least {keep}", lambda k=k, m=keep: our_warpers.top_k(k, m), "TopKLogitsWarper", k, min_tokens_to_keep=keep)  # fmt: skip
    for p in (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        warper_pair(f"top-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.top_p(p, m), "TopPLogitsWarper", p, min_tokens_to_keep=keep)  # fmt: skip
        warper_pair(f"min-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.min_p(p, m), "MinPLogitsWarper", p, min_tokens_to_keep=keep)  # fmt: skip
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        warper_pair(f"typical-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.typical_p(p, m), "TypicalLogitsWarper", p, min_tokens_to_keep=keep)  # fmt: skip
    for p in (1e-6, 0.003, 0.02, 0.3, 0.999):
        warper_pair(f"epsilon {p}, at least {keep}", lambda p=p, m=keep: our_warpers.epsilon_cutoff(p, m), "EpsilonLogitsWarper", p, min_tokens_to_keep=keep)  # fmt: skip
        warper_pair(f"eta {p}, at least {keep}", lambda p=p, m=keep: our_warpers.eta_cutoff(p, m), "EtaLogitsWarper", p, min_tokens_to_keep=keep)  # fmt: skip
# No share of 60 equal entries is a whole number of them: there the last digit of the sum would decide.
for p in (1e-6, 0.13, 0.51, 0.93, 0.99):
    warper_pair(f"top-h {p}", lambda p=p: our_warpers.top_h(p), "TopHLogitsWarper", p)


def summary(outputs: Iterable[np.ndarray]) -> str:
    """Stands for scores too many for a golden file, to the last bit: in words only how many entries are left of each."""
    arrays = [np.asarray(each, np.float32) + np.float32(0) for each in outputs]  # -0 is 0
    left = ", ".join(str(np.count_nonzero(each > -INF)) for each in arrays)
    return f"{left} left, {hashlib.sha256(b''.join(each.tobytes() for each in arrays)).hexdigest()[:12]}"


OTHERWISE_IN_4 = {
    "top-h": "it has no top_h",
    "min-p": "of tokens that tie it keeps others",
    "decay": "it makes NaN of what is forbidden",
    "sequence bias": "it takes no bias of token 0",
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_transformers(name: str, golden: Golden) -> None:
    for kind, how in OTHERWISE_IN_4.items():
        if name.startswith(kind) and not (kind == "min-p" and name.endswith("at least 1")):
            skip_with_transformers_4(how)
    mine, make_theirs = PAIRS[name]

    def transformers(scores: np.ndarray) -> list[np.ndarray]:
        theirs = make_theirs()  # anew, as transformers' bad words remember the vocabulary
        return [apply_reference(theirs, prompt, scores) for prompt in PROMPTS]

    def ours_of(label: str, scores: np.ndarray) -> list[np.ndarray]:
        found = []
        for prompt in PROMPTS:
            untouched = scores.copy()
            found.append(mine(np.array(prompt), scores))
            assert_same(scores, untouched, f"{name} wrote to its argument")
            assert found[-1].dtype == np.float32, label
        return found

    # [logits, prompt, vocab]
    expected = golden.array(
        [name, "small"], lambda: np.stack([coded(each, np.stack(transformers(each))) for each in SMALL.values()])
    )
    for (label, scores), stored in zip(SMALL.items(), expected, strict=True):
        for actual, prompt, one in zip(ours_of(label, scores), PROMPTS, stored, strict=True):
            assert_same(actual, decoded(scores, one), f"{name} on {label} after {prompt}")
    large = golden.answer([name, "large"], lambda: [summary(transformers(each)) for each in LARGE.values()])
    for (label, scores), one in zip(LARGE.items(), large, strict=True):
        assert summary(ours_of(label, scores)) == one, f"{name} on {label}"


@pytest.mark.parametrize("kind", ["normal", "flat", "steep"])
def test_warpers_in_a_large_vocabulary(kind: str, golden: Golden) -> None:
    """Where few of very many are left, and nearly all; alone and one after another."""
    normal = np.random.default_rng(7).normal(0, 1, 50257)
    scores = {"normal": normal * 3, "flat": normal * 0.3, "steep": -1.2 * np.log(np.arange(50257) + 2.0) + normal - 80}[
        kind
    ].astype(np.float32)
    make: dict[str, tuple[our_warpers.Warper, tuple[str, float]]] = {
        "temperature": (our_warpers.temperature(0.8), ("TemperatureLogitsWarper", 0.8)),
        "top-k": (our_warpers.top_k(5000), ("TopKLogitsWarper", 5000)),
        "top-p": (our_warpers.top_p(0.95), ("TopPLogitsWarper", 0.95)),
        "min-p": (our_warpers.min_p(1e-3), ("MinPLogitsWarper", 1e-3)),
        "typical-p": (our_warpers.typical_p(0.9), ("TypicalLogitsWarper", 0.9)),
    }

    def transformers() -> dict[str, list[str]]:
        found, together = {}, scores
        for name, (_, theirs) in make.items():
            together = apply_reference(reference(*theirs), [1], together)
            found[name] = [summary([apply_reference(reference(*theirs), [1], scores)]), summary([together])]
        return found

    expected = golden.answer(["a large vocabulary", kind], transformers)
    candidates = Candidates.all(scores)
    for name, (mine, _) in make.items():
        candidates = mine(candidates)
        alone, after_others = expected[name]
        assert summary([mine(Candidates.all(scores)).dense()]) == alone, name
        assert summary([candidates.dense()]) == after_others, f"{name} after those before it"


def renormalized(tokens: Tokens, scores: Logits) -> Logits:
    """Scores of greedy search, where nothing filters them."""
    options = GenerationConfig(renormalize_logits=True)
    return Scores(options, tokens, Extensions())([tokens], scores[None])[0]


def test_renormalized_as_in_transformers(golden: Golden) -> None:
    """Sums round in an order of their own, so the last digits may differ; what is forbidden stays so."""
    for label, scores in LOGITS.items():
        expected = golden.array(
            ["renormalized", label],
            lambda scores=scores: apply_reference(reference("LogitNormalization"), [1], scores),
        )
        alone = renormalized(np.array([1]), scores)
        candidates = our_warpers.renormalize()(Candidates.all(scores))
        for actual in (alone, candidates.dense()):
            np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=3e-6, err_msg=label)
    nothing = np.full(SIZE, -INF, np.float32)
    assert_same(renormalized(np.array([1]), nothing), nothing, "nothing is left")
    assert not len(our_warpers.renormalize()(Candidates.all(nothing)).scores)


def test_end_tokens_never_outgrow_float32() -> None:
    for factor, scores in ((1e30, [5.0, -5.0, 0.0, -INF]), (1e-30, [5.0, -5.0, 0.0, -INF])):
        before = np.array(scores, np.float32)
        after = ours.process([ours.exponential_decay(0, factor, [0, 1, 2, 3, 4, -1])], np.arange(400), before)
        assert not np.isnan(after).any()
        assert after[:3].max() < INF
        assert after[3] == -INF
        assert (after[0] > before[0]) == (factor > 1)


@pytest.mark.parametrize("scale", [0.1, 1, 3])
def test_all_of_the_entropy_up_to_its_last_digit(scale: float, golden: Golden) -> None:
    """With a share of 1, PyTorch's own rounding decides about the last of the 100: nothing else may differ."""
    skip_with_transformers_4("it has no top_h")
    everything = [(np.random.default_rng(seed).normal(-90, 1, 1500) * scale).astype(np.float32) for seed in range(20)]

    def as_it_should(indices: Iterable[int], scores: np.ndarray) -> bool:
        best = np.argsort(-scores)[:100]
        return set(best[:90]) <= set(indices) <= set(best)

    def transformers(scores: np.ndarray) -> bool:
        return as_it_should(
            np.flatnonzero(apply_reference(reference("TopHLogitsWarper", 1.0), [1], scores) > -INF), scores
        )

    assert all(golden.answer(["entropy", scale], lambda: [transformers(scores) for scores in everything]))
    for seed, scores in enumerate(everything):
        assert as_it_should(our_warpers.top_h(1.0)(Candidates.all(scores)).indices, scores), seed


def test_penalties_of_new_tokens() -> None:
    """OpenAI's formula, on the new tokens only: a token loses the frequency penalty each time, the presence penalty once."""
    scores = np.arange(6, dtype=np.float32)
    options = GenerationConfig(presence_penalty=0.5, frequency_penalty=2.0)
    chain = ours.processors(options, np.array([0, 1, 1]))
    processed = ours.process(chain, np.array([0, 1, 1, 2, 4, 2, 2]), scores)
    assert (scores - processed).tolist() == [0, 0, 3 * 2.0 + 0.5, 0, 2.0 + 0.5, 0]
    assert np.array_equal(ours.process(chain, np.array([0, 1, 1]), scores), scores)


@pytest.mark.parametrize("bias", [[[3, -2.5], [5, 1.5]], {3: -2.5, 5: 1.5}, {"3": -2.5, "5": 1.5}])
def test_a_logit_bias_is_a_sequence_bias_of_single_tokens(bias: Any, golden: Golden) -> None:
    scores, options = np.linspace(-3, 3, 60, dtype=np.float32), GenerationConfig().merged({"logit_bias": bias})
    theirs = [[[3], -2.5], [[5], 1.5]]
    expected = golden.answer(
        ["logit bias"],
        lambda: apply_reference(reference("SequenceBiasLogitsProcessor", theirs), [7], scores).tolist(),
    )
    assert ours.process(ours.processors(options, np.array([7])), np.array([7]), scores).tolist() == expected


def test_no_score_outgrows_float32() -> None:
    scores = np.array([1.0, -2.0, -INF, 3.0], np.float32)
    tokens = np.array([1])
    biased = ours.process([ours.sequence_bias([([0], 1e30), ([3], -1e30)])], tokens, scores)
    for value in (1e-30, 1e-10, 0.5):
        options = GenerationConfig(do_sample=True, temperature=value, top_k=0, top_p=0.9)
        assert our_warpers.warp(our_warpers.warpers(options), biased).indices.tolist() == [0]
    several = GenerationConfig(sequence_bias=[[[0], 1e30]], repetition_penalty=1e-30, suppress_tokens=[3])
    processed = ours.process(ours.processors(several, np.array([0])), np.array([0, 1]), scores)
    assert processed[0] == np.finfo(np.float32).max
    assert np.isneginf(processed[[2, 3]]).all()


CHOICES: dict[str, list[Any]] = {
    "do_sample": [True],
    "sequence_bias": [[[[4], 2.5], [[3, 6], -0.3]], [[[2], -9.0], [[1, 2], 0.125], [[8], 7.0]]],
    "encoder_repetition_penalty": [0.7, 1.2, 3.0],
    "encoder_no_repeat_ngram_size": [1, 2, 3],
    "forced_bos_token_id": [5, 59],
    "forced_eos_token_id": [[9], [3, 59], 17],
    "exponential_decay_length_penalty": [[0, 0.8], [2, 1.1], [5, 2.0]],
    "begin_suppress_tokens": [[7], [0, 1, 2, 30, 31]],
    "top_h": [0.13, 0.51, 0.93],
    "epsilon_cutoff": [0.01, 0.1],
    "eta_cutoff": [0.01, 0.1],
    "num_beams": [2, 3],
    "repetition_penalty": [0.7, 1.2, 3.0],
    "no_repeat_ngram_size": [1, 2, 3],
    "bad_words_ids": [[[4], [2, 3]], [[0], [1, 2, 3], [9, 9]]],
    "min_length": [2, 20],
    "min_new_tokens": [2, 10],
    "suppress_tokens": [[0, 1, 2], list(range(20, 50))],
    "temperature": [0.3, 0.9, 2.5],
    "top_k": [0, 1, 7, 30, 100],
    "top_p": [0.3, 0.8],
    "min_p": [0.05, 0.5],
    "typical_p": [0.2, 0.9],
}


@pytest.mark.parametrize("number", range(60))
def test_composed_as_transformers_does(number: int, golden: Golden) -> None:
    """Options drawn once: tests/reference draws ever new ones."""
    skip_with_transformers_4("it has no top_h, keeps others of tokens that tie, and makes NaN of what is forbidden")
    draw = np.random.RandomState(number)
    options: dict[str, Any] = {
        name: values[draw.randint(len(values))] for name, values in CHOICES.items() if draw.randint(2)
    }
    options |= {"eos_token_id": draw.randint(0, SIZE, 2).tolist(), "max_length": int(draw.randint(4, 14))}
    prompt = draw.randint(0, 10, 3 if number % 2 else 1).tolist()
    tokens = prompt + draw.randint(0, 10, draw.randint(10)).tolist()
    label = [name for name in SMALL if name != "one survivor"][number % 10]
    question = [label, tokens, len(prompt), options]

    chain = ours.processors(GenerationConfig(**options), np.array(prompt))
    warpers = our_warpers.warpers(GenerationConfig(**options))

    def transformers() -> np.ndarray:
        """Compared after each one, as later ones may find nothing but -inf, and transformers NaN."""
        scores, steps = SMALL[label], []
        for number, theirs in enumerate(reference_chain(options | {"top_k": options.get("top_k", 50)}, prompt)):
            if number >= len(chain) and (scores == -INF).all():
                break
            after = apply_reference(theirs, tokens, scores)
            steps.append(coded(scores, after))
            scores = after
        return np.stack(steps)

    names = golden.answer(
        [*question, "names"],
        lambda: [
            type(each).__name__ for each in reference_chain(options | {"top_k": options.get("top_k", 50)}, prompt)
        ],
    )
    assert len(chain) + len(warpers) == len(names), f"transformers has {names}"
    steps = golden.array(question, transformers)
    expected = SMALL[label]
    for mine, name, step in zip(chain, names, steps, strict=False):
        actual = ours.process([mine], np.array(tokens), expected)
        expected = decoded(expected, step)
        assert_same(actual, expected, name)
    candidates = Candidates.all(expected)
    for warper, name, step in zip(warpers, names[len(chain) :], steps[len(chain) :], strict=False):
        probabilities = softmax(expected)
        candidates = warper(candidates)
        expected = decoded(expected, step)
        if name == "TopHLogitsWarper":
            # Where one entry has nearly all weight, the entropy is little more than PyTorch's own rounding of it.
            assert probabilities[candidates.dense() != expected].sum() < 1e-6
            candidates = Candidates.all(expected).possible()
        assert_same(candidates.dense(), expected, name)
    assert len(steps) == len(names) or (expected == -INF).all()
