"""Generation options: names, defaults and meaning of transformers' GenerationConfig, validated once."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeGuard

from gpt2onnx.errors import OptionError

from ..models.messages import shown

DEFAULT_NEW_TOKENS = 64
MOST_SEQUENCES = 1000  # of one prompt at a time; each has a row of the cache
# float32 holds logits multiplied or divided by numbers in this range.
_SMALLEST, LARGEST = 1e-30, 1e30
_TOKEN_IDS_END = 2**31
# Giving one of these without saying do_sample means sampling.
SAMPLING_OPTIONS = (
    "temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "seed",
)  # fmt: skip

# What else in transformers' GenerationConfig changes tokens, with the value that changes none.
_NOT_SUPPORTED = {
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "token_healing": False,
    "watermarking_config": None,
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: at most so many new tokens; wins over max_length. 64 where neither is given.
        min_new_tokens: no end token before so many new tokens.
        max_length: at most so many tokens, prompt included.
        min_length: no end token before so many tokens, prompt included.
        do_sample: draw the next token instead of taking the likeliest.
        temperature: divides the logits before sampling; above 0.
        top_h: sample among the likeliest of the 100 likeliest whose terms of the entropy add up to this share of it.
        top_k: sample among the k likeliest; 0 for all.
        top_p: sample among the likeliest whose probabilities add up to p.
        min_p: sample among those at least p times as likely as the likeliest.
        typical_p: sample among the tokens of most typical surprise whose probabilities add up to p.
        epsilon_cutoff: sample among the tokens of at least this probability; 0 for all.
        eta_cutoff: sample among the tokens of at least this probability, or of less where many are likely; 0 for all.
        renormalize_logits: make log probabilities of what processors and filters leave, so that beams' scores are such.
        repetition_penalty: above 1 makes tokens seen before less likely.
        encoder_repetition_penalty: above 1 makes the prompt's tokens more likely.
        no_repeat_ngram_size: no n-gram of this size is written twice; 0 for no limit.
        encoder_no_repeat_ngram_size: no n-gram of this size in the prompt is written again; 0 for no limit.
        sequence_bias: pairs of a token sequence and what is added to its last token's logit where the rest has just been
            written, such as [([5, 7], -2.5)].
        bad_words_ids: token sequences that are never completed.
        suppress_tokens: tokens that are never chosen.
        begin_suppress_tokens: tokens that are never chosen first.
        forced_bos_token_id: the first new token after a prompt of one token.
        forced_eos_token_id: token or tokens of which one comes last where the length ends a sequence.
        exponential_decay_length_penalty: a number of new tokens and a factor, such as (50, 1.05): n tokens later, an end
            token's logit x is x + |x| (factor ** n - 1).
        num_beams: width of the beam search; 1 for none.
        length_penalty: exponent of the length that divides a finished beam's score.
        early_stopping: when a beam search ends; True as soon as there are num_beams candidates, False
            when a better one is unlikely, "never" when there can be no better one.
        num_return_sequences: continuations of each prompt.
        seed: of the random draws, modulo 2**32; fresh ones where None.
        eos_token_id: token or tokens that end a sequence.
        stop: string or strings that end a sequence where its new tokens spell them, special tokens included; the text is
            cut before them.
        logprobs: also return the log probability of each token and of so many likeliest ones.
        prompt_lookup: greatest length of drafts copied from earlier text and verified in one pass; 0 for none.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    renormalize_logits: bool = False
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: Sequence[tuple[Sequence[int], float]] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_length"):
            self._whole(name, least=1)
        for name in ("num_beams", "num_return_sequences"):
            self._whole(name, least=1, most=MOST_SEQUENCES)
        for name in (
            "min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "logprobs",
            "prompt_lookup", "seed",
        ):  # fmt: skip
            self._whole(name, least=0)
        wanted = f"a number from {_SMALLEST:g} to {LARGEST:g}"
        self._between("temperature", _SMALLEST, LARGEST, f"{wanted} (for greedy decoding, don't sample)")
        self._between("repetition_penalty", _SMALLEST, LARGEST, wanted)
        self._between("encoder_repetition_penalty", _SMALLEST, LARGEST, wanted)
        for name in ("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"):
            self._between(name, 0, 1, "between 0 and 1")
        for name in ("top_h", "typical_p"):
            self._between(name, 0, 1, "above 0 and at most 1", above=True)
        self._between("length_penalty", -LARGEST, LARGEST, f"a number from {-LARGEST:g} to {LARGEST:g}")
        for name in ("do_sample", "renormalize_logits"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be true or false, not {shown(getattr(self, name))}", name)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise OptionError(
                f"early_stopping must be true, false or 'never', not {shown(self.early_stopping)}", "early_stopping"
            )
        # transformers takes -1 for a token that never comes.
        self._token_ids("eos_token_id", self.eos_token_ids, least=-1)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            ids = getattr(self, name)
            self._token_ids(name, () if ids is None else ids, least=-1)
        self._token_ids("forced_bos_token_id", self.forced_bos_token_ids)
        self._token_ids("forced_eos_token_id", self.forced_eos_token_ids)
        self._check_decay()
        self._check_bad_words()
        self._check_biases()
        texts = isinstance(self.stop, Sequence) and all(isinstance(text, str) and text for text in self.stop)
        if not texts or self.stop == "":
            raise OptionError(
                f"stop must be a string or a list of strings, none of them empty, not {shown(self.stop)}", "stop"
            )
        self._check_together()

    @property
    def strategy(self) -> str:
        """What the options amount to: greedy, sampling, beam search or beam sampling."""
        if self.num_beams > 1:
            return "beam sampling" if self.do_sample else "beam search"
        return "sampling" if self.do_sample else "greedy"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens, however many."""
        return _ids(self.eos_token_id)

    @property
    def forced_bos_token_ids(self) -> tuple[int, ...]:
        """The token that comes first after a prompt of one token, if there is one."""
        return _ids(self.forced_bos_token_id)

    @property
    def forced_eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that may come last, however many."""
        return _ids(self.forced_eos_token_id)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however many."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may be generated after a prompt of so many; below 1 where max_length is reached already."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return self.max_length - prompt_length
        return DEFAULT_NEW_TOKENS

    def merged(self, options: Mapping[str, Any]) -> "GenerationConfig":
        """These options with others on top, by name; None counts as not given.

        Raises:
            OptionError: an unknown name, a value out of range, or a contradiction.
        """
        given = {name: value for name, value in options.items() if value is not None}
        unknown = given.keys() - {field.name for field in fields(self)}
        if unknown:
            raise OptionError(f"unknown generation option {min(unknown)!r}")
        if "max_length" in given and "max_new_tokens" not in given:
            given["max_new_tokens"] = None
        return replace(self, **given)

    @classmethod
    def from_file_content(cls, content: Mapping[str, Any]) -> "GenerationConfig":
        """The options of a generation_config.json; a warning is logged for what transformers would apply and this can't.

        Without do_sample, options that only matter to sampling may be out of range, as in transformers: temperature 0, for
        one, is how some files say greedy. They then count as not given.

        Raises:
            OptionError: a value is out of range.
        """
        for name, neutral in _NOT_SUPPORTED.items():
            if content.get(name) not in (None, neutral):
                _log.warning("generation_config.json asks for %s, which gpt2onnx doesn't apply", name)
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in content.items() if name in known}
        # A cutoff that is out of range cuts nothing off in transformers.
        lenient = ("epsilon_cutoff", "eta_cutoff") if given.get("do_sample") else SAMPLING_OPTIONS
        given = {name: value for name, value in given.items() if name not in lenient or cls._takes(name, value)}
        return cls().merged({"stop": content.get("stop_strings")} | given)

    @classmethod
    def _takes(cls, name: str, value: Any) -> bool:
        """Whether a value of an option is in range."""
        try:
            cls().merged({name: value})
        except OptionError:
            return False
        return True

    def _has_no_default(self, name: str) -> bool:
        """Whether None stands for an option's absence."""
        return getattr(type(self), name) is None

    def _whole(self, name: str, least: int, most: float = math.inf) -> None:
        value = getattr(self, name)
        if value is None and self._has_no_default(name):
            return
        if not _is_whole(value) or not least <= value <= most:
            limit = "" if most == math.inf else f" to {most}"
            raise OptionError(f"{name} must be a whole number from {least}{limit}, not {shown(value)}", name)

    def _between(self, name: str, low: float, high: float, wanted: str, *, above: bool = False) -> None:
        value = getattr(self, name)
        if value is None and self._has_no_default(name):
            return
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            raise OptionError(f"{name} must be {wanted}, not {shown(value)}", name)

    def _token_ids(self, name: str, ids: object, least: int = 0) -> None:
        if not isinstance(ids, Sequence) or not all(_is_whole(i) and least <= i < _TOKEN_IDS_END for i in ids):
            raise OptionError(f"{name} must hold token ids (whole numbers from {least}), not {shown(ids)}", name)

    def _check_bad_words(self) -> None:
        words = self.bad_words_ids
        if words is None:
            return
        if not _is_list(words) or not words:
            raise OptionError(
                f"bad_words_ids must be a list of lists of token ids, not {shown(words)}", "bad_words_ids"
            )
        for word in words:
            self._token_ids("bad_words_ids", word)
            if not word:
                raise OptionError("bad_words_ids must not hold an empty list", "bad_words_ids")

    def _check_biases(self) -> None:
        biases = self.sequence_bias
        if biases is None:
            return
        if not _is_list(biases) or not biases or not all(_is_list(pair) and len(pair) == 2 for pair in biases):
            raise OptionError(
                f"sequence_bias must be a list of token sequences with a number each, such as [[[5, 7], -2.5]],"
                f" not {shown(biases)}",
                "sequence_bias",
            )
        for ids, bias in biases:
            self._token_ids("sequence_bias", ids)
            if not ids:
                raise OptionError("sequence_bias must not hold an empty sequence", "sequence_bias")
            if not _is_number(bias) or not -LARGEST <= bias <= LARGEST:
                raise OptionError(
                    f"sequence_bias must hold numbers from {-LARGEST:g} to {LARGEST:g}, not {shown(bias)}",
                    "sequence_bias",
                )

    def _check_decay(self) -> None:
        decay = self.exponential_decay_length_penalty
        if decay is None:
            return
        start, factor = decay if _is_list(decay) and len(decay) == 2 else (None, None)
        if not _is_whole(start) or start < 0 or not _is_number(factor) or not 0 < factor <= LARGEST:
            raise OptionError(
                f"exponential_decay_length_penalty must be a whole number of tokens and a factor above 0, such as"
                f" [50, 1.05], not {shown(decay)}",
                "exponential_decay_length_penalty",
            )

    def _check_together(self) -> None:
        if self.num_return_sequences > self.num_beams and self.num_beams > 1:
            raise OptionError(
                f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams} gives",
                "num_return_sequences",
            )
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise OptionError(
                "num_return_sequences above 1 needs sampling or beams: greedy decoding has one result",
                "num_return_sequences",
            )
        if self.prompt_lookup and (self.num_beams > 1 or self.num_return_sequences > 1):
            raise OptionError(
                "prompt_lookup works on one sequence: not with num_beams or num_return_sequences above 1",
                "prompt_lookup",
            )
        # transformers refuses these, too.
        forced = {"forced_bos_token_id": self.forced_bos_token_ids, "forced_eos_token_id": self.forced_eos_token_ids}
        for name, ids in forced.items():
            if ids and set(ids) <= set(self.suppress_tokens or ()):
                raise OptionError(f"{name} can't come where suppress_tokens holds it: {shown(list(ids))}", name)
        if self.logprobs is not None and self.num_beams > 1:
            raise OptionError("logprobs are of single sequences: not with num_beams above 1", "logprobs")


def _ids(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids, however many."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Sequence) else (ids,)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
