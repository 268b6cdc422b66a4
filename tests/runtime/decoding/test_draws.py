"""The random stream where only some words are worked out, and drafts that grow and shrink."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2onnx.runtime.decoding.strategy import Drafts
from gpt2onnx.runtime.decoding.torch_random import MersenneTwister


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    steps=st.lists(
        st.tuples(st.integers(1, 30_000), st.sampled_from([0, 1, 2, 7, 60, 100_000])), min_size=1, max_size=8
    ),
    known=st.booleans(),
)
def test_words_are_numpys_own(seed: int, steps: list[tuple[int, int]], known: bool) -> None:
    """Whatever was skipped or left out before; also where NumPy's state doesn't lie as expected."""
    stream = MersenneTwister(seed)
    assert stream._known
    stream._known = known
    reference = np.random.MT19937()
    reference.state = np.random.RandomState(seed % 2**32).get_state(legacy=False)
    rng = np.random.default_rng(seed)
    for entries, count in steps:
        words = reference.random_raw(2 * entries).reshape(entries, 2)
        expected = words[:, 0] << np.uint64(32) | words[:, 1]
        if count == 0:
            stream.skip(entries)
            continue
        wanted = np.sort(rng.choice(entries, min(count, entries), replace=False))
        actual = stream.pairs(entries, wanted)
        differing = np.flatnonzero(actual != expected[wanted])
        assert not len(differing), (differing[0], actual[differing[0]], expected[wanted][differing[0]])


def test_blocks_that_end_with_a_draw() -> None:
    """624 words are a block: 312 entries end just where one does."""
    stream, reference = MersenneTwister(1), MersenneTwister(1)
    reference._known = False
    for entries in (1248, 2496, 400, 848, 1248, 1, 1247, 420):
        wanted = np.array([0, entries - 1]) if entries > 800 else np.array([entries - 1])
        assert stream.pairs(entries, wanted).tolist() == reference.pairs(entries, wanted).tolist()


def test_words_of_one_entry_in_two_blocks() -> None:
    """The stream of PyTorch begins with a block, but that of NumPy's fresh generators doesn't."""
    for position in range(620, 625):
        stream, reference = MersenneTwister(5), np.random.MT19937()
        stream._position.value = position
        reference.state = stream._bits.state
        for wanted in ([0], [1], [0, 1, 2], [0, 311, 312, 313, 623], [400]):
            words = reference.random_raw(8000).reshape(4000, 2)[wanted]
            expected = (words[:, 0] << np.uint64(32) | words[:, 1]).tolist()
            assert stream.pairs(4000, np.array(wanted)).tolist() == expected, (position, wanted)


@pytest.mark.parametrize("longest", [1, 2, 5, 8, 32])
def test_drafts_grow_on_repetition_and_shrink_without(longest: int) -> None:
    cycle = np.arange(100) % 7
    drafts = Drafts(longest)
    position, lengths = 20, []
    while position < 90:
        guesses = drafts.propose(cycle[:position], 90 - position)
        assert guesses.tolist() == cycle[position : position + len(guesses)].tolist()
        lengths.append(len(guesses))
        position += len(guesses) + 1
    assert max(lengths) <= longest
    assert lengths[:2] == sorted(lengths[:2])
    # From here on every guess is wrong.
    text = cycle[:position].tolist()
    for _ in range(3):
        guesses = drafts.propose(np.array(text), 50)
        text.append(int(guesses[0]) + 100 if len(guesses) else 100)
    assert len(drafts.propose(np.array([*text, 0, 1, 2]), 50)) <= 1


def test_one_matching_token_is_no_draft_unless_drafts_were_right() -> None:
    drafts = Drafts(8)
    assert not len(drafts.propose(np.array([4, 5, 6, 4]), 8))
    repeated = np.array([1, 2, 3, 4, 5, 6, 1, 2])
    assert drafts.propose(repeated, 8).tolist() == [3, 4, 5]
    right = np.append(repeated, [3, 4, 5, 9, 5])
    assert drafts.propose(right, 8).tolist() == [9, 5, 9, 5, 9, 5], "a loop goes round"
