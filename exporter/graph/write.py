"""The graph files of a bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import ModelProto

from ...models import bundle
from ...models.config import GPT2Config
from . import int8_cache, ragged
from .blocks import Array
from .fused import Weights, build
from .weights import WeightsFile

# The second graph and the one that makes its weights, of the fused graph.
BuildSecond: TypeAlias = Callable[[ModelProto], tuple[ModelProto, ModelProto]]


def write_graphs(
    folder: Path,
    config: GPT2Config,
    weights: Weights,
    *,
    tied: bool,
    floats: type[np.float32] | type[np.float16] = np.float32,
    second: BuildSecond | None = None,
) -> None:
    """Writes the fused graph with its weights, and the graphs that go with it.

    Args:
        weights: gives each weight by its checkpoint name, plain or quantised.
        tied: whether the output head is the token embedding.
        floats: type of weights that aren't quantised.
        second: builds the second graph; None: there is none.

    Raises:
        CheckpointError: a number is beyond float16's range.
    """
    (folder / bundle.GRAPH).parent.mkdir(parents=True, exist_ok=True)
    with (folder / bundle.WEIGHTS).open("wb") as file:
        store = WeightsFile(folder / bundle.WEIGHTS, file).append
        model = build(config, weights, tied=tied, store=store, floats=floats)
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())
    (folder / bundle.RAGGED_GRAPH).write_bytes(ragged.build(model, config).SerializeToString())
    if second is not None:
        graph, weights_graph = second(model)
        (folder / bundle.SECOND_GRAPH).write_bytes(ragged.build(graph, config).SerializeToString())
        (folder / bundle.SECOND_GRAPH_WEIGHTS).write_bytes(weights_graph.SerializeToString())


def write_twin(folder: Path, config: GPT2Config, weights: Weights, *, tied: bool) -> None:
    """Writes the graph of the network's quantised twin, with its weights; arguments are those of `write_graphs`."""
    with (folder / bundle.TWIN_WEIGHTS).open("wb") as file:
        store = WeightsFile(folder / bundle.TWIN_WEIGHTS, file).append
        model = build(config, weights, tied=tied, store=store)
    (folder / bundle.TWIN_GRAPH).write_bytes(ragged.build(model, config).SerializeToString())


def write_int8_cache_graphs(folder: Path, config: GPT2Config, scales: Array) -> None:
    """Writes the runtime's graphs that are there once more, with a KV cache in int8.

    Args:
        scales: of keys and values, float32 [layer, 2, head, size].
    """
    for name, target in bundle.INT8_CACHE_GRAPHS.items():
        if (folder / name).exists():
            model = onnx.load(folder / name, load_external_data=False)
            (folder / target).write_bytes(int8_cache.build(model, config, scales).SerializeToString())
