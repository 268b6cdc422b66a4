"""Prompt lookup: drafts copied from the text so far, for one forward pass to verify.

Knows tokens only. The scheduler verifies: tokens are the same with any drafts or none, except that an int8 or int4 network
rounds several tokens of a pass in another way than one.
"""

import numpy as np

from ..arrays import Tokens

_FIRST_DRAFT = 3  # a step over four tokens costs hardly more than one over one
_LONGEST_MATCH = 3  # tokens; of places where fewer match, those with the most count
_CERTAIN = 2  # tokens that must match before what followed them is a draft, unless drafts have been right


class PromptLookup:
    """Drafts of the next tokens, copied from earlier text, while they pay.

    A step over a few tokens costs hardly more than one over one, a step over many does. So drafts begin short, grow
    twofold when a whole one was right, and shrink to just beyond what was right otherwise. Single tokens stand
    earlier in any text: a match of one counts only after a draft that was wholly right.

    Args:
        longest: the greatest length of a draft; 0 for none.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._length = min(longest, _FIRST_DRAFT)
        self._matching = _CERTAIN
        # The last draft, and how many tokens there were before it.
        self._draft: Tokens | None = None
        self._before = 0

    def propose(self, tokens: Tokens, count: int) -> Tokens:
        """At most `count` guesses of the tokens after these, int64 [length], which also judge the last guesses."""
        self._learn(tokens)
        draft = lookup(tokens, min(count, self._length), self._matching)
        self._draft, self._before = (draft if len(draft) else None), len(tokens)
        return draft

    def _learn(self, tokens: Tokens) -> None:
        if self._draft is None:
            return
        written = tokens[self._before : self._before + len(self._draft)]
        right = int(np.cumprod(written == self._draft[: len(written)]).sum())
        if right == len(self._draft):
            self._length, self._matching = min(2 * self._length, self.longest), 1
        else:
            self._length, self._matching = min(right + 1, self.longest), _CERTAIN


def lookup(tokens: Tokens, count: int, shortest: int = 1) -> Tokens:
    """The tokens that followed the latest earlier place with the same last tokens.

    Args:
        tokens: the sequence so far, int64 [length].
        count: how many guesses.
        shortest: how many last tokens must stand there at least.

    Returns:
        The guesses, int64; none where the last tokens stand nowhere else.
    """
    # Places where the last token stands, then those where more of the last ones do, as long as there are any.
    places, matching = np.flatnonzero(tokens[:-1] == tokens[-1]), 1
    if not len(places):
        return tokens[:0]
    while matching < _LONGEST_MATCH:
        longer = places[places >= matching]
        longer = longer[tokens[longer - matching] == tokens[-1 - matching]] if matching < len(tokens) else longer[:0]
        if not len(longer):
            break
        places, matching = longer, matching + 1
    if matching < shortest:
        return tokens[:0]
    # A loop shorter than the draft goes round several times.
    following = int(places[-1]) + 1
    return np.resize(tokens[following : following + count], count)
