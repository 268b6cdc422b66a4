"""Parity with PyTorch: a bundle's weights, logits at every position, and generated tokens.

No check depends on how sensitive a network is to small errors: each is judged by the effect that errors of a known size have
on the same network in PyTorch.

1. Are the bundle's weights those of the checkpoint? They are equal, or the nearest in float16. Of quantised ones no block is off
   by more than rounding can be, and all together change the logits little more than rounding every weight to nearest does.
   Quantised ones are compared after smoothing, whose factors follow from the checkpoint alone; that smoothing leaves the
   network as it is, the logits show. For calibrated weights only the logits count: each weight makes up for the errors of
   others, biases for the rest, and factors follow from activations.
2. Are its logits those of a network with exactly these weights? They may differ by as much as rounding activations in PyTorch,
   as the kernels of that precision do, changes them. The second graph is judged in the same way, with its own
   weights and rounding, and so is the graph for interchange, which our runtime may not run.
3. In fp32: does it generate the very tokens of `transformers.generate`?

The loss of a precision against the checkpoint is reported besides. The report is plain data for the bundle's manifest.
"""

import math
from collections import Counter
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from gpt2onnx.errors import Gpt2OnnxError

from ...models.bundle import RAGGED_GRAPH, Bundle
from ...models.config import GPT2Config
from ...models.shapes import weight_shapes
from ...runtime.arrays import Tokens
from ...runtime.engine.runner import Runner
from ...runtime.engine.second_graph import MIN_TOKENS, pays
from ...runtime.host.progress import Progress
from ...runtime.model import Model
from ...runtime.options import GenerationConfig
from ...runtime.requests import Request
from ..checkpoint.checkpoint import Checkpoint
from ..graph.blocks import Array, in_axis
from ..graph.input_rounding import InputRounding
from ..quantize.layers import Tensor
from ..quantize.transforms import Smoothing, range_by_weights
from . import logits
from .bundle_weights import BundleWeights, rounded_to_nearest, worst_error
from .cases import MIN_POSITIONS, MIN_VOCAB_SIZE, Case, Suite, cases, why_left_out
from .reference import Reference, same_random_numbers

_PROMPT_LENGTHS = (1, 2, 7, 33, 128)
_LOSSY = ("fp16", "int8", "int4")
# Larger networks take seconds for a case in PyTorch: the quick suite has only a few short ones, as where tokens aren't judged.
_FEW_WEIGHTS = 30_000_000
_MOST_STEPS = 0.55  # rounding to nearest is off by half a step at most; rounding the scales adds a little
_HALF_A_STEP = 0.501  # with scales that aren't rounded
_FACTOR_ROUNDING = 1e-5  # share of a weight; processors differ in the last digits of smoothing's factors
# Only kind and size of rounding errors are known, so a sound bundle can differ by some times as much. float16 also rounds
# the sums between layers.
_TIMES_ROUNDING = {"fp32": 3.0, "fp16": 5.0, "int8": 2.0, "int4": 2.0}
_TIMES_NEAREST = 3.0
# Relative to the largest logit, where rounding happens to change nothing: of float32, and of scales in float16.
_NOISE, _NOISE_OF_SCALES = 1e-4, 1e-3


def check(
    folder: Path, checkpoint: Checkpoint, suite: str = "quick", progress: Progress | None = None
) -> dict[str, Any]:
    """Compares a bundle with its checkpoint run by PyTorch.

    Args:
        suite: "quick" (seconds) or "full" (every strategy and processor, with seeds).
        progress: called with the requests compared and all requests after each.

    Returns:
        The report: the reference, the figures of each check, and `passed` for all of them.

    Raises:
        MissingExtraError: torch or transformers isn't installed.
        CheckpointError: transformers can't load the checkpoint.
        BundleError, BackendError: the bundle can't be used.
    """
    reference = Reference(checkpoint)
    model = Model(folder, wide_after=None, draft="none")
    bundle, manifest, runner = model.bundle, model.bundle.manifest, model.runner
    lossy, times = manifest.dtype in _LOSSY, _TIMES_ROUNDING[manifest.dtype]
    prompts = _prompts(bundle.config)
    original = reference.logits(prompts)
    tokens = _check_tokens(model, reference, suite, progress, judged=not lossy)

    report: dict[str, Any] = {"suite": suite, "precision": manifest.dtype, "reference": reference.name}
    roundings: dict[str, InputRounding] = {}
    expected = nearest = original
    if manifest.graph == "fused":
        weights = BundleWeights(bundle)
        roundings = _roundings(weights, bundle.config)
        wanted = _smoothed(weights, checkpoint)
        report["weights"] = _check_weights(weights, wanted, checkpoint)
        if roundings:
            reference.take(lambda name: _rounded_to_nearest(weights, wanted, name))
            nearest = reference.logits(prompts)
        if lossy:
            reference.take(weights.tensor)
            expected = reference.logits(prompts)
            report["loss"] = logits.figures(logits.whole(runner, prompts), original)
        if roundings:
            allowed = _TIMES_NEAREST * logits.largest_difference(nearest, original)
            report["rounded"] = logits.judged(expected, original, allowed, _NOISE_OF_SCALES)
    with reference.rounding(roundings.get, half=manifest.dtype == "fp16"):
        allowed = times * logits.largest_difference(reference.logits(prompts), expected)
    for way in (logits.whole, logits.cached, logits.ragged):
        report[way.__name__] = logits.judged(way(runner, prompts), expected, allowed, _NOISE)
    if RAGGED_GRAPH in manifest.files:  # which the runtime has run; model.onnx is for other runtimes
        del model, runner  # one network at a time
        runner = Runner(bundle.without(RAGGED_GRAPH), wide_after=None)
        report["interchange"] = logits.judged(logits.cached(runner, prompts), expected, allowed, _NOISE)
    if pays(bundle) and (long := [prompt for prompt in prompts if len(prompt) >= MIN_TOKENS[manifest.dtype]]):
        report["wide"] = _check_second_graph(bundle, reference, long)
    report["tokens"] = tokens
    report["passed"] = all(part["passed"] for part in report.values() if isinstance(part, dict) and "passed" in part)
    return report


