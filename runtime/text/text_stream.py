"""Text that grows token by token."""

import re

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .stop_strings import StopStrings

# Replacements of transformers' `clean_up_tokenization`, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
# The end of a text that may belong to a replacement with later tokens.
_UNSETTLED = re.compile(r"[ .?!,'ntmsver]*\Z")


class TextStream:
    """Text that is safe to show while tokens come in.

    It never breaks a character of several bytes, and never shows a stop string or a possible beginning of one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: StopStrings,
        *,
        skip_special_tokens: bool = True,
        cleans_up: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._cleans_up, self._unsettled = cleans_up, ""
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._ids: list[int] = []
        self._decoded = ""  # of the tokens that make whole characters
        self._shown = 0

    def push(self, token: int) -> str:
        """Takes one more token, and returns the text that can be shown now and wasn't before."""
        self._ids.append(token)
        self._decoded += self._settled(self._stream.step(self._tokenizer, token) or "")
        end = self._stop.find(self._decoded)
        return self._show(self._decoded, len(self._decoded) - self._stop.begun(self._decoded) if end is None else end)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come; an incomplete character becomes U+FFFD."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)
        if self._cleans_up:
            text = clean_up(text)
        return self._show(text, self._stop.find(text))

    def _settled(self, new: str) -> str:
        """The part of the text so far that no later token changes."""
        if not self._cleans_up:
            return new
        text = self._unsettled + new
        match = _UNSETTLED.search(text)
        settled = match.start() if match else len(text)
        self._unsettled = text[settled:]
        return clean_up(text[:settled])

    def _show(self, text: str, end: int | None) -> str:
        new = text[self._shown : end]
        self._shown += len(new)
        return new


def clean_up(text: str) -> str:
    """Takes out spaces, as transformers' `clean_up_tokenization` does."""
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text
