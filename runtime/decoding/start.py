"""The strategy that generation options ask for."""

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
    if options.min_new_tokens is not None:  # replaces min_length in transformers' generate, also a larger one
        options = options.replaced(min_length=0)
    extensions = extensions or Extensions()
    unguided: dict[str, type[DiverseBeams | ContrastiveSearch]] = {
        "diverse beam search": DiverseBeams,
        "contrastive search": ContrastiveSearch,
    }
    if options.strategy in unguided:
        return unguided[options.strategy](prompt, options, context, stop, extensions)
    strategy = BeamSearch if options.num_beams > 1 else Sampling
    if options.guidance_scale == 1:
        return strategy(prompt, options, context, stop, extensions)
    negative = prompt[-1:] if negative is None else negative
    # The context window ends the sequences when the longer ones fill it.
    context -= max(0, len(negative) - len(prompt))
    return Guided(strategy(prompt, options, context, stop, extensions), negative)
