"""Proves a bundle against PyTorch: its logits position by position, and the tokens that it generates.

Needs the packages torch and transformers, which nothing else here does; they are imported when a
check begins. The report is plain data, so a bundle can carry it in its manifest.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, Gpt2OnnxError, MissingExtraError

from ..models.bundle import CONFIG
from ..models.config import GPT2Config
from ..models.shapes import weight_shapes
from ..runtime.generator import Model, Request
from ..runtime.logits import Tokens
from ..runtime.options import GenerationConfig
from ..runtime.sampling import Generator
from ..runtime.session import Session
from .cases import MIN_POSITIONS, MIN_VOCAB_SIZE, Case, cases
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

Logits = npt.NDArray[np.float32]

_PROMPT_LENGTHS = (1, 2, 7, 33, 128)


@dataclass(frozen=True)
class Limits:
    """What a bundle of some precision must keep to.

    Attributes:
        relative: largest difference of a logit, relative to the largest logit of all.
        kl: mean Kullback-Leibler divergence from PyTorch's next-token distribution, in nats.
        top1: share of positions where the likeliest token must be the same.
        tokens: whether every generated token must be the same.
    """

    relative: float
    kl: float
    top1: float
    tokens: bool


# In fp32 only the order of additions differs; the others lose what their weights lose.
LIMITS = {
    "fp32": Limits(relative=1e-4, kl=1e-7, top1=1.0, tokens=True),
    "fp16": Limits(relative=0.02, kl=1e-4, top1=0.98, tokens=False),
    "int8": Limits(relative=0.1, kl=2e-3, top1=0.95, tokens=False),
    "int4": Limits(relative=0.5, kl=0.1, top1=0.7, tokens=False),
}


def check(folder: Path, checkpoint: Checkpoint, suite: str = "quick") -> dict[str, Any]:
    """Compares a bundle with the checkpoint that it was made from, run by PyTorch.

    Args:
        folder: the bundle.
        checkpoint: its source.
        suite: "quick" (seconds) or "full" (every strategy and processor, with seeds).

    Returns:
        The report: what it was compared with, the figures of each check, and `passed` for all of them.

    Raises:
        MissingExtraError: torch or transformers isn't installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError("Checking parity with PyTorch", error.name or "torch", "optimum") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = Model(folder)
    limits = LIMITS[model.bundle.manifest.dtype]
    reference = _reference(checkpoint)
    prompts = _prompts(model.config)
    with torch.inference_mode():
        expected = [reference(torch.from_numpy(prompt[None])).logits[0].numpy() for prompt in prompts]
    session = model.session
    report: dict[str, Any] = {
        "suite": suite,
        "reference": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "limits": asdict(limits),
        "whole": _report(_whole(session, prompts), expected, limits),
        "cached": _report(_cached(session, prompts), expected, limits),
        "ragged": _report(_ragged(session, prompts), expected, limits),
        "tokens": _tokens(model, reference, suite, limits),
    }
    report["passed"] = all(report[name]["passed"] for name in ("whole", "cached", "ragged", "tokens"))
    return report


def _prompts(config: GPT2Config) -> list[Tokens]:
    """Prompts of several lengths, up to the whole context; any tokens do, since all logits are compared."""
    random = np.random.default_rng(0)
    lengths = sorted({min(length, config.n_positions) for length in _PROMPT_LENGTHS})
    return [random.integers(config.vocab_size, size=length) for length in lengths]


