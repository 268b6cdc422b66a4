"""Comparison of token ids."""

from collections.abc import Sequence


def assert_same_tokens(actual: Sequence[int], expected: Sequence[int], label: object = "") -> None:
    """Fails with the first token that differs."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        assert one == other, f"{label}: token {index} is {one}, expected {other}"
    assert len(actual) == len(expected), f"{label}: {len(actual)} tokens, expected {len(expected)}"
