"""Structured output: texts that are JSON of a schema, match a regular expression or a grammar, or are one of several choices.

llguidance compiles each of them to a grammar over the tokenizer's vocabulary, and says which tokens may come next.
https://github.com/guidance-ai/llguidance
"""

import functools
import json
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2onnx.errors import MissingExtraError, OptionError

from ...models import limits
from ..arrays import Logits, Tokens
from ..host import native
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

# As Python's json.dumps writes. With any white space, a small network may write nothing else for long.
_JSON_STYLE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEPT = 512  # texts whose matchers are kept: those of all beams and drafts of the last steps
_KEPT_TOKENIZERS = 4  # one for each set of end tokens
_KEPT_GRAMMARS = 8  # each keeps its tokenizer, which takes 33 MB with GPT-2's vocabulary


class Constraint:
    """Allows the tokens that keep the new text within a grammar. Each text may be asked about at any time.

    Args:
        name: of the option that it comes from.
        matcher: of the grammar, at its beginning.
        begin: the prompt's length in tokens.
        beams: whether a text that no token may follow, or that is outside the grammar, goes on with scores of minus infinity, as one
            beam of several; otherwise it is an error.
    """

    def __init__(self, name: str, matcher: "LLMatcher", begin: int, *, beams: bool) -> None:
        self._name, self._start, self._begin, self._beams = name, matcher, begin, beams
        self._matchers: dict[bytes, LLMatcher] = {}

    def __call__(self, tokens: Tokens, scores: Logits) -> None:
        """Sets the scores [vocab] of tokens that may not follow tokens [length] to minus infinity.

        Raises:
            OptionError: none is left, and it is the only text.
        """
        matcher = self._matcher(tokens[self._begin :])
        if matcher.is_error():
            scores[:] = -np.inf
            return
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")[: len(scores)].view(bool)
        scores[: len(allowed)][~allowed] = -np.inf
        scores[len(allowed) :] = -np.inf
        if not self._beams:
            self.check(scores)

    def check(self, scores: Logits) -> None:
        """Raises OptionError if scores are all minus infinity."""
        if not scores.max() > -np.inf:
            raise OptionError(f"other options leave no token that {self._name} allows", self._name)

    def _check_failure(self, matcher: "LLMatcher") -> None:
        """Raises OptionError for a matcher's error, but where beams choose a token that is forbidden: others go on."""
        reason = matcher.get_error().partition("\n")[0]
        if re.search("too (many|complex|big|large)", reason):  # a limit of llguidance's own
            raise OptionError(f"{self._name} is too large: {reason}", self._name)
        if not self._beams:
            raise OptionError(f"another option or function chose a token that {self._name} forbids", self._name)

    def or_complete(self, stop: Callable[[Tokens], bool] | None) -> Callable[[Tokens], bool]:
        """Whether a sequence, int64 [length], ends: by the given reason, or since its text is complete and nothing may follow."""

        def ends(tokens: Tokens) -> bool:
            matcher = self._matcher(tokens[self._begin :])
            return (stop is not None and stop(tokens)) or bool(matcher.is_stopped() and not matcher.is_error())

        return ends

    def _matcher(self, new: Tokens) -> "LLMatcher":
        known = len(new)
        while known and new[:known].tobytes() not in self._matchers:
            known -= 1
        matcher = self._matchers[new[:known].tobytes()] if known else self._start
        for length in range(known, len(new)):
            matcher = matcher.deep_copy()  # a few microseconds: what doesn't change is shared
            matcher.consume_token(int(new[length]))
            if matcher.is_error():
                self._check_failure(matcher)
            self._matchers[new[: length + 1].tobytes()] = matcher
            if len(self._matchers) > _KEPT:
                del self._matchers[next(iter(self._matchers))]
        return matcher


class Grammars:
    """Makes the constraints of a model's requests.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = functools.lru_cache(_KEPT_GRAMMARS)(self._compile)
        self._with_ends = functools.lru_cache(_KEPT_TOKENIZERS)(self._read_tokenizer)

    def constraint(self, name: str, value: Any, ends: tuple[int, ...], begin: int, *, beams: bool) -> Constraint:
        """The constraint of an option.

        Args:
            name: json_schema, regex, choice or grammar.
            value: the option's.
            ends: tokens that end a text.
            begin: the prompt's length in tokens.
            beams: whether a beam search chooses the tokens.

        Raises:
            OptionError: it isn't a schema, expression or grammar that llguidance can compile, or the model has no tokenizer.
            MissingExtraError: llguidance isn't installed.
        """
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except RecursionError as error:
            raise OptionError(f"{name} can't be used: it is nested too deep", name) from error
        return Constraint(name, self._compiled(name, text, ends).deep_copy(), begin, beams=beams)

    def _compile(self, name: str, text: str, ends: tuple[int, ...]) -> "LLMatcher":
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"The option {name}", "llguidance", "structured") from error
        if self._tokenizer.missing:
            raise OptionError(f"{name} needs a tokenizer, which the model doesn't have", name)

        def wrong(reason: str) -> OptionError:
            return OptionError(f"{name} can't be used: {reason}", name)

        if fault := _too_large(name, text):
            raise wrong(fault)
        with native.raising(wrong):
            matcher = LLMatcher(self._with_ends(ends), _grammar(name, text), log_level=0)
        if matcher.is_error():
            raise wrong(matcher.get_error().partition("\n<state>")[0])
        return matcher

    def _read_tokenizer(self, ends: tuple[int, ...]) -> "LLTokenizer":
        from llguidance import LLTokenizer

        known = [token for token in ends if token < len(self._tokenizer)]
        return LLTokenizer(self._tokenizer.to_json(), eos_token=known or None)


def _too_large(name: str, text: str) -> str | None:
    """Why a value is more than llguidance can take in a moment, in words behind "it"; None where it isn't."""
    if name == "choice":
        return None  # its options are counted
    if len(text) > (most := limits.STRUCTURE_LETTERS[name]):
        return f"it has {len(text):,} letters, more than the {most:,} that may be"
    if name == "regex":
        return None  # the library counts its brackets itself
    if name == "json_schema":
        with suppress(ValueError, RecursionError):  # what isn't JSON is refused later
            text = json.dumps(json.loads(text))  # a name may be written with escapes
    references = text.count('"$ref"') if name == "json_schema" else text.count(":")
    if references > limits.STRUCTURE_REFERENCES:
        unit = "references" if name == "json_schema" else "colons"
        return f"it has {references:,} {unit}, more than the {limits.STRUCTURE_REFERENCES} that may be"
    levels = max(accumulate((letter in "([{") - (letter in ")]}") for letter in text), default=0)
    if levels > limits.STRUCTURE_LEVELS:
        return f"it is nested {levels:,} levels deep, more than the {limits.STRUCTURE_LEVELS} that may be"
    return None


def _grammar(name: str, text: str) -> str:
    """llguidance's form of an option's value: a schema or choices as JSON, or a regular expression or grammar."""
    from llguidance import LLMatcher

    match name:
        case "json_schema":
            return str(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE))
        case "regex":
            return str(LLMatcher.grammar_from_regex(text))
        case "choice":
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(text)))))
    return str(LLMatcher.grammar_from_lark(text))
