"""A choice's text and log probabilities, from the tokens as they come in."""

import codecs
from collections.abc import Sequence
from typing import Any

from ..runtime.decoding.strategy import TokenLogprobs
from ..runtime.tokenizer import Tokenizer
from .engine import Piece

Record = dict[str, Any]


class Answer:
    """One choice that grows.

    Args:
        tokenizer: turns tokens into text.
        index: the choice's.
        stop: strings that end the text.
        ends: tokens that end it.
        logprobs: whether log probabilities are wanted.
        prompt: what stands before the text; empty where it isn't wanted.

    Attributes:
        text: what was taken.
        finish_reason: as OpenAI writes it; None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        stop: Sequence[str],
        ends: Sequence[int],
        *,
        logprobs: bool,
        prompt: str = "",
    ) -> None:
        self.index = index
        self.text = ""
        self.finish_reason: str | None = None
        self._tokenizer, self._ends = tokenizer, ends
        self._stream = tokenizer.stream(stop)
        self._new = prompt
        self._entries: list[_Entry] | None = [] if logprobs else None
        self._position = _Position(tokenizer)

    def read_prompt(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes the prompt's tokens, and the log probabilities of all but the first."""
        self._take(list(ids), [None, *logprobs])
        self._position = _Position(self._tokenizer, len(self._new))

    def push(self, piece: Piece) -> None:
        """Takes new tokens."""
        self._take(piece.tokens, piece.logprobs)
        for token in piece.tokens:
            self._new += self._stream.push(token)
        if piece.finish_reason is not None:
            self.finish("stop" if piece.finish_reason == "stop" else "length")

    def finish(self, reason: str) -> None:
        """Ends it."""
        self._new += self._stream.finish()
        self.finish_reason = reason

    def take(self) -> Record | None:
        """What there is that wasn't taken before, as a choice; None where that is nothing."""
        if not self._new and self.finish_reason is None:
            return None
        text, self._new = self._new, ""
        self.text += text
        return {
            "text": text,
            "index": self.index,
            "logprobs": None if self._entries is None else self._logprobs(self._entries),
            "finish_reason": self.finish_reason,
        }

    def _take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        if self._entries is not None:
            for token, one in zip(tokens, logprobs, strict=True):
                self._entries.append(_Entry(token, self._position.before(token), one))

    def _logprobs(self, entries: "list[_Entry]") -> Record:
        """Of the tokens that have begun to show. At the end, of those too that show nothing, but not of a stop string's."""
        shown = len(self.text)
        whole = self.finish_reason is not None and self._position.length <= shown
        count = 0
        while count < len(entries) and (
            whole or entries[count].offset < shown or (self.finish_reason and entries[count].token in self._ends)
        ):
            count += 1
        ready = entries[:count]
        del entries[:count]
        return {
            "tokens": [self._written(one.token) for one in ready],
            "token_logprobs": [None if one.logprobs is None else one.logprobs.logprob for one in ready],
            "top_logprobs": [None if one.logprobs is None else self._top(one.logprobs) for one in ready],
            "text_offset": [one.offset for one in ready],
        }

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        top = [*logprobs.top, (logprobs.token_id, logprobs.logprob)]
        # Of tokens that are written alike the likeliest is told.
        return {self._written(token): value for token, value in sorted(top, key=lambda entry: entry[1])}

    def _written(self, token: int) -> str:
        piece = self._tokenizer.piece(token)
        return piece if isinstance(piece, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class _Entry:
    """A token, where it begins, and its log probabilities."""

    __slots__ = ("logprobs", "offset", "token")

    def __init__(self, token: int, offset: int, logprobs: TokenLogprobs | None) -> None:
        self.token, self.offset, self.logprobs = token, offset, logprobs


class _Position:
    """Counts the characters that tokens stand for; one of several bytes counts when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer, self.length = tokenizer, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, token: int) -> int:
        """Where a token begins that follows those so far."""
        start = self.length
        if self._tokenizer.decode([token]):  # special tokens show nothing
            self.length += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start
