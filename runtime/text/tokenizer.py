"""Text to token ids and back. Knows no model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from gpt2onnx.errors import BundleError, CheckpointError, OptionError, PromptError

from ...models import limits
from ...models.bundle import TOKENIZER_CONFIG
from ...models.config import read_small
from ...models.messages import one_line, shown
from ..host import native
from . import special_tokens, tokenizer_rules
from .batch_encoding import BatchEncoding
from .stop_strings import StopStrings
from .text_stream import TextStream, clean_up

# A byte in vocabularies with byte fallback.
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Bytes that a byte-level vocabulary writes as themselves; the others, in order, are the characters from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class Tokenizer:
    """A bundle's tokenizer.json, with the settings of tokenizer_config.json beside it. Names are those of transformers.

    A bundle may have none: then tokens have no text, and text has no tokens.

    Attributes:
        missing: whether the bundle has none.
        reads_any_text: whether it has a token for letters that its vocabulary lacks; otherwise a text with one is an error.
        bos_token, eos_token, unk_token, pad_token: special tokens as text; None for a role without one. May be set.
        padding_side: "right" or "left"; may be set.

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
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()  # before any text: padding may be as long as the file likes
        self.reads_any_text = self._tries_unknown_letter()
        settings = special_tokens.settings_of(path.with_name(TOKENIZER_CONFIG))
        self._cleans_up = _cleans_up(settings, self._tokenizer)
        self.padding_side = str(settings.get("padding_side", "right"))
        roles = special_tokens.in_folder(path.parent, settings)
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (
            self._known(roles.get(role)) for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        )

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """A text, or several, in the form of transformers' tokenizers: `generate(**tokenizer(text))` continues them.

        Args:
            text: one text, or a list of them.
            padding: True or "longest" fills shorter texts up with `pad_token`, on the `padding_side`.
            return_tensors: "np" for arrays [texts, tokens], None for lists.
            add_special_tokens: as for `encode`.

        Raises:
            PromptError: there is no tokenizer, or it can't read a text.
            OptionError: there is no pad token, texts of different lengths were to become an array, or an argument is unknown.
        """
        texts = [text] if isinstance(text, str) else text
        rows = [self.encode(each, add_special_tokens=add_special_tokens) for each in texts]
        if padding not in (False, True, "longest", "do_not_pad"):
            raise OptionError(f"padding must be true, false or 'longest', not {shown(padding)}")
        encoding = BatchEncoding(input_ids=rows, attention_mask=[[1] * len(row) for row in rows])
        if padding not in (False, "do_not_pad"):
            if self.pad_token_id is None:
                raise OptionError("padding needs a pad token: tokenizer.pad_token = tokenizer.eos_token")
            encoding = encoding.padded(self.pad_token_id, self.padding_side)
        if return_tensors is not None:
            return encoding.arrays(return_tensors)
        return BatchEncoding({name: rows[0] for name, rows in encoding.items()}) if isinstance(text, str) else encoding

    def __len__(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without those that were added to the vocabulary, which `len(tokenizer)` counts, too."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._id(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id of `unk_token`."""
        return self._id(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self._id(self.pad_token)

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
        return list(self._encoding(text, add_special_tokens=add_special_tokens).ids)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, and for each token the characters, from the first to before the last, that it stands for.

        Tokens that share a character of several bytes all have it in their span.
        """
        encoding = self._encoding(text)
        return list(encoding.ids), list(encoding.offsets)

    def tokenize(self, text: str) -> list[str]:
        """A text's tokens as the vocabulary writes them, such as `ĠOnce`, without those put around a text."""
        ids = self.encode(text, add_special_tokens=False)
        return [str(self._tokenizer.id_to_token(token)) for token in ids]

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...

    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]: ...

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """A token, or several, as the vocabulary writes them, such as `ĠOnce`; None where there is none of an id."""
        if isinstance(ids, int | np.integer):
            return self._tokenizer.id_to_token(int(ids))
        return [self._tokenizer.id_to_token(int(token)) for token in ids]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...  # type: ignore[overload-overlap]  # a text is a sequence, too

    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]: ...

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The ids of tokens as the vocabulary writes them; of an unknown one that of `unk_token`, or None without one."""
        if isinstance(tokens, str):
            token = self._id(tokens)
            return self.unk_token_id if token is None else token
        return [self.convert_tokens_to_ids(each) for each in tokens]

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, which need not be whole characters; none where it isn't in the vocabulary."""
        entry = self.convert_ids_to_tokens(token)
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

    def decode(self, ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of one id or several; bytes that make no whole character become U+FFFD."""
        listed = [ids] if isinstance(ids, int | np.integer) else list(ids)
        text = str(self._tokenizer.decode(listed, skip_special_tokens=skip_special_tokens))
        return clean_up(text) if self._cleans_up else text

    def batch_decode(self, sequences: Iterable[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The texts of several sequences of ids."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def stream(
        self,
        stop: StopStrings = StopStrings(),  # noqa: B008  # never changes
        *,
        skip_special_tokens: bool = True,
    ) -> TextStream:
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

    def _encoding(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        self._require()
        # Half of a surrogate pair can't be written in UTF-8; transformers' tokenizers refuse it, too.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        with native.raising(self._unreadable, silently=self._may_panic):
            return self._tokenizer.encode(clean, add_special_tokens=add_special_tokens)

    def _id(self, token: str | None) -> int | None:
        try:
            return None if token is None else self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair, which files may hold
            return None

    def _known(self, token: str | None) -> str | None:
        """A token of the settings, if the vocabulary has it."""
        return None if self._id(token) is None else token

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
                " ('gpt2onnx generate --tokenizer FOLDER', in Python load(..., tokenizer=...))"
            )


class _UnreadableError(Exception):
    """A tokenizer can't read a text."""


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


def _cleans_up(settings: Mapping[str, Any], tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether transformers cleans decoded text up: if the settings ask for it, and with BPE only if they insist."""
    if not settings.get("clean_up_tokenization_spaces"):
        return False
    insists = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(insists) or type(tokenizer.model).__name__ != "BPE"
