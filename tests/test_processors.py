"""Every processor and warper against the transformers class of the same job, alone and composed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from gpt2onnx.runtime import logits as ours
from gpt2onnx.runtime import warpers as our_warpers
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.sampling import Candidates, softmax

SIZE = 60
INF = float("inf")


def hand_made() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 3, SIZE)
    one = np.full(SIZE, -INF)
    one[17] = 0.5
    two = one.copy()
    two[40] = 0.5
    few = np.where(rng.random(SIZE) < 0.9, -INF, plain)
    few[[3, 5]] = 2.0, 1.0
    peak = np.zeros(SIZE)
    peak[30] = 40.0
    return {
        "plain": plain,
        "flat": plain * 0.05,
        "ties": np.round(plain),
        "many ties": np.sign(plain),
        "all equal": np.full(SIZE, 1.25),
        "zeros": np.zeros(SIZE),
        "one survivor": one,
        "two equal survivors": two,
        "many -inf": few,
        "peak": peak,
        "huge": plain * 1e4,
    }


LOGITS = {name: values.astype(np.float32) for name, values in hand_made().items()} | {
    f"random {seed}": np.random.default_rng(seed).normal(0, scale, 1500).astype(np.float32)
    for seed, scale in enumerate((0.5, 1, 2, 4, 8))
}
# Enough entries that not all are sorted, many of which tie, some forbidden.
LOGITS |= {
    f"many with ties, {kinds} a unit": np.where(
        np.arange(1500) % 7, np.round(LOGITS["random 2"] * kinds) / kinds, np.float32(-INF)
    )
    for kinds in (1, 4, 16)
}
PROMPTS = ([7], [3, 5, 3], [1, 2, 3, 1, 2, 3, 1, 2], list(range(12)) * 2)

# What makes scores out of tokens and scores.
Way = Callable[[np.ndarray, np.ndarray], np.ndarray]
PAIRS: dict[str, tuple[Callable[[], Way], Callable[[], Any]]] = {}


def pair(name: str, mine: Callable[[], ours.Processor], theirs: Callable[[], Any]) -> None:
    PAIRS[name] = lambda: lambda tokens, scores: ours.process([mine()], tokens, scores), theirs


def warper_pair(name: str, mine: Callable[[], our_warpers.Warper], theirs: Callable[[], Any]) -> None:
    PAIRS[name] = lambda: lambda _, scores: our_warpers.warp([mine()], scores).dense(), theirs


for penalty in (0.5, 1.3, 7.0):
    pair(f"repetition penalty {penalty}", lambda p=penalty: ours.repetition_penalty(p), lambda p=penalty: reference.RepetitionPenaltyLogitsProcessor(p))  # fmt: skip
for size in (1, 2, 3, 5, 9, 40):
    pair(f"no {size}-grams", lambda n=size: ours.no_repeat_ngram(n), lambda n=size: reference.NoRepeatNGramLogitsProcessor(n))  # fmt: skip
WORDS = [[4], [9], [3, 6], [5, 3, 8], [2, 3, 1, 2, 9], [1, 1], list(range(30))]
for ends in ([9], [4, 9], [1000], []):
    pair(f"bad words, ends {ends}", lambda e=ends: ours.bad_words(WORDS, e), lambda e=ends: reference.NoBadWordsLogitsProcessor(WORDS, torch.tensor(e)))  # fmt: skip
for length, ends in ((0, [9]), (5, [9]), (50, [3, 9]), (50, [9, 100_000]), (3, [0])):
    pair(f"min length {length}, ends {ends}", lambda n=length, e=ends: ours.min_length(n, e), lambda n=length, e=ends: reference.MinLengthLogitsProcessor(n, e))  # fmt: skip
for tokens in ([0], [3, 17, 30, 59], list(range(SIZE)), [2, 100_000]):
    pair(f"suppress {len(tokens)}, {tokens[-1]}", lambda t=tokens: ours.suppress(t), lambda t=tokens: reference.SuppressTokensLogitsProcessor(t))  # fmt: skip
for penalty in (0.5, 1.3, 7.0):
    pair(f"repetition penalty {penalty} of a prompt", lambda p=penalty: ours.repetition_penalty(1 / p, np.array([7, 3, 3, 40])), lambda p=penalty: reference.EncoderRepetitionPenaltyLogitsProcessor(p, torch.tensor([[7, 3, 3, 40]])))  # fmt: skip
for size in (1, 2, 3, 5, 9):
    # Sequences that begin with it, as all do, and one that goes on.
    for begin in ([1], [1, 2, 3], [1, 2, 3, 1, 2, 3, 1, 2]):
        pair(f"no {size}-grams of {begin}", lambda n=size, b=begin: ours.no_repeat_ngram(n, np.array(b)), lambda n=size, b=begin: reference.EncoderNoRepeatNGramLogitsProcessor(n, torch.tensor([b])))  # fmt: skip
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
pair("sequence bias", lambda: ours.sequence_bias(BIASES), lambda: reference.SequenceBiasLogitsProcessor([[ids, float(bias)] for ids, bias in BIASES]))  # fmt: skip
pair("forced first", lambda: ours.forced([9], 1), lambda: reference.ForcedBOSTokenLogitsProcessor(9))
for ids in ([9], [3, 59]):
    for length in (1, 3, 8, 24, 25):
        pair(f"forced {ids} after {length}", lambda i=ids, n=length: ours.forced(i, n), lambda i=ids, n=length: reference.ForcedEOSTokenLogitsProcessor(n + 1, i))  # fmt: skip
for start, factor, ends in ((0, 1.05, [9]), (2, 3.0, [3, 9, 59]), (5, 0.5, [9, 9]), (30, 2.0, [9]), (0, 1.0, [0])):
    pair(f"decay {factor} from {start}, ends {ends}", lambda s=start, f=factor, e=ends: ours.exponential_decay(s, f, e), lambda s=start, f=factor, e=ends: reference.ExponentialDecayLengthPenalty((s, f), e, 0))  # fmt: skip
for length in (1, 3, 8):
    pair(f"suppress after {length}", lambda n=length: ours.suppress([3, 17], n), lambda n=length: reference.SuppressTokensAtBeginLogitsProcessor([3, 17], n))  # fmt: skip
for value in (0.01, 0.7, 1.9, 300.0):
    warper_pair(f"temperature {value}", lambda t=value: our_warpers.temperature(t), lambda t=value: reference.TemperatureLogitsWarper(t))  # fmt: skip
for keep in (1, 2, 3):
    for k in (1, 2, 5, 59, 60, 61, 10_000):
        warper_pair(f"top-k {k}, at least {keep}", lambda k=k, m=keep: our_warpers.top_k(k, m), lambda k=k, m=keep: reference.TopKLogitsWarper(k, min_tokens_to_keep=m))  # fmt: skip
    for p in (0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        warper_pair(f"top-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.top_p(p, m), lambda p=p, m=keep: reference.TopPLogitsWarper(p, min_tokens_to_keep=m))  # fmt: skip
        warper_pair(f"min-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.min_p(p, m), lambda p=p, m=keep: reference.MinPLogitsWarper(p, min_tokens_to_keep=m))  # fmt: skip
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        warper_pair(f"typical-p {p}, at least {keep}", lambda p=p, m=keep: our_warpers.typical_p(p, m), lambda p=p, m=keep: reference.TypicalLogitsWarper(p, min_tokens_to_keep=m))  # fmt: skip
    for p in (1e-6, 0.003, 0.02, 0.3, 0.999):
        warper_pair(f"epsilon {p}, at least {keep}", lambda p=p, m=keep: our_warpers.epsilon_cutoff(p, m), lambda p=p, m=keep: reference.EpsilonLogitsWarper(p, min_tokens_to_keep=m))  # fmt: skip
        warper_pair(f"eta {p}, at least {keep}", lambda p=p, m=keep: our_warpers.eta_cutoff(p, m), lambda p=p, m=keep: reference.EtaLogitsWarper(p, min_tokens_to_keep=m))  # fmt: skip
# No share of 60 equal entries is a whole number of them: there the last digit of the sum would decide.
for p in (1e-6, 0.13, 0.51, 0.93, 0.99):
    warper_pair(f"top-h {p}", lambda p=p: our_warpers.top_h(p), lambda p=p: reference.TopHLogitsWarper(p))


def assert_same(actual: np.ndarray, expected: np.ndarray, label: str) -> None:
    """Exact equality, infinities included: each processor does the same float32 arithmetic as its counterpart."""
    differing = np.flatnonzero(actual != expected)
    if len(differing):
        first = int(differing[0])
        raise AssertionError(
            f"{label}: {len(differing)} of {len(actual)} differ, first at {first}: {actual[first]} not {expected[first]}"
        )


def apply_reference(processor: Any, tokens: Sequence[int], scores: np.ndarray) -> np.ndarray:
    return processor(torch.tensor([list(tokens)]), torch.from_numpy(scores.copy())[None])[0].numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_equals_transformers(name: str) -> None:
    make_mine, make_theirs = PAIRS[name]
    for label, scores in LOGITS.items():
        mine, theirs = make_mine(), make_theirs()  # anew, as transformers' bad words remember the vocabulary
        for prompt in PROMPTS:
            untouched = scores.copy()
            actual = mine(np.array(prompt), scores)
            assert_same(scores, untouched, f"{name} wrote to its argument")
            assert actual.dtype == np.float32
            expected = apply_reference(theirs, prompt, scores)
            assert_same(actual, expected, f"{name} on {label} after {prompt}")


@pytest.mark.parametrize("kind", ["normal", "flat", "steep"])
def test_warpers_in_a_large_vocabulary(kind: str) -> None:
    """Where few of very many are left, and nearly all; alone and one after another."""
    normal = np.random.default_rng(7).normal(0, 1, 50257)
    scores = {"normal": normal * 3, "flat": normal * 0.3, "steep": -1.2 * np.log(np.arange(50257) + 2.0) + normal - 80}[
        kind
    ].astype(np.float32)
    make = {
        "temperature": (our_warpers.temperature(0.8), reference.TemperatureLogitsWarper(0.8)),
        "top-k": (our_warpers.top_k(5000), reference.TopKLogitsWarper(5000)),
        "top-p": (our_warpers.top_p(0.95), reference.TopPLogitsWarper(0.95)),
        "min-p": (our_warpers.min_p(1e-3), reference.MinPLogitsWarper(1e-3)),
        "typical-p": (our_warpers.typical_p(0.9), reference.TypicalLogitsWarper(0.9)),
    }
    candidates, expected = Candidates.all(scores), scores
    for name, (mine, theirs) in make.items():
        assert_same(mine(Candidates.all(scores)).dense(), apply_reference(theirs, [1], scores), name)
        candidates, expected = mine(candidates), apply_reference(theirs, [1], expected)
        assert_same(candidates.dense(), expected, f"{name} after those before it")


def test_renormalized_as_in_transformers() -> None:
    """Sums round in an order of their own, so the last digits may differ; what is forbidden stays so."""
    for label, scores in LOGITS.items():
        expected = apply_reference(reference.LogitNormalization(), [1], scores)
        alone = ours.process([ours.renormalize()], np.array([1]), scores)
        candidates = our_warpers.renormalize()(Candidates.all(scores))
        for actual in (alone, candidates.dense()):
            np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=3e-6, err_msg=label)
    nothing = np.full(SIZE, -INF, np.float32)
    assert_same(ours.process([ours.renormalize()], np.array([1]), nothing), nothing, "nothing is left")
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
def test_all_of_the_entropy_up_to_its_last_digit(scale: float) -> None:
    """With a share of 1, PyTorch's own rounding decides about the last of the 100: nothing else may differ."""
    for seed in range(20):
        scores = (np.random.default_rng(seed).normal(-90, 1, 1500) * scale).astype(np.float32)
        mine = our_warpers.top_h(1.0)(Candidates.all(scores))
        theirs = apply_reference(reference.TopHLogitsWarper(1.0), [1], scores)
        best = np.argsort(-scores)[:100]
        assert set(mine.indices) <= set(best)
        assert set(np.flatnonzero(theirs > -INF)) <= set(best)
        assert set(best[:90]) <= set(mine.indices) & set(np.flatnonzero(theirs > -INF))


