"""Lets the fp32 network write texts, and looks at what reaches its matrices.

That needs no data: sampled from the network's own unaltered distribution, a text is what it would say.
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
from ...runtime.engine.runner import Runner
from ...runtime.ort import devices, providers
from .gradients import Gradients
from .inputs import SAMPLE, HeadInputs, Inputs
from .sequential import Twins

_LENGTH = 256  # of a text
_HEAD = "lm_head"


def sample(runner: Runner, rows: int, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Texts from a network's own distribution, int64 [rows, length]; each begins with any token of the vocabulary."""
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


@dataclass(frozen=True)
class Calibration:
    """What a network wrote, and what reached its matrices then.

    Attributes:
        tokens: the texts, int64 [texts, length].
        inputs: of each matrix of the blocks, by its layer's name; without those that overflow.
        head: what reached the output head; None where it overflows or is all zero.
        gradients: second moments of the loss' gradients by outputs, float32 [out, out], by matrices' layers; of
            those where they were asked for and matter.
        threads: of one operator.
    """

    tokens: npt.NDArray[np.int64]
    inputs: dict[str, Inputs]
    head: HeadInputs | None
    gradients: dict[str, npt.NDArray[np.float32]]
    threads: int

    def twins(self) -> Twins:
        """The network and its quantised twin, before the first operator."""
        return Twins(self.tokens, self.head, self.gradients, threads=self.threads)


def observe(
    reference: Bundle,
    *,
    threads: int | None = None,
    texts: int = 32,
    gradients: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Lets a network write, and looks at what reaches its matrices.

    Args:
        reference: its fp32 bundle; another graph is written beside that one.
        threads: of one operator.
        texts: how many.
        gradients: also go back through the network from the loss.
        progress: called with the share that is done.

    Raises:
        BackendError: ONNX Runtime can't load or run the graph.
    """
    runner = Runner(reference, threads=threads)
    tokens = sample(runner, texts, min(_LENGTH, reference.config.n_positions))
    threads = runner.threads
    del runner
    progress(0.5)
    model = load(reference.folder / GRAPH, load_external_data=False)
    values = _inputs_of_matrices(model)
    loss = Gradients(model, (reference.folder / GRAPH).parent, reference.config, threads=threads) if gradients else None
    wanted: list[str] = sorted({*values.values(), *(loss.values if loss else ())})
    graph = _with_outputs(model, wanted, (reference.folder / GRAPH).with_name("inputs.onnx"))
    network = providers.open_graph(graph, devices.CPU, threads=threads, name=graph)
    means: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in values}
    kept: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in values}
    step = -(-tokens.size // SAMPLE)
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
        progress(0.5 + 0.5 * (row + 1) / len(tokens))
    inputs = {name: Inputs(np.mean(means[name], axis=0), np.concatenate(kept[name])) for name in values}
    finite = {name: each for name, each in inputs.items() if np.isfinite(each.mean).all()}
    finite.pop(_HEAD, None)
    usable = bool(np.isfinite(moment).all()) and np.trace(moment) > 0
    head = HeadInputs(moment, inputs[_HEAD].sample) if usable else None
    return Calibration(tokens, finite, head, loss.moments() if loss else {}, threads)


def _inputs_of_matrices(model: ModelProto) -> dict[str, str]:
    """The values of a graph that its matrices multiply, by the matrices' layers."""
    suffix = ".matmul"
    values = {node.name.removesuffix(suffix): node.input[0] for node in model.graph.node if node.name.endswith(suffix)}
    (values[_HEAD],) = (node.input[0] for node in model.graph.node if node.name == "kept")
    return values


def _with_outputs(model: ModelProto, values: Sequence[str], target: Path) -> Path:
    """Writes a graph that gives more of its values, beside the external data that it refers to."""
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values)
    target.write_bytes(model.SerializeToString())
    return target


def _feeds(config: GPT2Config, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.generic]]:
    """Inputs of a graph for [1, count] tokens without a past."""
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
