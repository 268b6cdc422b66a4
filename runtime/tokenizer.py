"""Text to token ids and back, and text that grows token by token. Knows no model."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from gpt2onnx.errors import BundleError

# What transformers' `clean_up_tokenization` replaces, in its order.
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
# The end of a text that tokens to come may still take part in a replacement with.
_UNSETTLED = re.compile(r"[ .?!,'ntmsver]*\Z")


class Tokenizer:
    """A bundle's tokenizer.json, and what tokenizer_config.json beside it says of spaces in decoded text.

    Raises:
        BundleError: a file can't be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:
            raise BundleError(f"{path} can't be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cleans_up = _cleans_up(path.with_name("tokenizer_config.json"), self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens written in it count as such."""
        # Half of a surrogate pair can't be written in UTF-8; transformers' tokenizers refuse it, too.
        return list(self._tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8")).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; bytes that make no whole character become U+FFFD."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return _clean_up(text) if self._cleans_up else text

    def stream(self, stop: Sequence[str] = ()) -> "TextStream":
        """A growing text that ends before the first of the stop strings."""
        return TextStream(self._tokenizer, stop, cleans_up=self._cleans_up)


class TextStream:
    """Text that is safe to show while tokens come in.

    It never breaks a character of several bytes, and never shows a stop string or what may become one.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, stop: Sequence[str], *, cleans_up: bool = False) -> None:
        self._tokenizer = tokenizer
        self._cleans_up, self._unsettled = cleans_up, ""
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._ids: list[int] = []
        self._decoded = ""  # of the tokens that make whole characters
        self._shown = 0

    def push(self, token: int) -> str:
        """Takes one more token, and returns the text that can be shown now and wasn't before."""
        self._ids.append(token)
        self._decoded += self._settled(self._stream.step(self._tokenizer, token) or "")
        end = find_stop(self._decoded, self._stop)
        return self._show(self._decoded, len(self._decoded) - self._possible_stop() if end is None else end)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come; an incomplete character becomes U+FFFD."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if self._cleans_up:
            text = _clean_up(text)
        return self._show(text, find_stop(text, self._stop))

    def _settled(self, new: str) -> str:
        """What can be added to the decoded text now that this much more is known."""
        if not self._cleans_up:
            return new
        text = self._unsettled + new
        match = _UNSETTLED.search(text)
        settled = match.start() if match else len(text)
        self._unsettled = text[settled:]
        return _clean_up(text[:settled])

    def _show(self, text: str, end: int | None) -> str:
        new = text[self._shown : end]
        self._shown += len(new)
        return new

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._decoded)), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stop):
                return length
        return 0


def _cleans_up(path: Path, tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether transformers would clean decoded text up: where the settings ask for it, and BPE only if they insist."""
    if not path.is_file():
        return False
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} can't be read: {error}") from error
    if not isinstance(settings, dict) or not settings.get("clean_up_tokenization_spaces"):
        return False
    insists = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(insists) or type(tokenizer.model).__name__ != "BPE"


def _clean_up(text: str) -> str:
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins in a text; None where there is none."""
    found = [position for string in stop if (position := text.find(string)) >= 0]
    return min(found, default=None)
