"""Stop strings: where a text behind a prompt ends. Knows no tokens."""

from collections.abc import Sequence


class StopStrings:
    """Strings that end a text. One that begins in the prompt and ends in the new text counts, as in transformers.

    Args:
        strings: the stop strings.
        prompt: the text before the new one.
        included: whether the text ends behind the string that it has come to.
    """

    def __init__(self, strings: Sequence[str] = (), prompt: str = "", *, included: bool = False) -> None:
        self._strings, self._included = strings, included
        self._longest = max(map(len, strings), default=1)
        self._before = prompt[max(0, len(prompt) - self._longest + 1) :]

    def find(self, text: str) -> int | None:
        """Where the new text ends: before its first stop string, 0 if that begins in the prompt; None where there is none."""
        whole, known = self._before + text, len(self._before)
        # From the first place where it doesn't end within the prompt.
        places = ((whole.find(string, max(0, known - len(string) + 1)), len(string)) for string in self._strings)
        first, length = min((place for place in places if place[0] >= 0), default=(None, 0))
        return None if first is None else max(0, first + self._included * length - known)

    def begun(self, text: str) -> int:
        """Length of the longest end of the new text that may belong to a stop string."""
        whole = self._before + text
        for length in range(min(self._longest - 1, len(whole)), 0, -1):
            if any(string.startswith(whole[-length:]) for string in self._strings):
                return min(length, len(text))
        return 0
