"""The strategy that generation options ask for."""

from ..arrays import Tokens
from ..options import GenerationConfig
from .beam_search import BeamSearch
from .extensions import Extensions
from .sampling import Sampling
from .strategy import Stop, Strategy


def start(
    prompt: Tokens,
    options: GenerationConfig,
    context: int,
    stop: Stop | None = None,
    extensions: Extensions | None = None,
) -> Strategy:
    """Begins to continue a prompt.

    Args:
        prompt: int64 [length].
        options: the generation options.
        context: positions of the network.
        stop: a further reason to end a sequence.
        extensions: the caller's functions.
    """
    if options.min_new_tokens is not None:  # replaces min_length in transformers' generate, also a larger one
        options = options.replaced(min_length=0)
    strategy = BeamSearch if options.num_beams > 1 else Sampling
    return strategy(prompt, options, context, stop, extensions or Extensions())
