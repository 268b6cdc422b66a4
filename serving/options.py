"""Generation options of a request: the runtime's, with JSON types. Options that OpenAI has too have OpenAI's range.

The only list of generation options in this folder.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..runtime.options import MOST_SEQUENCES

# Each costs time in every step.
_MAX_STRINGS, _MAX_LETTERS = 16, 1000
_MAX_IDS = 1000
_MAX_LOGPROBS = 100

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=_MAX_IDS)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_LETTERS)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Sequences = Annotated[int, Field(ge=1, le=MOST_SEQUENCES)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=1e-30, le=1e30)]
# JSON has no tuples, only lists.
Bias = Annotated[tuple[TokenIds, Annotated[float, Field(ge=-1e30, le=1e30)]], Field(strict=False)]
Decay = Annotated[tuple[Count, Annotated[float, Field(gt=0, le=1e30)]], Field(strict=False)]


class Strict(BaseModel):
    """A body without unknown fields, strings for numbers, or NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerationOptions(Strict):
    """The generation options; null counts as not given."""

    do_sample: bool | None = Field(None, description="Draw the next token instead of taking the likeliest.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Divides the logits before sampling. Default 1; 0 for greedy decoding."
    )
    top_p: Probability | None = Field(
        None, description="Sample among the likeliest tokens whose probabilities add up to p (nucleus sampling)."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=_MAX_STRINGS)] | None = Field(
        None, description="String or strings that end a text; the text is cut before them."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Seed of the random draws, modulo 2**32. Default: a random one."
    )
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = Field(
        None,
        description="Also return the log probability of each token, and of this many likeliest tokens in its place.",
    )
    top_h: Share | None = Field(
        None,
        description="Sample among the likeliest tokens whose entropy adds up to this share of the top 100 tokens' entropy.",
    )
    top_k: Count | None = Field(None, description="Sample among the k likeliest tokens; 0 for all.")
    min_p: Probability | None = Field(
        None, description="Sample among tokens at least p times as likely as the likeliest."
    )
    typical_p: Share | None = Field(
        None, description="Sample among the tokens of most typical surprise whose probabilities add up to p."
    )
    epsilon_cutoff: Probability | None = Field(
        None, description="Sample among tokens of at least this probability; 0 for all."
    )
    eta_cutoff: Probability | None = Field(
        None,
        description="Sample among tokens of at least this probability, or of a lower one if the entropy is high; 0 for all.",
    )
    renormalize_logits: bool | None = Field(
        None, description="Normalise the scores after the filters, so that beam scores are log probabilities."
    )
    repetition_penalty: Penalty | None = Field(None, description="Above 1 makes earlier tokens less likely.")
    encoder_repetition_penalty: Penalty | None = Field(
        None, description="Above 1 makes the prompt's tokens more likely."
    )
    no_repeat_ngram_size: Count | None = Field(
        None, description="Generate no n-gram of this size twice; 0 for no limit."
    )
    encoder_no_repeat_ngram_size: Count | None = Field(
        None, description="Repeat no n-gram of this size from the prompt; 0 for no limit."
    )
    sequence_bias: Annotated[list[Bias], Field(min_length=1, max_length=_MAX_IDS)] | None = Field(
        None,
        description="Biases of logits: each is added to the last token of its sequence after the others, such as [[[5, 7], -2.5]].",
    )
    bad_words_ids: Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_IDS)] | None = Field(
        None, description="Token sequences that are never generated."
    )
    suppress_tokens: Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None = Field(
        None, description="Tokens that are never generated."
    )
    begin_suppress_tokens: Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None = Field(
        None, description="Tokens that are never generated first."
    )
    forced_bos_token_id: TokenId | None = Field(None, description="First new token after a prompt of one token.")
    forced_eos_token_id: TokenId | Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None = Field(
        None, description="Last token, or a choice of last tokens, of a text that the length ends."
    )
    exponential_decay_length_penalty: Decay | None = Field(
        None,
        description="Number of new tokens, and factor by which each further one makes end tokens likelier, such as [50, 1.05].",
    )
    num_beams: Sequences | None = Field(None, description="Width of the beam search.")
    length_penalty: Annotated[float, Field(ge=-1e30, le=1e30)] | None = Field(
        None, description="Exponent of the length that divides a beam's score."
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None,
        description="When beam search ends: true at num_beams candidates, false when a better one is unlikely, 'never' when it is impossible.",
    )
    min_new_tokens: Count | None = Field(None, description="Fewest new tokens before an end token.")
    min_length: Count | None = Field(None, description="Fewest tokens before an end token, prompt included.")
    eos_token_id: (
        Annotated[int, Field(ge=-1, lt=2**31)] | Annotated[list[TokenId], Field(max_length=_MAX_IDS)] | None
    ) = Field(None, description="Token or tokens that end a text; -1 for none.")
    prompt_lookup: Annotated[int, Field(ge=0, le=_MAX_IDS)] | None = Field(
        None,
        description="Most tokens of a draft that is copied from earlier text and verified in one pass; 0 for no drafts.",
    )

    def generation_options(self) -> dict[str, Any]:
        """The given options by the runtime's names."""
        names = GenerationOptions.model_fields
        return {name: value for name in names if (value := getattr(self, name)) is not None}
