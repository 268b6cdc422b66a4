"""Whether a pass goes without computing all logits in full, in bundles that have a graph for that.

The graph estimates all logits and computes the highest ones again: see `exporter.screening`. A search that only looks at the
largest logits sees no difference.
"""

# So many tokens for each logit that has to be exact, and so many at the least: fewer often turn out not to be enough.
_FOR_EACH, _LEAST = 40, 256
# In one pass: to compute more logits one by one takes longer than all of them together.
_MOST = 2048


def candidates(positions: int, certain: int | None, vocab_size: int) -> int:
    """How many logits to compute in full at each position; 0 for all of them.

    Args:
        positions: whose logits are wanted.
        certain: of how many largest logits the search needs the exact values; None for all.
        vocab_size: logits in all.
    """
    if certain is None:
        return 0
    count = max(_LEAST, _FOR_EACH * certain)
    return count if positions * count <= _MOST and count < vocab_size else 0
