"""The weights of a fused bundle, read back from its graphs, and their distance from others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, TensorProto, numpy_helper

from gpt2onnx.errors import BundleError

from ...models.bundle import GRAPH, SECOND_GRAPH, Bundle
from ...models.precision import Blocks
from ...models.shapes import weight_shapes
from ...runtime.engine import graphs
from ...runtime.engine.second_graph import make_weights
from ..graph.blocks import Array, QuantizedMatrix, dequantize, in_axis
from ..graph.input_rounding import Blockwise, InputRounding, PerTensor
from ..graph.weights import mapped

_SCALES, _COLUMNS, _STEPS, _TRANSPOSED = ".scales", ".columns", ".steps", ".transposed"


class BundleWeights:
    """A fused bundle's weights by their checkpoint names, in the checkpoint's shapes.

    Args:
        second_graph: take the second graph's weights, where it has some of its own.

    Raises:
        BundleError: a graph can't be read.
        BackendError: ONNX Runtime can't make the second graph's weights.
    """

    def __init__(self, bundle: Bundle, *, second_graph: bool = False) -> None:
        self._folder, self._shapes = bundle.folder, weight_shapes(bundle.config, tied=False)
        self._tied = bundle.config.tie_word_embeddings
        graph = _read_graph(bundle.folder / GRAPH)
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._blocks: dict[str, Blocks] = {}
        self._per_tensor: dict[str, PerTensor] = {}
        self._made: dict[str, npt.NDArray[Any]] = {}
        for node in graph.node:
            numbers = {attribute.name: attribute.i for attribute in node.attribute}
            for name in (each.removesuffix(_SCALES) for each in node.input if each.endswith(_SCALES)):
                self._blocks[name] = Blocks(numbers["bits"], numbers["block_size"])
        if second_graph:
            graph = _read_graph(bundle.folder / SECOND_GRAPH)
            constants = {each.name: each for each in graph.initializer}
            for name in (each.removesuffix(_COLUMNS) for each in constants if each.endswith(_COLUMNS)):
                least = constants.get(f"{name}.least")
                self._per_tensor[name] = PerTensor(None if least is None else float(numpy_helper.to_array(least)))
            self._made = make_weights(bundle, graphs.threads(bundle))

    def made_scales(self) -> Iterator[tuple[str, Array]]:
        """Weights that the second graph makes: name and rounding step, [out, 1] or [1, out]; 1e-30 for fp32, which isn't rounded."""
        for made in self._made:
            if made.endswith(_TRANSPOSED):
                yield made.removesuffix(_TRANSPOSED), np.array(1e-30, np.float32)
        for base in self._per_tensor:
            name = f"{base}.weight"
            yield name, np.expand_dims(self._made[f"{base}{_STEPS}"], in_axis(name))

    def blocks(self, name: str) -> Blocks | None:
        """The layout of a quantised weight; None if it isn't quantised."""
        return self._blocks.get(self._in_file(name).removesuffix(".weight"))

    def rounding(self, name: str) -> InputRounding | None:
        """The rounding of the input that a weight is multiplied by; None if it isn't rounded to 8 bits."""
        blocks = self.blocks(name)
        return None if blocks is None else self._per_tensor.get(name.removesuffix(".weight"), Blockwise(blocks.size))

    def tensor(self, name: str) -> Array:
        """A weight in float32; matrices are [in, out], the token embedding and the head [vocabulary, width].

        Raises:
            BundleError: the bundle holds no such weight.
        """
        base, axis = name.removesuffix(".weight"), in_axis(name)
        if (transposed := self._made.get(f"{name}{_TRANSPOSED}")) is not None:
            return transposed.T
        if base in self._per_tensor:
            made: Array = self._made[f"{base}{_COLUMNS}"].astype(np.float32) * self._made[f"{base}{_STEPS}"]
            return made if axis == 0 else made.T
        name = self._in_file(name)
        blocks, base = self.blocks(name), name.removesuffix(".weight")
        if blocks is None:
            return self._read(name).astype(np.float32, copy=False)
        data, scales = self._read(f"{base}.data"), self._read(f"{base}{_SCALES}").astype(np.float32)
        scales = scales.reshape(data.shape[:2])
        matrix = dequantize(QuantizedMatrix(data, scales, blocks.bits, blocks.size, self._shapes[name][axis]))
        return matrix if axis == 1 else matrix.T

    def is_half(self, name: str) -> bool:
        """Whether a weight that isn't quantised is stored in float16."""
        return self._stored(name).data_type == TensorProto.FLOAT16

    def _in_file(self, name: str) -> str:
        """The first graph's name of a weight: a tied head is the token embedding."""
        return "wte.weight" if self._tied and name == "lm_head.weight" else name

    def _stored(self, name: str) -> TensorProto:
        # A weight in float16 is cast to the name that operators know.
        tensor = self._tensors.get(name) or self._tensors.get(f"{name}.half")
        if tensor is None:
            raise BundleError(f"{self._folder / GRAPH} holds no weight {name}: export the bundle again")
        return tensor

    def _read(self, name: str) -> npt.NDArray[Any]:
        return mapped(self._stored(name), (self._folder / GRAPH).parent)


def _read_graph(path: Path) -> GraphProto:
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors have no public name
        raise BundleError(f"{path} can't be read: {error}") from error


def worst_error(found: Array, wanted: Array, blocks: Blocks, *, axis: int) -> float:
    """Root mean square error of the worst block of a quantised matrix, in steps.

    A step is the distance of neighbouring values where the block's largest weight takes the end of the range.

    Args:
        found: dequantised, two axes.
        axis: the axis that is cut into blocks.
    """
    worst = 0.0
    for block in _blocks(wanted, blocks, axis):
        error = np.sqrt(np.mean(np.square(found[block] - wanted[block]), axis=axis))
        step = np.abs(wanted[block]).max(axis=axis) / (1 << (blocks.bits - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = max(worst, float(np.where(error == 0, 0, error / step).max()))
    return worst


def rounded_to_nearest(matrix: Array, blocks: Blocks, *, axis: int) -> Array:
    """A matrix quantised symmetrically, every weight to the nearest value, and dequantised again."""
    result = np.empty_like(matrix)
    for block in _blocks(matrix, blocks, axis):
        largest = np.abs(matrix[block]).max(axis=axis, keepdims=True)
        step = np.where(largest == 0, 1, largest / ((1 << (blocks.bits - 1)) - 1))
        result[block] = np.rint(matrix[block] / step) * step
    return result


def _blocks(matrix: Array, blocks: Blocks, axis: int) -> Iterator[tuple[slice, ...]]:
    """The places of the blocks along the axis, each for the whole other axis."""
    for start in range(0, matrix.shape[axis], blocks.size):
        stretch = slice(start, start + blocks.size)
        yield (stretch, slice(None)) if axis == 0 else (slice(None), stretch)
