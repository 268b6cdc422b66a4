"""Drafts that grow and shrink."""

import numpy as np
import pytest

from gpt2onnx.runtime.decoding.prompt_lookup import PromptLookup


@pytest.mark.parametrize("longest", [1, 2, 5, 8, 32])
def test_drafts_grow_on_repetition_and_shrink_without(longest: int) -> None:
    cycle = np.arange(100) % 7
    drafts = PromptLookup(longest)
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
    drafts = PromptLookup(8)
    assert not len(drafts.propose(np.array([4, 5, 6, 4]), 8))
    repeated = np.array([1, 2, 3, 4, 5, 6, 1, 2])
    assert drafts.propose(repeated, 8).tolist() == [3, 4, 5]
    right = np.append(repeated, [3, 4, 5, 9, 5])
    assert drafts.propose(right, 8).tolist() == [9, 5, 9, 5, 9, 5], "a loop goes round"
