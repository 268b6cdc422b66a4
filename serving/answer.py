"""Answer: a choice's text and log probabilities, built from tokens as they arrive."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..runtime.decoding.logprobs import TokenLogprobs
from ..runtime.text.stop_strings import StopStrings
from ..runtime.text.tokenizer import Tokenizer
from .engine import Piece

Record = dict[str, Any]
_UNFINISHED = "\ufffd"


def prompt_record(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs], count: int) -> list[Record | None]:
    """Log probabilities of a prompt's tokens as vLLM writes them: `PromptLogprobs` in its vllm/logprobs.py.

    Args:
        logprobs: of each token but the first.
        count: likeliest tokens in the place of each.

    Returns:
        An entry for each token. None for the first; else logprob, rank and decoded_token by token id, the prompt's own token
        first.
    """

    def described(token: int, logprob: float, rank: int) -> Record:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    def entry(one: TokenLogprobs) -> Record:
        top = [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top[:count], start=1)]
        return {str(each[0]): described(*each) for each in [(one.token_id, one.logprob, one.rank), *top]}

    return [None, *map(entry, logprobs)]


class Answer:
    """A choice that grows.

    Args:
        stop: what ends the text.
        skip_special_tokens: whether special tokens have no text.
        logprobs: whether to return log probabilities.
        as_ids: whether these name tokens by their ids, as vLLM does: token_id:5.
        prompt: text to begin with (`echo`).

    Attributes:
        text: the text that `take` has returned.
        finish_reason: "stop" or "length"; None while the choice grows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        stop: StopStrings,
        ends: Sequence[int],
        *,
        skip_special_tokens: bool,
        logprobs: bool,
        as_ids: bool = False,
        prompt: str = "",
    ) -> None:
        self.index = index
        self.text = ""
        self.finish_reason: str | None = None
        self._tokenizer, self._ends = tokenizer, ends
        self._skip_special_tokens, self._as_ids = skip_special_tokens, as_ids
        self._stream = tokenizer.stream(stop, skip_special_tokens=skip_special_tokens)
        self._prompt = self._new = prompt
        self._entries: list[_Entry] | None = [] if logprobs else None
        self._position = _Position(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._told = False  # that it has finished

    def read_prompt(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], count: int) -> None:
        """Adds the prompt's tokens with `count` likeliest ones; `logprobs` has none for the first."""
        self._add(list(ids), [None, *(replace(one, top=one.top[:count]) for one in logprobs)])
        self._position = _Position(
            self._tokenizer, start=len(self._prompt), skip_special_tokens=self._skip_special_tokens
        )

    def push(self, piece: Piece) -> None:
        """Adds new tokens."""
        self._add(piece.tokens, piece.logprobs)
        for token in piece.tokens:
            self._new += self._stream.push(token)
        if piece.finish_reason is not None:
            self.finish("stop" if piece.finish_reason == "stop" else "length")

    def finish(self, reason: str) -> None:
        """Ends the choice."""
        self._new += self._stream.finish()
        self.finish_reason = reason

    def take(self) -> Record | None:
        """The choice with its text since the last call; None if there is nothing new. It is told once that it has finished."""
        finished = self.finish_reason is not None
        if not self._new and (self._told or not finished):
            return None
        self._told = finished
        text, self._new = self._new, ""
        self.text += text
        return {
            "text": text,
            "index": self.index,
            "logprobs": None if self._entries is None else self._logprobs(self._entries),
            "finish_reason": self.finish_reason,
        }

    def _add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        if self._entries is not None:
            for token, one in zip(tokens, logprobs, strict=True):
                self._entries.append(_Entry(token, self._position.before(token), one))

    def _logprobs(self, entries: "list[_Entry]") -> Record:
        """The log probabilities of tokens whose text has begun to show.

        At the end also those of tokens without text, such as an end token, but not those of a stop string's tokens.
        """
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
        # Several tokens may be written alike: the likeliest comes last, so it stays.
        return {self._written(token): value for token, value in sorted(top, key=lambda entry: entry[1])}

    def _written(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        piece = self._tokenizer.piece(token)
        return piece if isinstance(piece, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A token, its start in the text in characters, and its log probabilities."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class _Position:
    """Counts the characters of tokens. A character counts with the token that holds its last byte.

    Args:
        prompt: text that the tokens begin with (`echo`). Special tokens that it writes have text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str = "", start: int = 0, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._prompt, self.length = tokenizer, prompt, start
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, token: int) -> int:
        """Counts a token, and returns its start."""
        start = self.length
        if self._has_text(token):
            begun, content = self._decoder.getstate()[0], self._tokenizer.token_bytes(token)
            text = self._decoder.decode(content)
            self.length += len(text)
            if begun and text.startswith(_UNFINISHED) and not (begun + content).startswith(_UNFINISHED.encode()):
                start += 1  # the token before it didn't finish its character
        return start

    def _has_text(self, token: int) -> bool:
        """Whether it isn't a special token that is left out."""
        if self._tokenizer.decode([token], skip_special_tokens=self._skip_special_tokens):
            return True
        name = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._prompt.startswith(name, self.length)
