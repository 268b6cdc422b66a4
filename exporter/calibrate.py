"""Lets the fp32 network write texts, and looks at what reaches its matrices.

That needs no data: sampled from the network's own unaltered distribution, a text is what it would say.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, load

from ..models import contract
from ..models.bundle import GRAPH, Bundle
from ..models.config import GPT2Config
from ..runtime import devices, providers
from ..runtime.session import Session
from .inputs import Inputs

# Twice as many tokens lower int4's divergence by another 6 %, at twice the time.
_ROWS, _LENGTH = 16, 256


def sample(session: Session, rows: int, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Texts from a network's own distribution, int64 [rows, length]; each begins with any token of the vocabulary."""
    random = np.random.default_rng(seed)
    tokens = np.empty((rows, length), np.int64)
    tokens[:, 0] = random.integers(session.config.vocab_size, size=rows)
    cache = session.new_cache(rows, length)
    for position in range(1, length):
        logits = session.forward(cache, slice(0, rows), tokens[:, position - 1 : position])[:, -1]
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = random.standard_exponential(logits.shape, np.float32)
        tokens[:, position] = (logits - np.log(np.maximum(noise, np.finfo(np.float32).tiny))).argmax(-1)
    return tokens


def observe(
    reference: Bundle, *, threads: int | None = None, progress: Callable[[float], None] = lambda share: None
) -> dict[str, Inputs]:
    """Lets a network write, and looks at what reaches its matrices.

    Args:
        reference: its fp32 bundle; another graph is written beside that one.
        threads: of one operator.
        progress: called with the share that is done.

    Returns:
        The inputs of each matrix of the blocks by its layer's name. Layers whose inputs overflow are left out.

    Raises:
        BackendError: ONNX Runtime can't load or run the graph.
    """
    session = Session(reference, threads=threads)
    tokens = sample(session, _ROWS, min(_LENGTH, reference.config.n_positions))
    threads = session.threads
    del session
    progress(0.5)
    graph, values = _with_inputs_as_outputs(reference.folder / GRAPH)
    network = providers.open_graph(graph, devices.CPU, threads=threads, name=graph)
    sums: dict[str, npt.NDArray[np.float32]] = {}
    squares: dict[str, npt.NDArray[np.float32]] = {}
    for row in range(len(tokens)):
        try:
            found = network.run(list(values.values()), _feeds(reference.config, tokens[row : row + 1]))
        except Exception as error:
            raise providers.failure("ONNX Runtime failed", error) from error
        for name, x in zip(values, found, strict=True):
            flat = np.asarray(x)[0]
            width = flat.shape[-1]
            sums.setdefault(name, np.zeros(width, np.float32))
            squares.setdefault(name, np.zeros((width, width), np.float32))
            sums[name] += flat.sum(0)
            squares[name] += flat.T @ flat
        progress(0.5 + 0.5 * (row + 1) / len(tokens))
    inputs = {}
    for name in values:
        mean = sums[name] / np.float32(tokens.size)
        covariance = squares.pop(name) / np.float32(tokens.size)
        covariance -= np.outer(mean, mean)
        if np.isfinite(covariance).all():
            inputs[name] = Inputs(mean, covariance)
    return inputs


def _with_inputs_as_outputs(graph: Path) -> tuple[Path, dict[str, str]]:
    """A copy of a graph that also gives the inputs of its matrices, and their names by the layers'."""
    model = load(graph, load_external_data=False)
    suffix = ".matmul"
    values = {node.name.removesuffix(suffix): node.input[0] for node in model.graph.node if node.name.endswith(suffix)}
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in values.values())
    target = graph.with_name("inputs.onnx")
    target.write_bytes(model.SerializeToString())
    return target, values


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