def _whole(session: Session, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt in one forward pass."""
    for prompt in prompts:
        cache = session.new_cache(1, len(prompt))
        yield session.forward(cache, slice(0, 1), prompt[None], keep=len(prompt))[0]


def _cached(session: Session, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt's first half in one pass, then token by token."""
    for prompt in prompts:
        cache = session.new_cache(1, len(prompt))
        half = (len(prompt) + 1) // 2
        parts = [session.forward(cache, slice(0, 1), prompt[None, :half], keep=half)[0].copy()]
        parts += [session.forward(cache, slice(0, 1), token[None, None])[0].copy() for token in prompt[half:]]
        yield np.concatenate(parts)


def _ragged(session: Session, prompts: list[Tokens]) -> Iterator[Logits]:
    """The last token of all prompts in one pass, after each prompt's others were taken into a row of their own."""
    cache = session.new_cache(len(prompts), max(map(len, prompts)))
    for row, prompt in enumerate(prompts):
        if len(prompt) > 1:
            session.forward(cache, slice(row, row + 1), prompt[None, :-1])
    last = np.array([[prompt[-1]] for prompt in prompts])
    yield from session.forward(cache, slice(0, len(prompts)), last)


def _report(ours: Iterator[Logits], expected: list[Logits], limits: Limits) -> dict[str, Any]:
    """Figures over the last positions of each prompt, as many as there are of ours."""
    positions = agreeing = 0
    max_abs = largest = kl_sum = 0.0
    for found, wanted in zip(ours, expected, strict=True):
        wanted = wanted[-len(found) :]
        positions += len(found)
        max_abs = max(max_abs, float(np.abs(found - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
        agreeing += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        log_p, log_q = _log_softmax(wanted), _log_softmax(found)
        kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum())
    relative, top1, kl = max_abs / largest, agreeing / positions, kl_sum / positions
    allowed = math.ceil((1 - limits.top1) * positions)
    return {
        "positions": positions,
        "max_abs": max_abs,
        "max_relative": relative,
        "top1_agreement": top1,
        "kl": kl,
        "passed": relative <= limits.relative and kl <= limits.kl and positions - agreeing <= allowed,
    }


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """In double precision, since the differences are small."""
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    return exact


def _reference(checkpoint: Checkpoint) -> "GPT2LMHeadModel":
    """The checkpoint in PyTorch, float32; read by transformers itself where it is in transformers' own layout."""
    from transformers import GenerationConfig as ReferenceOptions

    # transformers 4's other attention implementations leave out scale_attn_by_inverse_layer_idx.
    attention: dict[str, Any] = {"attn_implementation": "eager"}
    try:
        model = _load_reference(checkpoint, attention)
    except Exception as error:  # transformers raises whatever its parts raise
        raise CheckpointError(f"transformers can't load {checkpoint.name} to compare with: {error}") from error
    # The cases say what matters, whatever the checkpoint's own options are.
    model.generation_config = ReferenceOptions()
    return model


def _load_reference(checkpoint: Checkpoint, attention: dict[str, Any]) -> "GPT2LMHeadModel":
    import torch
    from transformers import GPT2Config as ReferenceConfig
    from transformers import GPT2LMHeadModel

    weights = [*checkpoint.folder.glob("model*.safetensors"), *checkpoint.folder.glob("pytorch_model*.bin")]
    if (checkpoint.folder / CONFIG).is_file() and weights and not Path(checkpoint.name).is_file():
        return GPT2LMHeadModel.from_pretrained(checkpoint.folder, dtype=torch.float32, **attention).eval()
    model = GPT2LMHeadModel(ReferenceConfig(**dict(checkpoint.raw_config) | attention)).eval()
    tensors = {
        name if name.startswith("lm_head") else f"transformer.{name}": torch.from_numpy(checkpoint.tensor(name))
        for name in weight_shapes(checkpoint.config, tied=checkpoint.tied)
    }
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


def _tokens(model: Model, reference: "GPT2LMHeadModel", suite: str, limits: Limits) -> dict[str, Any]:
    """How many cases give the same tokens, and where the first one that doesn't parts."""
    config, notes, chosen = model.config, [], list[Case]()
    if config.vocab_size < MIN_VOCAB_SIZE or config.n_positions < MIN_POSITIONS:
        notes.append(f"none for fewer than {MIN_VOCAB_SIZE} tokens or {MIN_POSITIONS} positions")
    else:
        chosen = cases(config.vocab_size, config.n_positions, "full" if suite == "full" else "quick")
    if not _same_random_numbers():
        chosen = [case for case in chosen if not case.options.get("do_sample")]
        notes.append("sampling left out: this PyTorch draws random numbers in another way (a build with MKL)")
    equal = 0
    first_difference = None
    for case in chosen:
        expected = reference_tokens(reference, case)
        request = Request(case.prompt_ids, GenerationConfig().merged(case.options))
        ((_, outcome),) = model.complete([request])
        if isinstance(outcome, Gpt2OnnxError):
            raise outcome
        found = [sequence.token_ids for sequence in outcome.sequences]
        if found == expected:
            equal += 1
        elif first_difference is None:
            first_difference = {"case": case.name, "options": dict(case.options)} | _first_difference(found, expected)
    return {
        "cases": len(chosen),
        "equal": equal,
        "first_difference": first_difference,
        "notes": notes,
        "passed": equal == len(chosen) or not limits.tokens,
    }


def reference_tokens(reference: Any, case: Case) -> list[list[int]]:
    """What `transformers.generate` adds to the prompt: of each returned sequence, up to its end token."""
    import torch

    options = dict(case.options)
    seed = options.pop("seed", None)
    ends = options.get("eos_token_id", [])
    ends = [ends] if isinstance(ends, int) else list(ends)
    prompt = torch.tensor([case.prompt_ids])
    if seed is not None:
        torch.manual_seed(seed)
    with torch.inference_mode():
        # What follows an end token is padding; it goes through the network, so it has to be a token.
        output = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), pad_token_id=ends[0] if ends else 0, **options
        )
    sequences = []
    for row in output[:, prompt.shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        sequences.append(row[:length])
    return sequences


def _first_difference(found: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours != theirs:
            same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            position = min(len(ours), len(theirs)) if same is None else same
            return {
                "sequence": number,
                "position": position,
                "found": ours[position:][:1],
                "expected": theirs[position:][:1],
            }
    return {}


def _same_random_numbers() -> bool:
    """Whether this PyTorch's CPU generator has the stream that `runtime.sampling` reproduces."""
    import torch

    logits = np.zeros(1000, np.float32)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        theirs = [int(torch.multinomial(torch.softmax(torch.from_numpy(logits), -1), 1)) for _ in range(8)]
    finally:
        torch.random.set_rng_state(state)
    generator = Generator(0)
    return theirs == [int(generator.multinomial(logits)[0]) for _ in range(8)]
