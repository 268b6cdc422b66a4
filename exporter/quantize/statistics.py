"""Activation statistics: collected while the fp32 network reads texts that it has written itself.

That needs no data: the texts are sampled from the network's own unaltered distribution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, load

from ...models import contract
from ...models.bundle import GRAPH, Bundle
from ...models.config import GPT2Config
from ...runtime.engine import graphs
from ...runtime.engine.runner import Runner
from ...runtime.ort import devices, providers
from ..graph.blocks import Array
from .activations import SAMPLE_ROWS, InputStats
from .gradients import Gradients

# Texts to calibrate on. Half as many don't raise the divergence of int8; in int4 twice as many lower it by a tenth, but take
# too long for large networks, and raise the perplexity of `pure`: docs/export.md.
TEXTS, MORE_TEXTS = {"int8": 16, "int4": 32}, 64
_MANY_WEIGHTS = 50_000_000
TEXT_LENGTH = 256
_HEAD = "lm_head"


@dataclass(frozen=True)
class Statistics:
    """Texts of a network, and its activation statistics on them.

    Attributes:
        tokens: the texts, int64 [texts, length].
        inputs: of linear layers, by name; without those that overflow.
        head_moment: second moment of the output head's input, float32 [in, in]; None where it overflows or is all zero.
        gradients: second moments of the loss' gradients by a layer's outputs, float32 [out, out], by name; empty where
            they weren't asked for.
        threads: of one operator.
    """

    tokens: npt.NDArray[np.int64]
    inputs: dict[str, InputStats]
    head_moment: Array | None
    gradients: dict[str, Array]
    threads: int


def number_of_texts(dtype: str, weights: int, *, pure: bool) -> int:
    """Texts to calibrate a network of that many weights on, for a precision that quantises."""
    return MORE_TEXTS if dtype == "int4" and not pure and weights <= _MANY_WEIGHTS else TEXTS[dtype]


def sample(runner: Runner, rows: int, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Samples texts from a network's own distribution, int64 [rows, length], each from a random first token."""
    random = np.random.default_rng(seed)
    tokens = np.empty((rows, length), np.int64)
    tokens[:, 0] = random.integers(runner.config.vocab_size, size=rows)
    cache = runner.new_cache(rows, length)
    for position in range(1, length):
        logits = runner.forward(cache, slice(0, rows), tokens[:, position - 1 : position])
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = random.standard_exponential(logits.shape, np.float32)
        tokens[:, position] = (logits - np.log(np.maximum(noise, np.finfo(np.float32).tiny))).argmax(-1)
    return tokens


def collect(
    reference: Bundle,
    tokens: npt.NDArray[np.int64],
    *,
    gradients: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> Statistics:
    """Collects the activation statistics of a network on texts.

    Args:
        reference: its fp32 bundle; another graph is written beside the bundle's.
        tokens: the texts, int64 [texts, length].
        gradients: also collect second moments of gradients.
        progress: called with the finished share.

    Raises:
        BackendError: ONNX Runtime can't load or run the graph.
    """
    threads = graphs.threads(reference)
    model = load(reference.folder / GRAPH, load_external_data=False)
    values = _inputs_of_layers(model)
    loss = Gradients(model, (reference.folder / GRAPH).parent, reference.config, threads=threads) if gradients else None
    wanted: list[str] = sorted({*values.values(), *(loss.values if loss else ())})
    graph = _with_outputs(model, wanted, (reference.folder / GRAPH).with_name("inputs.onnx"))
    network = providers.open_graph(graph, devices.CPU, threads=threads, name=graph)
    means: dict[str, list[Array]] = {name: [] for name in values}
    kept: dict[str, list[Array]] = {name: [] for name in values}
    step = -(-tokens.size // SAMPLE_ROWS)
    moment = np.zeros((reference.config.n_embd, reference.config.n_embd), np.float32)
    for row, text in enumerate(tokens):
        outputs = providers.run(network, wanted, _feeds(reference.config, text[None]))
        found = {name: flat for name, (flat,) in zip(wanted, outputs, strict=True)}
        for name, value in values.items():
            flat = found[value]
            if name == _HEAD:
                moment += flat.T @ flat / np.float32(tokens.size)
            means[name].append(flat.mean(0))
            # Each text from another position on, the first one from the very first.
            kept[name].append(flat[row * step // len(tokens) :: step].copy())
        if loss is not None:
            loss.add(text, found)
        progress((row + 1) / len(tokens))
    inputs = {name: InputStats(np.mean(means[name], axis=0), np.concatenate(kept[name])) for name in values}
    finite = {name: each for name, each in inputs.items() if np.isfinite(each.mean).all()}
    usable = bool(np.isfinite(moment).all()) and np.trace(moment) > 0
    return Statistics(tokens, finite, moment if usable else None, loss.moments() if loss else {}, threads)


def _inputs_of_layers(model: ModelProto) -> dict[str, str]:
    """The graph's values that are inputs of linear layers, by the layers' names."""
    suffix = ".matmul"
    values = {node.name.removesuffix(suffix): node.input[0] for node in model.graph.node if node.name.endswith(suffix)}
    (values[_HEAD],) = (node.input[0] for node in model.graph.node if node.name == contract.HIDDEN)
    return values


def _with_outputs(model: ModelProto, values: Sequence[str], target: Path) -> Path:
    """Writes a graph with more outputs, beside the external data that it refers to."""
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values)
    target.write_bytes(model.SerializeToString())
    return target


def _feeds(config: GPT2Config, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of the fused graph for tokens [1, count] without a past."""
    feeds: dict[str, npt.NDArray[np.generic]] = {
        contract.INPUT_IDS: tokens,
        contract.ATTENTION_MASK: np.ones_like(tokens),
        contract.POSITION_IDS: np.arange(tokens.shape[1])[None],
        contract.LOGITS_TO_KEEP: np.array([1]),
    }
    past = np.zeros((1, config.n_head, 0, config.head_size), np.float32)
    for layer in range(config.n_layer):
        feeds |= dict.fromkeys(contract.past_names(layer), past)
    return feeds