def test_no_score_outgrows_float32() -> None:
    scores = np.array([1.0, -2.0, -INF, 3.0], np.float32)
    tokens = np.array([1])
    biased = ours.process([ours.sequence_bias([([0], 1e30), ([3], -1e30)])], tokens, scores)
    for value in (1e-30, 1e-10, 0.5):
        options = GenerationConfig(do_sample=True, temperature=value, top_k=0, top_p=0.9)
        assert our_warpers.warp(our_warpers.warpers(options), biased).indices.tolist() == [0]


def composed(options: dict[str, Any], prompt: list[int]) -> reference.LogitsProcessorList:
    """transformers' own chain for these options."""
    from transformers import GenerationConfig as Config
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    config = Config(**options)
    config._eos_token_tensor = torch.tensor(options["eos_token_id"])
    return model._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu"
    )


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


@settings(deadline=None, max_examples=300)
@given(
    options=OPTIONS,
    length=st.sampled_from([1, 3]),
    scores=st.sampled_from([name for name, values in LOGITS.items() if len(values) == SIZE and name != "one survivor"]),
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=12),
)
def test_composed_as_transformers_does(options: dict[str, Any], length: int, scores: str, tokens: list[int]) -> None:
    # Neither transformers nor this takes options that force and suppress the same token.
    end = options.get("forced_eos_token_id", [])
    for forced in ([options.get("forced_bos_token_id", -1)], end if isinstance(end, list) else [end]):
        assume(not forced or not set(forced) <= set(options.get("suppress_tokens", ())))
    chain = ours.processors(GenerationConfig(**options), np.array(tokens[:length]))
    warpers = our_warpers.warpers(GenerationConfig(**options))
    expected = LOGITS[scores]
    theirs = composed(options | {"top_k": options.get("top_k", 50)}, tokens[:length])
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
        if isinstance(their, reference.TopHLogitsWarper):
            # Where one entry has nearly all weight, the entropy is little more than PyTorch's own rounding of it.
            differing = candidates.dense() != expected
            assert probabilities[differing].sum() < 1e-6
            candidates = Candidates.all(expected).possible()
        assert_same(candidates.dense(), expected, type(their).__name__)
