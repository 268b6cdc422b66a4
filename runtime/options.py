"""Generation options: one table, in the names, defaults and meaning of transformers' GenerationConfig.

A field of `GenerationConfig` is the whole definition of an option: type, range, default, help. The command line, request lines, the
server's schema, the grid of a sweep and the documentation are derived from it. `GenerationOptions` in `requests` repeats names and
types for type checkers and editors, which can't derive them; a test compares the two.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gpt2onnx.errors import OptionError

from ..models import limits
from ..models.messages import shown
from .option_table import (
    NEEDLESS,
    NOT_SUPPORTED,
    SMALLEST,
    Count,
    Exponent,
    Factor,
    Ids,
    Length,
    NotNegative,
    Penalty,
    Probability,
    Rows,
    Share,
    Text,
    TokenId,
    TokenIdOrNone,
    Words,
    about,
    as_tuple,
    table,
)  # fmt: skip

DEFAULT_NEW_TOKENS = 64
# Options of which one at most says what a new text looks like.
STRUCTURES = ("json_schema", "regex", "choice", "grammar")
_log = logging.getLogger(__name__)


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to continue a prompt; docs/cli.md has each field's help, too.

    Raises:
        OptionError: a value is of the wrong type or out of range, or options contradict each other.
    """

    max_new_tokens: Annotated[
        Length | None, about(f"Most new tokens; wins over max_length. {DEFAULT_NEW_TOKENS} where no length is given.")
    ] = None
    min_new_tokens: Annotated[Count | None, about("No end token before this many new tokens.")] = None
    max_length: Annotated[Length | None, about("Most tokens, prompt included.")] = None
    min_length: Annotated[
        Count, about("No end token before this many tokens, prompt included; min_new_tokens replaces it.")
    ] = 0
    max_time: Annotated[
        NotNegative | None,
        about("Seconds, from the start of the prompt's computation, after which the token under way is the last."),
    ] = None
    do_sample: Annotated[bool, about("Draw the next token instead of taking the likeliest.")] = False
    temperature: Annotated[
        NotNegative,
        about("Divides the logits before sampling; 0 for greedy search.", sampling=True),
    ] = 1.0
    top_h: Annotated[
        Share | None,
        about("Sample among the likeliest of 100 tokens whose entropy terms add up to this share.", sampling=True),
    ] = None
    top_k: Annotated[Count, about("Sample among the k likeliest tokens; 0 for all.", sampling=True, off=0)] = 50
    top_p: Annotated[
        Probability, about("Sample among the likeliest tokens whose probabilities add up to p.", sampling=True)
    ] = 1.0
    min_p: Annotated[
        Probability | None, about("Sample among tokens at least p times as likely as the likeliest.", sampling=True)
    ] = None
    typical_p: Annotated[
        Share, about("Sample among the most typical tokens whose probabilities add up to p.", sampling=True)
    ] = 1.0
    epsilon_cutoff: Annotated[
        Probability, about("Sample among tokens of at least this probability; 0 for all.", sampling=True)
    ] = 0.0
    eta_cutoff: Annotated[
        Probability,
        about("As epsilon_cutoff, with a lower bound where the entropy is high; 0 for all.", sampling=True),
    ] = 0.0
    renormalize_logits: Annotated[
        bool, about("Turn the scores that processors and filters leave into log probabilities.")
    ] = False
    guidance_scale: Annotated[
        Exponent, about("Above 1: tokens that the negative prompt makes likely become less likely; 1 for no guidance.")
    ] = 1.0
    negative_prompt: Annotated[
        str | Sequence[TokenId] | None,
        about("Text or token ids that guidance leads away from; the prompt's last token by default."),
    ] = None
    penalty_alpha: Annotated[
        Probability,
        about(
            "Contrastive search among the top_k likeliest tokens: weight of their likeness to earlier ones; 0 for none."
        ),
    ] = 0.0
    repetition_penalty: Annotated[Penalty, about("Above 1: tokens seen before become less likely.")] = 1.0
    encoder_repetition_penalty: Annotated[Penalty, about("Above 1: the prompt's tokens become more likely.")] = 1.0
    presence_penalty: Annotated[
        Exponent, about("Subtracted from the logit of each token that is among the new ones; as OpenAI has it.")
    ] = 0.0
    frequency_penalty: Annotated[
        Exponent,
        about("Subtracted from a token's logit for each time that it is among the new ones; as OpenAI has it."),
    ] = 0.0
    no_repeat_ngram_size: Annotated[Count, about("No n-gram of this size occurs twice; 0 for no limit.")] = 0
    encoder_no_repeat_ngram_size: Annotated[
        Count, about("No n-gram of this size in the prompt occurs again; 0 for no limit.")
    ] = 0
    sequence_bias: Annotated[
        Annotated[Sequence[tuple[Words, Exponent]], Meta(min_length=1, max_length=limits.OPTION_SEQUENCES)] | None,
        about(
            "Added to the logit of a sequence's last token where its other tokens come right before.",
            example="[[[5,7],-2.5]]",
        ),
    ] = None
    logit_bias: Annotated[
        Annotated[Sequence[tuple[TokenId, Exponent]], Meta(min_length=1, max_length=limits.OPTION_IDS)] | None,
        about("Added to the logits of tokens; in JSON also an object from ids to biases.", example="50256=-100,11=2.5"),
    ] = None
    bad_words_ids: Annotated[
        Annotated[Sequence[Words], Meta(min_length=1, max_length=limits.OPTION_SEQUENCES)] | None,
        about("Token sequences that are never completed.", example="[[1,2],[3]]"),
    ] = None
    suppress_tokens: Annotated[Ids | None, about("Tokens that are never chosen.", example="1,2,3")] = None
    begin_suppress_tokens: Annotated[Ids | None, about("Tokens that are never chosen first.", example="1,2,3")] = None
    forced_bos_token_id: Annotated[TokenId | None, about("First new token after a prompt of one token.")] = None
    forced_eos_token_id: Annotated[
        TokenId | Sequence[TokenId] | None,
        about("Token that comes last where the length ends a sequence; of several, one of them.", example="1,2"),
    ] = None
    exponential_decay_length_penalty: Annotated[
        tuple[Count, Factor] | None,
        about(
            "A number of new tokens n and a factor f: m tokens after n, an end token's logit x becomes x + |x| (f^m - 1).",
            example="50,1.05",
        ),
    ] = None
    num_beams: Annotated[Rows, about("Width of the beam search; 1 for none.")] = 1
    num_beam_groups: Annotated[
        Rows, about("Groups of a diverse beam search; num_beams must be divisible by it. 1 for none.")
    ] = 1
    diversity_penalty: Annotated[
        NotNegative,
        about("Subtracted from a token's log probability for each beam of an earlier group that has just chosen it."),
    ] = 0.0
    length_penalty: Annotated[Exponent, about("Exponent of the length that divides a finished beam's score.")] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        about(
            "When a beam search ends: true with num_beams finished beams, false when a better one is unlikely, never when"
            " a better one is impossible.",
            example="true",
        ),
    ] = False
    num_return_sequences: Annotated[Rows, about("Continuations of each prompt.")] = 1
    seed: Annotated[
        Count | None,
        about(
            "Seed of the random draws, modulo 2**32; a fresh one by default. With the same seed equal prompts give equal"
            " continuations, in lower precisions than fp32 but for near ties.",
            sampling=True,
        ),
    ] = None
    eos_token_id: Annotated[
        TokenIdOrNone | Ids | None, about("Token or tokens that end a sequence.", example="1,2")
    ] = None
    stop: Annotated[
        Text | Annotated[Sequence[Text], Meta(max_length=limits.OPTION_SEQUENCES)],
        about("String or strings that end a sequence; the text is cut before them.", example="END", repeated=True),
    ] = ()
    json_schema: Annotated[
        dict[str, Any] | Text | None,
        about("JSON schema of the new text; on the command line also a file with it.", example="schema.json"),
    ] = None
    regex: Annotated[
        Text | None, about("Regular expression that the whole new text matches.", example="'[0-9]+ [a-z]+'")
    ] = None
    choice: Annotated[
        Annotated[Sequence[Text], Meta(min_length=1, max_length=limits.OPTION_SEQUENCES)] | None,
        about("Texts of which the new text is one.", example="yes", repeated=True),
    ] = None
    grammar: Annotated[Text | None, about("Grammar of the new text, in llguidance's form of Lark.")] = None
    logprobs: Annotated[
        Count | None, about("Return the log probability of each token, and of this many likeliest tokens.")
    ] = None
    prompt_lookup: Annotated[
        Count, about("Longest draft copied from earlier text and verified in one forward pass; 0 for none.")
    ] = 0

    skip_special_tokens: Annotated[bool, about("Leave special tokens, such as the end token, out of texts.")] = True
    truncate: Annotated[
        Literal["none", "left"],
        about(
            "Where a prompt leaves no room for the new tokens, left drops its first tokens, none refuses one beyond the context window."
        ),
    ] = "none"

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is not option.default:
                msgspec.structs.force_setattr(self, option.name, option.checked(value))
        if self.temperature == 0:
            msgspec.structs.force_setattr(self, "do_sample", False)
            msgspec.structs.force_setattr(self, "temperature", 1.0)
        elif self.temperature < SMALLEST:
            raise OptionError(
                f"temperature must be 0 (greedy search) or at least {SMALLEST:g}, not {self.temperature}", "temperature"
            )
        for conflict, message, name in self._conflicts():
            if conflict:
                raise OptionError(message, name)

    @property
    def strategy(self) -> str:
        """Greedy, sampling, contrastive search, beam search, diverse beam search or beam sampling."""
        if self.num_beam_groups > 1:
            return "diverse beam search"
        if self.num_beams > 1:
            return "beam sampling" if self.do_sample else "beam search"
        if self.do_sample:
            return "sampling"
        return "contrastive search" if self.penalty_alpha > 0 and self.top_k > 1 else "greedy"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens as a tuple."""
        return as_tuple(self.eos_token_id)

    @property
    def forced_eos_token_ids(self) -> tuple[int, ...]:
        """The tokens of which one comes last, as a tuple."""
        return as_tuple(self.forced_eos_token_id)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def structure(self) -> tuple[str, Any] | None:
        """The option that the new text's structure comes from, by name and value; None: any text will do."""
        return next(((name, value) for name in STRUCTURES if (value := getattr(self, name)) is not None), None)

    def new_tokens(self, prompt_length: int) -> int:
        """Most new tokens after a prompt of this many tokens; below 1 if max_length is reached already."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return self.max_length - prompt_length
        return DEFAULT_NEW_TOKENS

    def kept_tokens(self, prompt_length: int, context: int) -> int:
        """How many last tokens of a prompt stay, in a context window of this many: all, unless `truncate` drops some.

        As transformers' text-generation pipeline has it with `handle_long_generation="hole"`.

        Raises:
            OptionError: the new tokens alone fill the window.
        """
        new = self.new_tokens(prompt_length)
        if self.truncate == "none" or new < 1 or prompt_length + new <= context:
            return prompt_length
        if new >= context:
            raise OptionError(
                f"{new} new tokens leave no room for a prompt in the context window of {context}: ask for fewer",
                "truncate",
            )
        return context - new

    def to_dict(self) -> dict[str, Any]:
        """All options by name, as JSON holds them."""
        # Not by msgspec's own JSON, which has no form for half a surrogate pair.
        return dict(json.loads(json.dumps(msgspec.to_builtins(self))))

    def ending_as(self, others: "GenerationConfig") -> "GenerationConfig":
        """These options; where they name no end tokens or stop strings, with those of others."""
        missing = [name for name in ("eos_token_id", "stop") if getattr(self, name) == BY_NAME[name].default]
        return self.replaced(**{name: getattr(others, name) for name in missing})

    def replaced(self, **options: Any) -> "GenerationConfig":
        """These options with others in their place, without the rules of `merged`."""
        return GenerationConfig(**msgspec.structs.asdict(self) | options)  # checks, which structs.replace may not

    def merged(self, given: Mapping[str, Any]) -> "GenerationConfig":
        """These options with given ones on top. None switches an option off; an option that isn't among them stays.

        A sampling option without do_sample turns sampling on; top_k belongs to contrastive search where penalty_alpha is given.

        Raises:
            OptionError: an unknown name, a value out of range, or a contradiction.
        """
        if (unknown := min(given.keys() - BY_NAME.keys(), default=None)) is not None:
            from difflib import get_close_matches  # only now: it takes milliseconds

            if unknown in NEEDLESS:
                raise OptionError(f"{unknown} isn't needed here: leave it out", unknown)
            hint = "".join(f": did you mean {close!r}?" for close in get_close_matches(unknown, BY_NAME, 1))
            raise OptionError(f"unknown generation option {unknown!r}{hint}", unknown)
        values = {name: BY_NAME[name].off if value is None else value for name, value in given.items()}
        if isinstance(bias := values.get("logit_bias"), Mapping):  # OpenAI's form
            # Python refuses to read thousands of digits.
            numbers = {key: int(key) for key in bias if str(key).isdecimal() and len(str(key)) <= 10}
            values["logit_bias"] = [(numbers.get(key, key), each) for key, each in bias.items()]
        if values.get("max_length") is not None and values.get("max_new_tokens") is None:
            values["max_new_tokens"] = None
        if "do_sample" not in values and sampling_options({"penalty_alpha": self.penalty_alpha} | dict(given)):
            values["do_sample"] = True
        return self.replaced(**values)

    @classmethod
    def from_file_content(cls, content: Mapping[str, Any]) -> "GenerationConfig":
        """The options of a generation_config.json, where null counts as not given, as in transformers 5.

        A warning is logged for an option that transformers applies and this doesn't. Without do_sample, sampling options
        that are out of range count as not given, as in transformers.

        Raises:
            OptionError: a value is out of range.
        """
        for name, neutral in NOT_SUPPORTED.items():
            if content.get(name) not in (None, neutral):
                _log.warning("generation_config.json asks for %s, which gpt2onnx doesn't apply", name)
        values = {name: value for name, value in content.items() if name in BY_NAME and value is not None}
        if content.get("stop_strings") is not None:
            values.setdefault("stop", content["stop_strings"])
        # A cutoff that is out of range cuts nothing off in transformers.
        lenient = {"epsilon_cutoff", "eta_cutoff"}
        if not values.get("do_sample"):
            lenient = {option.name for option in OPTIONS if option.sampling}
        for name in lenient & values.keys():
            if not BY_NAME[name].takes(values[name]):
                del values[name]
        return cls(**values)

    def _conflicts(self) -> Iterator[tuple[bool, str, str]]:
        """Options that don't go together: whether they are given, the error, and the option at fault."""
        beams, groups, several, strategy = (
            self.num_beams,
            self.num_beam_groups,
            self.num_return_sequences,
            self.strategy,
        )
        name = "num_return_sequences"
        yield several > beams > 1, f"{name} {several} is more than num_beams {beams}", name
        alone = strategy in ("greedy", "contrastive search")
        yield several > 1 and alone, f"{name} above 1 needs sampling or beams: {strategy} has one result", name
        name = "prompt_lookup"
        one = beams == several == 1
        yield (
            bool(self.prompt_lookup) and not one,
            f"{name} works on one sequence: not with num_beams or num_return_sequences above 1",
            name,
        )
        first, *others = [each for each in STRUCTURES if getattr(self, each) is not None] or [""]
        yield bool(others), f"{first} excludes {' and '.join(others)}: give one of them", first
        name = "num_beam_groups"
        both = f"{name} above 1 and a diversity_penalty go together: give both or none"
        yield (groups == 1) != (self.diversity_penalty == 0), both, name
        yield bool(beams % groups), f"num_beams {beams} can't be divided into {groups} {name}", name
        diverse, guided = groups > 1, self.guidance_scale != 1
        yield diverse and self.do_sample, f"diverse beams aren't sampled: leave out {name} or do_sample", name
        ends = f"diverse beams end by end tokens only: leave out {name} or stop"
        yield diverse and bool(self.stop_strings), ends, name
        yield diverse and guided, f"diverse beams can't be guided: leave out {name} or guidance_scale", name
        name = "penalty_alpha"
        contrastive = f"contrastive search can't be guided: leave out {name} or guidance_scale"
        yield strategy == "contrastive search" and guided, contrastive, name
        # transformers refuses these, too.
        for name, ids in (
            ("forced_bos_token_id", as_tuple(self.forced_bos_token_id)),
            ("forced_eos_token_id", self.forced_eos_token_ids),
        ):
            suppressed = bool(ids) and set(ids) <= set(self.suppress_tokens or ())
            yield suppressed, f"{name} {shown(list(ids))} is among suppress_tokens: leave one of them out", name


OPTIONS = table(GenerationConfig)
BY_NAME = {option.name: option for option in OPTIONS}
SAMPLING_OPTIONS = tuple(option.name for option in OPTIONS if option.sampling)


def sampling_options(given: Mapping[str, Any]) -> list[str]:
    """Names of the given options that ask for sampling."""
    contrastive = {"top_k"} if given.get("penalty_alpha") else set()
    return [name for name in SAMPLING_OPTIONS if given.get(name) is not None and name not in contrastive]
