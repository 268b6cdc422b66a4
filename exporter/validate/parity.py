"""Proves a bundle against PyTorch: its weights, its logits position by position, and the tokens that it generates.

Each question has an answer that doesn't depend on how sensitive a network is to small errors, since it is judged by what
errors of a known size do to the same network in PyTorch:

1. Are the weights that the bundle holds the checkpoint's? They are equal, or the nearest in float16. Where they are
   quantised, no block is off by more than rounding can be, and all of them together change the logits little more
   than rounding every weight to the nearest value does. Only the latter can be said of weights that were rounded for
   known inputs: each of them makes up for the errors of others, biases for what is left, and norms may divide inputs
   by what matrices are multiplied by.
2. Are its logits those of a network with exactly these weights? They differ by what kernels round: about as much as
   when activations in PyTorch are rounded as in kernels of that precision. A second graph, for prompts and batches, is
   asked the same, with its own weights and its own rounding.
3. In fp32: does it generate the very tokens of `transformers.generate`?

What a precision loses against the checkpoint is reported besides. The report is plain data, so a bundle can carry it
in its manifest.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import Gpt2OnnxError

from ...models.bundle import WIDE_GRAPH, Bundle
from ...models.config import GPT2Config
from ...models.shapes import weight_shapes
from ...runtime.arrays import Tokens
from ...runtime.engine.runner import Runner
from ...runtime.engine.second_graph import FEWEST
from ...runtime.model import Model
from ...runtime.options import GenerationConfig
from ...runtime.requests import Request
from ..checkpoint.checkpoint import Checkpoint
from ..graph.stored import StoredWeights, deviation, in_axis, rounded_to_nearest
from ..quantize.rounding import Rounding
from .cases import MIN_POSITIONS, MIN_VOCAB_SIZE, Case, Suite, cases, why_left_out
from .reference import Logits, Reference, same_random_numbers

_PROMPT_LENGTHS = (1, 2, 7, 33, 128)
_LOSSY = ("fp16", "int8", "int4")
# Larger networks take seconds for a case in PyTorch, so the quick suite has a few short ones only; it has them, too, where
# tokens aren't judged.
_FEW_WEIGHTS = 30_000_000
# Rounding to the nearest value is off by half a step at most; the scales themselves are rounded a little, too.
_MOST_STEPS = 0.55
# Where the scales aren't rounded.
_HALF_A_STEP = 0.501
# What is rounded is known by its kind and size only, so a sound bundle can differ by some times as much.
_TIMES_ROUNDING = {"fp32": 3.0, "fp16": 5.0, "int8": 2.0, "int4": 2.0}  # float16 also rounds the sums between layers
_TIMES_NEAREST = 3.0
# Relative to the largest logit, where rounding happens to change nothing: by float32, and by scales in float16.
_NOISE, _NOISE_OF_SCALES = 1e-4, 1e-3


def check(folder: Path, checkpoint: Checkpoint, suite: str = "quick", *, screens: bool | None = None) -> dict[str, Any]:
    """Compares a bundle with the checkpoint that it was made from, run by PyTorch.

    Args:
        folder: the bundle.
        checkpoint: its source.
        suite: "quick" (seconds) or "full" (every strategy and processor, with seeds).
        screens: whether the bundle's logits may be screened; None asks the processor.

    Returns:
        The report: what it was compared with, the figures of each check, and `passed` for all of them.

    Raises:
        MissingExtraError: torch or transformers isn't installed.
        CheckpointError: transformers can't load the checkpoint.
        BundleError, BackendError: the bundle can't be used.
    """
    reference = Reference(checkpoint)
    model = Model(folder, wide_after=None, screen_after=0, screens=screens)
    manifest, runner = model.bundle.manifest, model.runner
    lossy, times = manifest.dtype in _LOSSY, _TIMES_ROUNDING[manifest.dtype]
    prompts = _prompts(model.config)
    original = reference.logits(prompts)
    tokens = _tokens(model, reference, suite, judged=not lossy)

    report: dict[str, Any] = {"suite": suite, "precision": manifest.dtype, "reference": reference.name}
    roundings: dict[str, Rounding] = {}
    expected = nearest = original
    if manifest.graph == "fused":
        stored = StoredWeights(model.bundle)
        roundings = _roundings(stored, checkpoint)
        report["weights"] = _weights(stored, checkpoint)
        if roundings:
            reference.take(lambda name: _nearest(stored, checkpoint, name))
            nearest = reference.logits(prompts)
        if lossy:
            reference.take(stored.tensor)
            expected = reference.logits(prompts)
            report["loss"] = _figures(_whole(runner, prompts), original)
        if roundings:
            report["rounded"] = _judged(
                iter(expected), original, _TIMES_NEAREST * _largest(nearest, original), _NOISE_OF_SCALES
            )
    with reference.rounding(roundings.get, half=manifest.dtype == "fp16"):
        allowed = times * _largest(reference.logits(prompts), expected)
    for name, run in (("whole", _whole), ("cached", _cached), ("ragged", _ragged)):
        report[name] = _judged(run(runner, prompts), expected, allowed, _NOISE)
    many = [prompt for prompt in prompts if len(prompt) >= FEWEST]
    if WIDE_GRAPH in manifest.files and many:
        report["wide"] = _wide(model.bundle, checkpoint, reference, many)
    report["tokens"] = tokens
    report["passed"] = all(part["passed"] for part in report.values() if isinstance(part, dict) and "passed" in part)
    return report


def _prompts(config: GPT2Config) -> list[Tokens]:
    """Prompts of several lengths, up to the whole context; any tokens do, since all logits are compared."""
    random = np.random.default_rng(0)
    lengths = sorted({min(length, config.n_positions) for length in _PROMPT_LENGTHS})
    return [random.integers(config.vocab_size, size=length) for length in lengths]


def _weights(stored: StoredWeights, checkpoint: Checkpoint) -> dict[str, Any]:
    """Whether the bundle's weights are the checkpoint's."""
    unequal, steps = list[str](), dict[str, float]()
    shapes = weight_shapes(checkpoint.config, tied=checkpoint.tied)
    for name in shapes:
        found, wanted, blocks = stored.tensor(name), checkpoint.tensor(name), stored.blocks(name)
        if blocks is not None:
            steps[name] = deviation(found, wanted, blocks, along=in_axis(name))
        elif not np.array_equal(found, wanted.astype(np.float16) if stored.is_half(name) else wanted):
            unequal.append(name)
    # Rounding for known inputs begins with norms: their biases take the inputs' mean off, their weights smooth inputs.
    quantized, calibrated = len(steps), bool(steps) and any(map(_is_norm, unequal))
    if calibrated:
        if any(_is_norm(name) and name.endswith(".weight") for name in unequal):
            # A matrix that is multiplied by what inputs were divided by can't be compared weight by weight.
            steps = {name: most for name, most in steps.items() if not name.startswith("h.")}
        unequal = [name for name in unequal if not (_is_norm(name) or name.endswith(".bias"))]
    furthest = max(steps, key=steps.__getitem__, default=None)
    most = steps[furthest] if furthest else 0.0
    return {
        "tensors": len(shapes),
        "quantized": quantized,
        "calibrated": calibrated,
        "unequal": unequal,
        "most_steps": most,
        "furthest": furthest,
        "passed": not unequal and (calibrated or most <= _MOST_STEPS),
    }


def _is_norm(name: str) -> bool:
    """Whether a weight is that of a norm inside a block."""
    return ".ln_1." in name or ".ln_2." in name


def _roundings(stored: StoredWeights, checkpoint: Checkpoint) -> dict[str, Rounding]:
    """How inputs are rounded, by the names of the weights that they are multiplied with."""
    roundings = {}
    for name in weight_shapes(checkpoint.config, tied=False):
        if kind := stored.rounding(name):
            roundings[name] = kind
    return roundings


def _wide(bundle: Bundle, checkpoint: Checkpoint, reference: Reference, prompts: list[Tokens]) -> dict[str, Any]:
    """The second graph's weights against the first one's, and its logits."""
    first, second = StoredWeights(bundle), StoredWeights(bundle, wide=True)
    steps = max(float(np.abs((second.tensor(name) - first.tensor(name)) / step).max()) for name, step in second.made())
    reference.take(second.tensor, own_head=True)
    expected = reference.logits(prompts)
    with reference.rounding(_roundings(second, checkpoint).get, half=False):
        allowed = _TIMES_ROUNDING[bundle.manifest.dtype] * _largest(reference.logits(prompts), expected)
    runner = Runner(bundle)
    runner.open_wide()
    figures = _judged(_whole(runner, prompts), expected, allowed, _NOISE)
    return figures | {"most_steps": steps, "passed": figures["passed"] and steps <= _HALF_A_STEP}


def _nearest(stored: StoredWeights, checkpoint: Checkpoint, name: str) -> Logits:
    """The checkpoint's weight, quantised in the plainest way where the bundle's is quantised."""
    blocks, weight = stored.blocks(name), checkpoint.tensor(name)
    return weight if blocks is None else rounded_to_nearest(weight, blocks, along=in_axis(name))


def _whole(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt in one forward pass."""
    for prompt in prompts:
        cache = runner.new_cache(1, len(prompt))
        yield runner.forward(cache, slice(0, 1), prompt[None], logits="all")


