"""Next token: from logits through temperature and filters to a draw, stage by stage.

Stages are the processors of `generate` in their order, and draws come from its random generator: the first draw for a
seed is the token that `generate` takes, and N draws are those of N sequences of one request, or of N calls of
torch.multinomial after one torch.manual_seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import OptionError, PromptError

from ..models import limits
from ..runtime.arrays import Logits, Tokens
from ..runtime.decoding.filters import warp, warpers
from ..runtime.decoding.processors import process, processors
from ..runtime.decoding.start import effective
from ..runtime.decoding.strategy import new_seed
from ..runtime.decoding.torch_random import Candidates, Generator, softmax
from ..runtime.decoding.torch_topk import largest
from ..runtime.host.progress import Progress, or_notebook_bar
from ..runtime.model import Model
from ..runtime.options import OPTIONS, GenerationConfig
from ..runtime.requests import Prompt
from ..runtime.text.tokenizer import Tokenizer

# Filters in the order in which they apply, each with the value that filters nothing.
FILTERS: dict[str, Any] = {
    option.name: option.off for option in OPTIONS if option.sampling and option.name not in ("temperature", "seed")
}
# With beams there is no single draw.
_ONE_DRAW: dict[str, Any] = {
    "do_sample": True, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "num_return_sequences": 1,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Stage:
    """The candidates after one step.

    Attributes:
        name: "logits" (the network's own), "penalties" (processors that apply without sampling, too), "temperature",
            or a filter's name.
        scores: float32 [vocabulary]; minus infinity for tokens that are out.
        probabilities: their softmax, float32 [vocabulary].
    """

    name: str
    scores: Logits
    probabilities: Logits

    def __repr__(self) -> str:
        return f"{self.name}: {np.count_nonzero(self.scores > -np.inf):,} candidates"


@dataclass(frozen=True, repr=False)
class Choice:
    """Draw of the next token with one set of options.

    Attributes:
        stages: from the network's logits to the last filter.
        counts: int64 [vocabulary], draws of each token.
    """

    options: GenerationConfig
    stages: list[Stage]
    draws: int
    counts: npt.NDArray[np.int64]

    @property
    def probabilities(self) -> Logits:
        """Probabilities of the last stage, float32 [vocabulary]."""
        return self.stages[-1].probabilities

    def expected(self, token: int) -> float:
        """How often a token is to be expected among the draws."""
        return self.draws * float(self.probabilities[token])

    def top(self, count: int) -> list[int]:
        """The likeliest tokens by the network's own logits, the likeliest first.

        Raises:
            OptionError: count is below 0.
        """
        limits.check_at_least(0, top=count)
        return [int(token) for token in largest(self.stages[0].scores, count)]

    def __repr__(self) -> str:
        return f"temperature {self.options.temperature:g}: {'; '.join(map(repr, self.stages))}; {self.draws} draws"

    def rank(self, token: int) -> int:
        """A token's place by the network's own logits; 1 for the likeliest."""
        scores = self.stages[0].scores
        return 1 + int(np.count_nonzero(scores > scores[token]))


@dataclass(frozen=True, repr=False)
class NextToken:
    """Candidates for the token after a prompt.

    Attributes:
        prompt_ids: the prompt's tokens.
        choices: one for each temperature.
        tokenizer: has the tokens' texts.
    """

    prompt_ids: list[int]
    choices: list[Choice]
    tokenizer: Tokenizer

    def rows(self, top: int = 10) -> list[dict[str, Any]]:
        """A flat row for each of the likeliest tokens at each temperature.

        Its columns: temperature, token_id, piece, rank and logit by the network, the probability after each stage as p_ and
        the stage's name, the last one's as probability, and with draws how often it was drawn and how often that was to be expected.
        """
        return [self._row(choice, token) for choice in self.choices for token in choice.top(top)]

    def _row(self, choice: Choice, token: int) -> dict[str, Any]:
        probability = float(choice.probabilities[token])
        drawn = {"drawn": int(choice.counts[token]), "expected": choice.expected(token)}
        return {
            "temperature": choice.options.temperature,
            "token_id": token,
            "piece": None if self.tokenizer.missing else self.tokenizer.piece(token),
            "rank": choice.rank(token),
            "logit": float(choice.stages[0].scores[token]),
            **{f"p_{stage.name}": float(stage.probabilities[token]) for stage in choice.stages},
            "probability": probability,
            **(drawn if choice.draws else {}),
        }

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.choices))


def next_token(
    model: Model,
    prompt: Prompt,
    *,
    temperatures: Sequence[float] = (),
    draws: int = 0,
    seed: int | None = None,
    progress: Progress | None = None,
    **filters: float | None,
) -> NextToken:
    """Follows the logits after a prompt to the draw of the next token.

    Args:
        model: computes the logits. Options that aren't given are its own, as in `generate`.
        prompt: a text, or token ids.
        temperatures: one choice for each.
        draws: number of draws for each temperature, each time from the same seed.
        seed: of the draws; None for a random one.
        progress: called with the draws made and all to make after every hundred; a notebook shows a bar by default.
        filters: top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff and eta_cutoff.

    Raises:
        PromptError: the prompt is empty, too long, or not in the vocabulary.
        OptionError: an option is unknown or out of range.
        BackendError: ONNX Runtime failed.
    """
    unknown = filters.keys() - FILTERS.keys()
    if unknown:
        raise OptionError(f"{min(unknown)!r} is not one of {', '.join(FILTERS)}")
    if any(temperature == 0 for temperature in temperatures):
        raise OptionError("temperature must be above 0: 0 is greedy search, which draws nothing", "temperature")
    limits.check_at_least(0, draws=draws)
    if seed is None and draws:
        seed = new_seed(GenerationConfig(do_sample=True))
    given: Sequence[float | None] = list(temperatures) or [None]
    settings = [
        model.generation_config.merged(
            _ONE_DRAW | {"seed": seed} | filters | ({} if temperature is None else {"temperature": temperature})
        )
        for temperature in given
    ]
    tokens = model.prompt_ids(prompt)
    for options in settings:
        model.check_options(options, len(tokens))
    cache = model.runner.new_cache(1, len(tokens))
    logits = model.runner.forward(cache, slice(0, 1), tokens[None])[0].copy()
    if draws:
        progress = or_notebook_bar(progress, "Drawing", "draws")
    choices = []
    for index, options in enumerate(settings):

        def report(done: int, before: int = index * draws) -> None:
            if progress is not None:
                progress(before + done, draws * len(settings))

        choices.append(choose(logits, options, tokens=tokens, draws=draws, report=report))
    return NextToken(tokens.tolist(), choices, model.tokenizer)


def choose(
    logits: Logits,
    options: GenerationConfig,
    *,
    tokens: Tokens | None = None,
    draws: int = 0,
    report: Callable[[int], None] | None = None,
) -> Choice:
    """Follows logits, float32 [vocabulary], to draws of a token.

    Args:
        tokens: the text so far, int64 [length], for options that depend on it.
    """
    found = stages(logits, options, np.zeros(0, np.int64) if tokens is None else tokens)
    seed = new_seed(options)
    generator = Generator(0 if seed is None else seed)
    counts = np.zeros(len(logits), np.int64)
    candidates = Candidates.all(found[-1].scores).possible()
    for index in range(draws):
        counts[generator.multinomial(candidates)[0]] += 1
        if report is not None and ((index + 1) % 100 == 0 or index + 1 == draws):
            report(index + 1)
    return Choice(options, found, draws, counts)


def stages(logits: Logits, options: GenerationConfig, tokens: Tokens) -> list[Stage]:
    """The candidates after each step of the options; temperature is always one of them."""
    # Renormalising scores leaves probabilities as they are.
    unfiltered = effective(options).replaced(**_ONE_DRAW, **FILTERS, renormalize_logits=False)
    filters = {name: getattr(options, name) for name in FILTERS if getattr(options, name) != FILTERS[name]}
    steps = {"penalties": unfiltered.replaced(do_sample=False), "temperature": unfiltered}
    for name, value in filters.items():
        steps[name] = unfiltered = unfiltered.replaced(**{name: value})
    result = [Stage("logits", logits, softmax(logits))]
    for name, so_far in steps.items():
        # Each time from the start: `processors` and `warpers` alone decide the order.
        scores = warp(warpers(so_far), process(processors(so_far, tokens), tokens, logits)).dense()
        if name != "penalties" or scores is not logits:
            result.append(Stage(name, scores, softmax(scores)))
    return result


def token_of(model: Model, text: str) -> int:
    """Encodes a text of one token.

    Raises:
        PromptError: it has several tokens, or none.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    pieces = " ".join(repr(model.tokenizer.piece(token)) for token in ids)
    raise PromptError(f"{text!r} is not one token of this model, but {f'{len(ids)}: {pieces}' if ids else 'none'}")
