"""The weights that a fused bundle holds, read back from its graph: what the runtime really computes with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, TensorProto, numpy_helper

from gpt2onnx.errors import BundleError

from ...models.bundle import GRAPH, WIDE_GRAPH, Bundle
from ...models.precision import Blocks
from ...models.shapes import weight_shapes
from ...runtime.engine import loading
from ...runtime.engine.second_graph import make_weights
from ..quantize.blocks import QuantizedMatrix, dequantize
from ..quantize.rounding import InBlocks, OneScale, Rounding
from .weights import loaded

Matrix = npt.NDArray[np.float32]

_SCALES, _COLUMNS, _STEPS = ".scales", ".columns", ".steps"


class StoredWeights:
    """A fused bundle's weights by their checkpoint names, in the checkpoint's shapes.

    Args:
        bundle: which has them.
        wide: take the second graph's, where it has some of its own.

    Raises:
        BundleError: a graph can't be read.
        BackendError: ONNX Runtime can't make the second graph's weights.
    """

    def __init__(self, bundle: Bundle, *, wide: bool = False) -> None:
        self._folder, self._shapes = bundle.folder, weight_shapes(bundle.config, tied=False)
        self._tied = bundle.config.tie_word_embeddings
        graph = _read_graph(bundle.folder / GRAPH)
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._blocks: dict[str, Blocks] = {}
        self._one_scale: dict[str, OneScale] = {}
        self._made: dict[str, npt.NDArray[Any]] = {}
        for node in graph.node:
            numbers = {attribute.name: attribute.i for attribute in node.attribute}
            for name in (each.removesuffix(_SCALES) for each in node.input if each.endswith(_SCALES)):
                self._blocks[name] = Blocks(numbers["bits"], numbers["block_size"])
        if wide:
            graph = _read_graph(bundle.folder / WIDE_GRAPH)
            constants = {each.name: each for each in graph.initializer}
            for name in (each.removesuffix(_COLUMNS) for each in constants if each.endswith(_COLUMNS)):
                least = constants.get(f"{name}.least")
                self._one_scale[name] = OneScale(None if least is None else float(numpy_helper.to_array(least)))
            self._made = make_weights(bundle, loading.threads(bundle))

    def made(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """The weights that the second graph has of its own: names, and the outputs' scales with an axis for the inputs."""
        for base in self._one_scale:
            name = f"{base}.weight"
            yield name, np.expand_dims(self._made[f"{base}{_STEPS}"], in_axis(name))

    def blocks(self, name: str) -> Blocks | None:
        """How a weight is quantised; None where it isn't."""
        return self._blocks.get(self._in_file(name).removesuffix(".weight"))

    def rounding(self, name: str) -> Rounding | None:
        """How what a weight is multiplied with is rounded to 8 bits; None where it isn't."""
        blocks = self.blocks(name)
        return None if blocks is None else self._one_scale.get(name.removesuffix(".weight"), InBlocks(blocks.size))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A weight in float32; matrices are [in, out], the token embedding and the head [vocabulary, width].

        Raises:
            BundleError: the bundle holds no such weight.
        """
        base, along = name.removesuffix(".weight"), in_axis(name)
        if base in self._one_scale:
            made: Matrix = self._made[f"{base}{_COLUMNS}"].astype(np.float32) * self._made[f"{base}{_STEPS}"]
            return made if along == 0 else made.T
        name = self._in_file(name)
        blocks, base = self.blocks(name), name.removesuffix(".weight")
        if blocks is None:
            return self._read(name).astype(np.float32, copy=False)
        data, scales = self._read(f"{base}.data"), self._read(f"{base}{_SCALES}").astype(np.float32)
        scales = scales.reshape(data.shape[:2])
        quantized = QuantizedMatrix(data.view(np.uint8), scales, blocks.bits, blocks.size, self._shapes[name][along])
        matrix = dequantize(quantized)
        return matrix if along == 1 else matrix.T

    def is_half(self, name: str) -> bool:
        """Whether a weight that isn't quantised is stored in float16."""
        return self._stored(name).data_type == TensorProto.FLOAT16

    def _in_file(self, name: str) -> str:
        """Under which name the first graph has a weight: a tied head is the token embedding."""
        return "wte.weight" if self._tied and name == "lm_head.weight" else name

    def _stored(self, name: str) -> TensorProto:
        # The graph casts what is stored in float16 to the name that its operators know.
        tensor = self._tensors.get(name) or self._tensors.get(f"{name}.half")
        if tensor is None:
            raise BundleError(f"{self._folder / GRAPH} holds no weight {name}")
        return tensor

    def _read(self, name: str) -> npt.NDArray[np.generic]:
        return numpy_helper.to_array(loaded(self._stored(name), (self._folder / GRAPH).parent))


def _read_graph(path: Path) -> GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # what protobuf raises is no public name
        raise BundleError(f"{path} can't be read: {error}") from error


def in_axis(name: str) -> int:
    """Which axis of a matrix has the layer's inputs, along which it is quantised."""
    return 1 if name in ("wte.weight", "lm_head.weight") else 0


def deviation(found: Matrix, wanted: Matrix, blocks: Blocks, *, along: int) -> float:
    """How far a quantised matrix is from the original: root mean square in its worst block, in steps.

    A step is the distance of neighbouring values where the block's largest weight takes the end of the range.

    Args:
        found: dequantised, two axes.
        wanted: the original.
        blocks: how it is quantised.
        along: the axis that is cut into blocks.
    """
    worst = 0.0
    for block in _blocks(wanted, blocks, along):
        error = np.sqrt(np.mean(np.square(found[block] - wanted[block]), axis=along))
        step = np.abs(wanted[block]).max(axis=along) / (1 << (blocks.bits - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = max(worst, float(np.where(error == 0, 0, error / step).max()))
    return worst


def rounded_to_nearest(matrix: Matrix, blocks: Blocks, *, along: int) -> Matrix:
    """A matrix quantised in the plainest way, every weight to the nearest value, and dequantised again."""
    result = np.empty_like(matrix)
    for block in _blocks(matrix, blocks, along):
        largest = np.abs(matrix[block]).max(axis=along, keepdims=True)
        step = np.where(largest == 0, 1, largest / ((1 << (blocks.bits - 1)) - 1))
        result[block] = np.rint(matrix[block] / step) * step
    return result


def _blocks(matrix: Matrix, blocks: Blocks, along: int) -> Iterator[tuple[slice, ...]]:
    """Where the blocks are that lie at the same place along the axis."""
    for start in range(0, matrix.shape[along], blocks.size):
        stretch = slice(start, start + blocks.size)
        yield (stretch, slice(None)) if along == 0 else (slice(None), stretch)
