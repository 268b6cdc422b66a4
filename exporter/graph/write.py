"""The graph files of a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from ...models import bundle
from ...models.config import GPT2Config
from . import ragged, second_graph
from .fused import Weights, build
from .input_rounding import PerTensor
from .weights import WeightsFile


def write_graphs(
    folder: Path,
    config: GPT2Config,
    weights: Weights,
    *,
    tied: bool,
    floats: type[np.float32] | type[np.float16] = np.float32,
    per_tensor: Mapping[str, PerTensor] | None = None,
) -> None:
    """Writes the fused graph with its weights, and the graphs that go with it.

    Args:
        weights: gives each weight by its checkpoint name, plain or quantised.
        tied: whether the output head is the token embedding.
        floats: type of weights that aren't quantised.
        per_tensor: the layers that a second graph runs in another way; without any there is none.

    Raises:
        CheckpointError: a number is beyond float16's range.
    """
    (folder / bundle.GRAPH).parent.mkdir(parents=True, exist_ok=True)
    with (folder / bundle.WEIGHTS).open("wb") as file:
        store = WeightsFile(folder / bundle.WEIGHTS, file)
        model = build(config, weights, tied=tied, store=store, floats=floats)
    _write(folder, [bundle.GRAPH], [model])
    _write(folder, [bundle.RAGGED_GRAPH], [ragged.build(model, config)])
    if per_tensor:
        second, weights_graph = second_graph.build(model, per_tensor)
        _write(
            folder, [bundle.SECOND_GRAPH, bundle.SECOND_GRAPH_WEIGHTS], [ragged.build(second, config), weights_graph]
        )


def write_twin(folder: Path, config: GPT2Config, weights: Weights, *, tied: bool) -> None:
    """Writes the graph of the network's quantised twin, with its weights; arguments are those of `write_graphs`."""
    with (folder / bundle.TWIN_WEIGHTS).open("wb") as file:
        store = WeightsFile(folder / bundle.TWIN_WEIGHTS, file)
        model = build(config, weights, tied=tied, store=store)
    _write(folder, [bundle.TWIN_GRAPH], [ragged.build(model, config)])


def _write(folder: Path, names: Sequence[str], models: Sequence[ModelProto]) -> None:
    for name, model in zip(names, models, strict=True):
        (folder / name).write_bytes(model.SerializeToString())