def _cached(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """Each prompt's first half in one pass, then token by token."""
    for prompt in prompts:
        cache = runner.new_cache(1, len(prompt))
        half = (len(prompt) + 1) // 2
        parts = [runner.forward(cache, slice(0, 1), prompt[None, :half], logits="all").copy()]
        parts += [runner.forward(cache, slice(0, 1), token[None, None]).copy() for token in prompt[half:]]
        yield np.concatenate(parts)


def _ragged(runner: Runner, prompts: list[Tokens]) -> Iterator[Logits]:
    """All prompts in three passes, each row with its own number of tokens behind its own past."""
    lengths = np.array([len(prompt) for prompt in prompts])
    cache = runner.new_cache(len(prompts), lengths.max())
    found: list[list[Logits]] = [[] for _ in prompts]
    for share in (1 / 3, 2 / 3, 1):
        begins = cache.lengths.copy()
        counts = np.ceil(share * lengths).astype(np.int64) - begins
        tokens = np.zeros((len(prompts), counts.max()), np.int64)
        for row, prompt, begin, count in zip(tokens, prompts, begins, counts, strict=True):
            row[:count] = prompt[begin : begin + count]
        logits = runner.forward(cache, slice(0, len(prompts)), tokens, counts, "all").copy()
        for part, each in zip(found, np.split(logits, counts.cumsum()[:-1]), strict=True):
            part.append(each)
    yield from map(np.concatenate, found)


def _differences(found: Logits, wanted: Logits) -> npt.NDArray[np.float64]:
    """The root mean square of what logits differ by, for each position."""
    squares = np.square(found - wanted, dtype=np.float64)
    result: npt.NDArray[np.float64] = np.sqrt(squares.mean(-1))
    return result


def _largest(found: list[Logits], wanted: list[Logits]) -> float:
    """The difference of the position that differs most."""
    return float(np.concatenate([_differences(*pair) for pair in zip(found, wanted, strict=True)]).max())


def _judged(ours: Iterator[Logits], expected: list[Logits], allowed: float, noise: float) -> dict[str, Any]:
    figures = _figures(ours, expected)
    passed = figures["difference"] <= allowed or figures["max_relative"] <= noise
    return figures | {"allowed": allowed, "passed": passed}


def _figures(ours: Iterator[Logits], expected: list[Logits]) -> dict[str, Any]:
    """Figures over the last positions of each prompt, as many as there are of ours."""
    positions = agreeing = 0
    kl_sum = 0.0
    differences, largest, size = [], [], []
    for found, wanted in zip(ours, expected, strict=True):
        wanted = wanted[-len(found) :]
        positions += len(found)
        differences.append(_differences(found, wanted).max())
        largest.append(np.abs(found - wanted).max())
        size.append(np.abs(wanted).max())
        agreeing += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        log_p, log_q = _log_softmax(wanted), _log_softmax(found)
        kl_sum += float((np.exp(log_p) * (log_p - log_q)).sum())
    return {
        "positions": positions,
        # Of the worst position; NumPy's maximum is not a number where any of them isn't.
        "difference": float(np.max(differences)),
        "max_abs": float(np.max(largest)),
        "max_relative": float(np.max(largest) / np.max(size)),
        "top1_agreement": agreeing / positions,
        "kl": kl_sum / positions,
    }


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """In double precision, since the differences are small."""
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    return exact


def _tokens(model: Model, reference: Reference, suite: str, *, judged: bool) -> dict[str, Any]:
    """How many cases give the same tokens, where the first one that doesn't parts, and which this PyTorch can't judge."""
    config, notes, chosen, same_numbers = model.config, list[str](), list[Case](), same_random_numbers()
    if config.vocab_size < MIN_VOCAB_SIZE or config.n_positions < MIN_POSITIONS:
        notes.append(f"none for fewer than {MIN_VOCAB_SIZE} tokens or {MIN_POSITIONS} positions")
    else:
        weights = sum(math.prod(shape) for shape in weight_shapes(config, tied=config.tie_word_embeddings).values())
        size: Suite = "full" if suite == "full" else "quick" if judged and weights <= _FEW_WEIGHTS else "brief"
        chosen = cases(config.vocab_size, config.n_positions, size)
    reasons = {case.name: _why_left_out(case, reference, same_numbers=same_numbers) for case in chosen}
    left_out = Counter(reason for reason in reasons.values() if reason)
    chosen = [case for case in chosen if not reasons[case.name]]
    equal = 0
    first_difference = None
    for case in chosen:
        expected = reference.tokens(case)
        request = Request(case.prompt_ids, GenerationConfig().merged(case.options))
        ((_, outcome),) = model.complete([request])
        if isinstance(outcome, Gpt2OnnxError):
            raise outcome
        found = [sequence.token_ids for sequence in outcome.sequences]
        if found == expected:
            equal += 1
        elif first_difference is None:
            first_difference = {"case": case.name, "options": dict(case.options)} | _first_difference(found, expected)
    figures: dict[str, Any] = {"cases": len(chosen), "equal": equal, "first_difference": first_difference}
    figures |= {"notes": notes, "left_out": dict(left_out)}
    return figures | ({"passed": equal == len(chosen)} if judged else {})


def _why_left_out(case: Case, reference: Reference, *, same_numbers: bool) -> str | None:
    if case.options.get("do_sample") and not same_numbers:
        return "this PyTorch draws random numbers in another way (a build with MKL)"
    return why_left_out(case.options, reference.version)


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
