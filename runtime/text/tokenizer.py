"""Text to token ids and back, and text that grows token by token. Knows no model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import ByteLevel, DecodeStream
from tokenizers.models import BPE

from gpt2onnx.errors import BundleError, CheckpointError, OptionError, PromptError

from ...models import limits
from ...models.bundle import TOKENIZER_CONFIG
from ...models.config import read_json, read_small
from ...models.messages import one_line, shown
from ..host import native
from . import tokenizer_rules
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
# A byte in vocabularies with byte fallback.
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Bytes that a byte-level vocabulary writes as themselves; the others, in order, are the characters from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


@dataclass(frozen=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: its tokens.
        spans: for each token the characters, from `start` to before `end`, that it stands for. Tokens that share
            a character of several bytes all have it in their span.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer:
    """A bundle's tokenizer.json, with the setting for spaces in decoded text of tokenizer_config.json beside it.

    A bundle may have none: then tokens have no text, and text has no tokens.

    Attributes:
        missing: whether the bundle has none.
        reads_any_text: whether it has a token for letters that its vocabulary lacks; otherwise a text with one is an error.

    Raises:
        BundleError: a file can't be read, or the tokenizer could make far too much of a text, or nothing of any.
    """

    def __init__(self, path: Path) -> None:
        self.missing = not path.exists()
        self._path = path
        self._tokenizer = HuggingFaceTokenizer(BPE()) if self.missing else _open(path)
        # A regular expression of the author's own can take forever on some texts, which the library ends by a panic.
        parts = (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer)
        self._may_panic = any(part is not None and b'"Regex"' in part.__getstate__() for part in parts)
        self.reads_any_text = self._tries_unknown_letter()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cleans_up = _cleans_up(path.with_name(TOKENIZER_CONFIG), self._tokenizer)

    def check(self, vocab_size: int, *, thorough: bool = False) -> None:
        """Compares the tokenizer with the vocabulary of the network that reads its ids.

        Args:
            vocab_size: ids are below it.
            thorough: look at every id, which takes longer than all else that loading does; or at their number only.

        Raises:
            BundleError: an id lies beyond the vocabulary.
        """
        if not thorough and self._tokenizer.get_vocab_size() <= vocab_size:
            return
        token, largest = max(self._tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", -1))
        if largest >= vocab_size:
            raise BundleError(
                f"{self._path} gives {shown(token)} the id {largest}, but the network's vocabulary ends at"
                f" {vocab_size - 1}: export the bundle again"
            )

    def check_same(self, other: "Tokenizer") -> None:
        """Raises OptionError if another tokenizer has other tokens or numbers them in another way."""
        if self._tokenizer.get_vocab() != other._tokenizer.get_vocab():
            raise OptionError(f"{other._path.parent} can't draft: its vocabulary isn't that of {self._path.parent}")

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return str(self._tokenizer.to_str())

    @cached_property
    def longest_token(self) -> int | None:
        """Bytes of the longest token; None where texts lose bytes before they are cut, so that it bounds nothing."""
        if self._tokenizer.normalizer is not None or not isinstance(self._tokenizer.decoder, ByteLevel):
            return None
        return max((len(entry.encode()) for entry in self._tokenizer.get_vocab()), default=0)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens written in it count as such.

        Args:
            text: any.
            add_special_tokens: with those that the tokenizer puts around a text.

        Raises:
            PromptError: there is no tokenizer, or it can't read the text.
        """
        self._require()
        # Half of a surrogate pair can't be written in UTF-8; transformers' tokenizers refuse it, too.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        with native.raising(self._unreadable, silently=self._may_panic):
            return list(self._tokenizer.encode(clean, add_special_tokens=add_special_tokens).ids)

    def encode_with_spans(self, text: str) -> Encoded:
        """As `encode`, and where in the text each token stands."""
        self._require()
        clean = text.encode("utf-8", "replace").decode("utf-8")
        with native.raising(self._unreadable, silently=self._may_panic):
            encoding = self._tokenizer.encode(clean)
        return Encoded(list(encoding.ids), list(encoding.offsets))

    def entry(self, token: int) -> str | None:
        """A token as the vocabulary writes it, such as `ĠOnce`; None where there is none of this id."""
        entry: str | None = self._tokenizer.id_to_token(token)
        return entry

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, which need not be whole characters; none where it isn't in the vocabulary."""
        entry = self.entry(token)
        if entry is None:
            return b""
        if token in self._tokenizer.get_added_tokens_decoder():
            return entry.encode("utf-8")
        if isinstance(self._tokenizer.decoder, ByteLevel) and all(letter in _BYTE_OF_LETTER for letter in entry):
            return bytes(_BYTE_OF_LETTER[letter] for letter in entry)
        if byte := _BYTE_ENTRY.fullmatch(entry):
            return bytes.fromhex(byte[1])
        return str(self._tokenizer.decode([token])).encode("utf-8")

    def piece(self, token: int) -> str | bytes:
        """The text that a token stands for; its bytes where these are no whole characters."""
        content = self.token_bytes(token)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, as a rule without special tokens; bytes that make no whole character become U+FFFD."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return _clean_up(text) if self._cleans_up else text

    def stream(
        self,
        stop: StopStrings = StopStrings(),  # noqa: B008  # never changes
        *,
        skip_special_tokens: bool = True,
    ) -> "TextStream":
        """A growing text that ends before the first of the stop strings."""
        return TextStream(self._tokenizer, stop, skip_special_tokens=skip_special_tokens, cleans_up=self._cleans_up)

    def stop_strings(
        self, strings: Sequence[str], prompt: Sequence[int], *, skip_special_tokens: bool = True
    ) -> StopStrings:
        """Strings that end the text behind a prompt.

        Raises:
            PromptError: there are some, but no tokenizer.
        """
        if not strings:
            return StopStrings()
        self._require()
        return StopStrings(strings, self.decode(prompt, skip_special_tokens=skip_special_tokens))

    def stop(self, strings: Sequence[str], prompt: Sequence[int]) -> Callable[[npt.NDArray[np.int64]], bool] | None:
        """Whether a prompt with its new tokens, int64 [length], has come to a stop string; None where there are none.

        Raises:
            PromptError: there are some, but no tokenizer.
        """
        if not strings:
            return None
        # A special token may be the stop string, or stand in the middle of one.
        ways = (True, False)
        near = [self.stop_strings(strings, prompt, skip_special_tokens=skip) for skip in ways]
        far = [StopStrings(strings)] * len(ways)
        # A token is at least one byte, so no stop string can begin further back.
        reach = max(len(string.encode("utf-8", "replace")) for string in strings)

        def stops(tokens: npt.NDArray[np.int64]) -> bool:
            new = tokens[len(prompt) :]
            tail = new[-reach:].tolist()
            texts = [self.decode(tail, skip_special_tokens=skip) for skip in ways]
            # The prompt stands right before the tail only while that is all.
            each = near if len(tail) == len(new) else far
            return any(stop.find(text) is not None for stop, text in zip(each, texts, strict=True))

        return stops

    def _unreadable(self, reason: str) -> PromptError:
        return PromptError(f"{self._path} can't read the text: {reason}")

    def _tries_unknown_letter(self) -> bool:
        try:
            with native.raising(_UnreadableError):
                self._tokenizer.encode("a \ue000")
        except _UnreadableError as error:
            if native.is_panic(error.__cause__):
                raise BundleError(f"{self._path} can't read any text: {error}") from error
            return False
        return True

    def _require(self) -> None:
        if self.missing:
            raise PromptError(
                "the model has no tokenizer: give token ids and no stop strings, or a tokenizer"
                " (--tokenizer FOLDER, in Python load(..., tokenizer=...))"
            )


