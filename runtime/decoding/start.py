"""The strategy that generation options ask for."""

from collections.abc import Iterable, Sequence

from gpt2onnx.errors import OptionError

from ..arrays import Tokens
from ..extensions import Extensions
from ..options import GenerationConfig
from .beam_search import BeamSearch
from .contrastive_search import ContrastiveSearch
from .diverse_beams import DiverseBeams
from .guidance import Guided
from .sampling import Sampling
from .strategy import Stop, Strategy


def start(
    prompt: Tokens,
    options: GenerationConfig,
    context: int,
    stop: Stop | None = None,
    extensions: Extensions | None = None,
    negative: Tokens | None = None,
) -> Strategy:
    """Begins to continue a prompt.

    Args:
        prompt: int64 [length].
        options: the generation options.
        context: positions of the network.
        stop: a further reason to end a sequence.
        extensions: the caller's functions.
        negative: negative prompt of guidance, int64 [length]; None: the prompt's last token.
    """
    options = effective(options)
    extensions = extensions or Extensions()
    if options.strategy == "diverse beam search":
        return DiverseBeams(prompt, options, context, stop, extensions)
    if options.strategy == "contrastive search":
        return ContrastiveSearch(prompt, options, context, stop, extensions)
    strategy = BeamSearch if options.num_beams > 1 else Sampling
    if options.guidance_scale == 1:
        return strategy(prompt, options, context, stop, extensions)
    negative = prompt[-1:] if negative is None else negative
    # The context window ends the sequences when the longer ones fill it.
    context -= max(0, len(negative) - len(prompt))
    return Guided(strategy(prompt, options, context, stop, extensions), negative)


def effective(options: GenerationConfig) -> GenerationConfig:
    """The options as decoding takes them: min_new_tokens replaces min_length, also a larger one, as in transformers' generate."""
    return options if options.min_new_tokens is None else options.replaced(min_length=0)


def check_vocabulary(options: GenerationConfig, vocab_size: int, prompt_length: int) -> None:
    """Raises OptionError if an option names a token that the vocabulary doesn't have."""
    begins = options.forced_bos_token_id if prompt_length == 1 else None
    in_vocabulary: dict[str, Iterable[Sequence[int]]] = {
        "bad_words_ids": options.bad_words_ids or (),
        "logit_bias": ((token,) for token, _ in options.logit_bias or ()),
        "sequence_bias": (ids for ids, _ in options.sequence_bias or ()),
        "forced_bos_token_id": () if begins is None else [[begins]],
        "forced_eos_token_id": [options.forced_eos_token_ids],
    }
    for name, sequences in in_vocabulary.items():
        worst = max((token for ids in sequences for token in ids), default=0)
        if worst >= vocab_size:
            raise OptionError(f"{name} holds {worst}, but the vocabulary ends at {vocab_size - 1}", name)
