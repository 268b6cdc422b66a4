"""Where drafts come from: the text so far, a bundle's quantised twin, or another bundle."""

from dataclasses import dataclass
from pathlib import Path

from gpt2onnx.errors import OptionError

from ...models import limits
from ...models.bundle import Bundle
from ...models.messages import shown
from ..options import GenerationConfig
from .runner import Runner
from .speculation import OPEN_AFTER, Drafter

SOURCES = ("auto", "none", "lookup", "twin")
_LOOKUP = 10  # tokens of a draft from the text so far, where the options don't say


@dataclass(frozen=True)
class Drafting:
    """How the next tokens are drafted.

    Attributes:
        source: "none"; "lookup", the text so far; "twin", the bundle's twin, from the first token on; or "auto", the twin where
            there is one and it pays, and the text so far where the options ask for it.
        model: another bundle, which drafts in place of the twin.
        length: tokens of a draft by a network; None: as many as pay.

    Raises:
        OptionError: the source is unknown, or the length below 1.
    """

    source: str = "auto"
    model: Path | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise OptionError(f"draft must be one of {', '.join(SOURCES)}, not {shown(self.source)}")
        if self.length is not None:
            limits.check_at_least(1, draft_length=self.length)
        if self.model is not None and self.source != "auto":
            raise OptionError(f"draft_model drafts by itself: leave out draft {self.source!r}")

    def needs_network(self, bundle: Bundle) -> bool:
        """Whether a second network may draft for a bundle."""
        return self.model is not None or (bundle.has_twin and self.source in ("auto", "twin"))

    def drafter(self, bundle: Bundle, runner: Runner) -> Drafter | None:
        """What drafts for a bundle that a runner has loaded; None: no network does.

        Raises:
            OptionError: the bundle has no twin for this device, or the other bundle has another vocabulary.
            BundleError: the other bundle, or the twin, can't be used.
            BackendError: ONNX Runtime can't load its graph.
        """
        if self.model is not None:
            other = Bundle.open(self.model)
            if other.config.vocab_size != bundle.config.vocab_size:
                raise OptionError(
                    f"{self.model} can't draft: its vocabulary has {other.config.vocab_size} tokens,"
                    f" that of {bundle.folder} {bundle.config.vocab_size}"
                )
            if other.has_int8_cache:
                other = other.with_cache(bundle.cache_dtype)
            network = Runner(other, device=runner.device, threads=runner.threads, alone=False)
            return Drafter(lambda: network, shared=False, context=other.config.n_positions, length=self.length, after=0)
        if self.source == "twin" and not runner.has_twin:
            raise OptionError(
                f"{bundle.folder} has no twin for {runner.device}: export it with --twin, or draft otherwise"
            )
        if self.source not in ("auto", "twin") or not runner.has_twin:
            return None
        return Drafter(
            lambda: Runner(bundle, threads=runner.threads, alone=False, twin=True),
            shared=bundle.manifest.dtype == "fp32",
            context=bundle.config.n_positions,
            length=self.length,
            after=0 if self.source == "twin" else OPEN_AFTER,
        )

    def options(self, options: GenerationConfig) -> GenerationConfig:
        """The options with drafts from the text so far as the source says."""
        if self.source == "none" and options.prompt_lookup:
            return options.replaced(prompt_lookup=0)
        single = options.num_beams == 1 and options.num_return_sequences == 1
        if self.source == "lookup" and single and not options.prompt_lookup:
            return options.replaced(prompt_lookup=_LOOKUP)
        return options