class _UnreadableError(Exception):
    """A tokenizer can't read a text."""


class TextStream:
    """Text that is safe to show while tokens come in.

    It never breaks a character of several bytes, and never shows a stop string or a possible beginning of one.
    """

    def __init__(
        self,
        tokenizer: HuggingFaceTokenizer,
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
            text = _clean_up(text)
        return self._show(text, self._stop.find(text))

    def _settled(self, new: str) -> str:
        """The part of the text so far that no later token changes."""
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


def _open(path: Path) -> HuggingFaceTokenizer:
    """Opens a tokenizer.json once its parts are known to keep texts short."""
    try:
        content = read_small(path, limits.TOKENIZER_JSON)
    except CheckpointError as error:
        raise BundleError(str(error)) from error
    try:
        fault = tokenizer_rules.fault(tokenizer_rules.parts(content))
    except ValueError as error:
        raise BundleError(f"{path} can't be read: {one_line(error)}") from error
    if fault:
        raise BundleError(f"{path} {fault}")
    with native.raising(lambda reason: BundleError(f"{path} can't be read: {reason}")):
        return HuggingFaceTokenizer.from_buffer(content)


def _cleans_up(path: Path, tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether transformers cleans decoded text up: if the settings ask for it, and with BPE only if they insist."""
    if not path.is_file():
        return False
    try:
        settings = read_json(path)
    except CheckpointError as error:
        raise BundleError(str(error)) from error
    if not settings.get("clean_up_tokenization_spaces"):
        return False
    insists = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(insists) or type(tokenizer.model).__name__ != "BPE"


def _clean_up(text: str) -> str:
    for spaced, joined in _CLEAN_UP:
        text = text.replace(spaced, joined)
    return text