def _prompts(config: GPT2Config) -> list[Tokens]:
    """Prompts of several lengths, up to the whole context; any tokens do, since all logits are compared."""
    random = np.random.default_rng(0)
    lengths = sorted({min(length, config.n_positions) for length in _PROMPT_LENGTHS})
    return [random.integers(config.vocab_size, size=length) for length in lengths]


def _smoothed(weights: BundleWeights, checkpoint: Checkpoint) -> Tensor:
    """Gives the weights that an export without calibration rounds: the checkpoint's, where nothing is quantised."""
    config, tensor = checkpoint.config, checkpoint.tensor
    ranges = partial(range_by_weights, config, tensor)
    return Smoothing(config, tensor, lambda layer: weights.blocks(f"{layer}.weight"), ranges).tensor


def _check_weights(weights: BundleWeights, wanted: Tensor, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compares the bundle's weights with those that it was made of."""
    unequal, steps = list[str](), dict[str, float]()
    shapes = weight_shapes(checkpoint.config, tied=checkpoint.tied)
    tolerance = _FACTOR_ROUNDING if any(map(weights.blocks, shapes)) else 0
    for name in shapes:
        found, expected, blocks = weights.tensor(name), wanted(name), weights.blocks(name)
        if blocks is not None:
            steps[name] = worst_error(found, expected, blocks, axis=in_axis(name))
            continue
        stored = expected.astype(np.float16) if weights.is_half(name) else expected
        if not np.allclose(found, stored, rtol=tolerance, atol=0):
            unequal.append(name)
    # Calibration changes all norms: their biases take the inputs' mean off, their weights are smoothed for the sample.
    quantized, norms = len(steps), sum(map(_is_norm, shapes))
    calibrated = bool(steps) and sum(map(_is_norm, unequal)) > norms / 2
    if calibrated:
        # A matrix that is multiplied by other factors can't be compared weight by weight.
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


def _roundings(weights: BundleWeights, config: GPT2Config) -> dict[str, InputRounding]:
    """The rounding of inputs, by the names of the weights that they are multiplied by."""
    roundings = {name: weights.rounding(name) for name in weight_shapes(config, tied=False)}
    return {name: rounding for name, rounding in roundings.items() if rounding}


def _rounded_to_nearest(weights: BundleWeights, wanted: Tensor, name: str) -> Array:
    """A wanted weight, rounded to nearest in the bundle's layout where it is quantised."""
    blocks, weight = weights.blocks(name), wanted(name)
    return weight if blocks is None else rounded_to_nearest(weight, blocks, axis=in_axis(name))


def _check_second_graph(bundle: Bundle, reference: Reference, prompts: list[Tokens]) -> dict[str, Any]:
    """Compares the second graph's weights with the first graph's, and its logits with PyTorch's for those weights."""
    first, second = BundleWeights(bundle), BundleWeights(bundle, second_graph=True)
    steps = max(
        float(np.abs((second.tensor(name) - first.tensor(name)) / scale).max()) for name, scale in second.made_scales()
    )
    reference.take(second.tensor, own_head=True)
    expected = reference.logits(prompts)
    with reference.rounding(_roundings(second, bundle.config).get, half=False):
        difference = logits.largest_difference(reference.logits(prompts), expected)
    runner = Runner(bundle)
    runner.open_second_graph()
    allowed = _TIMES_ROUNDING[bundle.manifest.dtype] * difference
    figures = logits.judged(logits.whole(runner, prompts), expected, allowed, _NOISE)
    return figures | {"most_steps": steps, "passed": figures["passed"] and steps <= _HALF_A_STEP}


def _check_tokens(
    model: Model, reference: Reference, suite: str, progress: Progress | None, *, judged: bool
) -> dict[str, Any]:
    """Counts the cases with equal tokens and those that this PyTorch can't judge; shows the first difference."""
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
    equal, first_difference = 0, None
    for number, case in enumerate(chosen, 1):
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
        if progress is not None:
            progress(number, len(chosen))
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
            at = next(index for index, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
            return {"sequence": number, "position": at, "found": ours[at:][:1], "expected": theirs[at:][:1]}
    return {}
