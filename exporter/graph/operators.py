"""Operators as they are appended to a graph under construction: linear layers in any precision, activations.

Knows ONNX and the precisions, nothing of GPT-2's architecture.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from gpt2onnx.errors import CheckpointError

from ...models.precision import Blocks
from ..quantize.blocks import QuantizedMatrix, dequantize, quantize
from ..quantize.rounding import OneScale, choose
from .weights import WeightsFile, view

if TYPE_CHECKING:
    from ..quantize.sequential import Twins

MICROSOFT = "com.microsoft"
OPSET = 20  # the first with Gelu
IR_VERSION = 10  # what ONNX Runtime 1.18 and later read


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Attributes:
        floats: type of activations, biases, norms and whatever isn't quantised.
        blocks: how a layer's matrix is quantised, by the layer's name; None keeps it in `floats`.
        wide: whether layers are looked for that a second graph can run in another way; see `wide`.
        smooth: whether inputs are smoothed for that.
    """

    floats: type[np.float32] | type[np.float16] = np.float32
    blocks: Callable[[str], Blocks | None] = lambda name: None
    wide: bool = False
    smooth: bool = False

    @property
    def onnx_type(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self.floats)))


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix [rows, width] in the external data, by its name and those of its parts."""

    name: str
    data: str
    scales: str
    rows: int
    width: int
    bits: int
    block_size: int


@dataclass(frozen=True)
class Layer:
    """A linear layer whose input can be rounded with one scale.

    Attributes:
        matrix: its stored one.
        bias: name of its bias; empty where it has none.
        rounding: how that suits its input.
    """

    matrix: StoredMatrix
    bias: str
    rounding: OneScale


@dataclass
class Nodes:
    """Nodes and small constants under construction; each method appends and returns a value's name."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """Appends a node; its first output is called as the node is, unless `outputs` says otherwise."""
        outputs = outputs or (name,)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """A small value kept inside the graph file."""
        self.initializers.append(numpy_helper.from_array(array, name))
        return name


@dataclass(kw_only=True)
class Graph(Nodes):
    """The network under construction, with its weights.

    Attributes:
        precision: how weights are stored.
        weights: takes them as external data.
        twins: two networks that follow the graph on texts, so that matrices are quantised for them; or none.
        wide: the layers that may be rounded in another way where many rows pass at once, by their nodes' names.
    """

    precision: Precision
    weights: WeightsFile
    twins: "Twins | None" = None
    wide: dict[str, Layer] = field(default_factory=dict)

    def weight(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """A weight kept in the external data."""
        self.initializers.append(self.weights.append(name, array))
        return name

    def view(self, name: str, weight: str, *shape: int, first: int = 0) -> str:
        """The same bytes of the external data as another weight, under a name and a shape of its own.

        A weight that two operators use stays in memory for the one as it is, although the other packs a copy of it;
        and a Reshape of a weight is a copy of it. What two names read from the file is mapped once.

        Args:
            name: the view's.
            weight: whose bytes it reads.
            shape: its own, of no more bytes.
            first: byte of the weight that it begins with.
        """
        (stored,) = (each for each in self.initializers if each.name == weight)
        self.initializers.append(view(stored, name, shape, first))
        return name

    def vector(self, name: str, array: npt.NDArray[np.float32]) -> str:
        """A weight kept in the external data as it is, or rounded to float16.

        Raises:
            CheckpointError: a number is beyond float16's range.
        """
        with np.errstate(over="ignore"):
            rounded = array.astype(self.precision.floats, copy=False)
        if rounded is not array and not np.isfinite(rounded).all():
            raise CheckpointError(f"{name} has numbers beyond float16's range: export in another precision")
        return self.weight(name, rounded)

    def halved(self, name: str, array: npt.NDArray[np.float32], *, small: float = 0.0) -> str:
        """A float32 weight kept as float16 where that has its digits; ONNX Runtime turns it back once, at loading.

        Args:
            name: the weight's.
            array: float32.
            small: errors up to this share of the mean don't matter.
        """
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.allclose(half, array, rtol=2**-10, atol=small * float(np.abs(array).mean())):
            return self.weight(name, array)
        return self.op("Cast", [self.weight(f"{name}.half", half)], name, to=TensorProto.FLOAT)

    def linear(
        self, x: str, name: str, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], *, beside: str
    ) -> str:
        """x @ weight + bias, with weight [in, out] as GPT-2's Conv1D stores it.

        Args:
            x: its input.
            name: the layer's.
            weight: float32 [in, out].
            bias: float32 [out].
            beside: another value that operators behind this one need.
        """
        blocks = self.precision.blocks(name)
        if blocks is None:
            product = self.op("MatMul", [x, self.vector(f"{name}.weight", weight)], f"{name}.matmul")
            return self.op("Add", [product, self.vector(f"{name}.bias", bias)], name)
        covariance, fitted = None, weight
        # With 8 bits errors are too small to matter together.
        gradients = self.twins.gradients.get(name) if self.twins and blocks.bits < 8 else None
        seen = None if self.twins is None else self.twins.reach(self.part, x, beside, weight, bias)
        if seen is not None:
            fitted, covariance = seen.fitted(weight), seen.covariance
        matrix = quantize(fitted.T, blocks.bits, blocks.size, covariance, gradients)
        rounded = dequantize(matrix).T if self.twins else weight
        if seen is not None:
            bias = seen.bias(rounded)
        stored, stored_bias = self.stored(name, matrix), self.vector(f"{name}.bias", bias)
        product = self.matmul_quantized(x, stored, f"{name}.matmul", stored_bias)
        if seen is not None:
            self.offer(product, stored, stored_bias, seen.sample, weight)
        if self.twins is not None:
            self.twins.multiply(x, product, rounded, bias)
        return product

    def offer(
        self,
        node: str,
        matrix: StoredMatrix,
        bias: str,
        sample: npt.NDArray[np.float32],
        weight: npt.NDArray[np.float32],
    ) -> None:
        """Notes that a second graph may round a layer's input with one scale, if one is wanted and this input bears it.

        Args:
            node: the layer's.
            matrix: as which its weight is stored.
            bias: name of its bias; empty where it has none.
            sample: inputs, float32 [rows, in].
            weight: float32 [in, out].
        """
        if not self.precision.wide or matrix.width % matrix.block_size:
            return
        rounding = choose(sample, weight, matrix.block_size)
        if isinstance(rounding, OneScale):
            self.wide[node] = Layer(matrix, bias, rounding)

    def part(self, wanted: Sequence[str], held: Collection[str]) -> bytes:
        """A model of the nodes that make values, float32 [batch, length, width], out of others like that, for a prompt."""
        nodes: list[NodeProto] = []
        needed = set(wanted)
        for node in reversed(self.nodes):
            if needed & set(node.output):
                nodes.append(NodeProto())
                nodes[-1].CopyFrom(node)
                if node.op_type == "GroupQueryAttention":
                    nodes[-1].input[3:5] = ["", ""]  # there is no past
                needed |= set(nodes[-1].input) - {*held, ""}
        initializers = [each for each in self.initializers if each.name in needed]
        made = {name for node in nodes for name in node.output} | {each.name for each in initializers} | {""}
        proto = helper.make_graph(
            nodes[::-1],
            "part",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT if name in held else TensorProto.INT64, None)
                for name in sorted({name for node in nodes for name in node.input} - made)
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted],
            [self.weights.read(each) for each in initializers],
        )
        return bytes(as_model(proto).SerializeToString())

    def quantized(self, name: str, matrix: npt.NDArray[np.float32], blocks: Blocks) -> StoredMatrix:
        """Quantises [out, in] and stores it."""
        return self.stored(name, quantize(matrix, blocks.bits, blocks.size))

    def stored(self, name: str, matrix: QuantizedMatrix) -> StoredMatrix:
        """Stores a quantised matrix."""
        data, scales = self.weight(f"{name}.data", matrix.data), self.halved(f"{name}.scales", matrix.scales)
        return StoredMatrix(name, data, scales, len(matrix.data), matrix.width, matrix.bits, matrix.block_size)

    def reshape(self, x: str, name: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension, one -1 takes what is left."""
        return self.op("Reshape", [x, self.constant(f"{name}.shape", np.array(shape, np.int64))], name)

    def pad_end(self, x: str, name: str, count: int) -> str:
        """So many zeros more along the last axis of four."""
        pads = self.constant(f"{name}.pads", np.array([0] * 7 + [count], np.int64))
        return self.op("Pad", [x, pads], name)

    def first(self, x: str, name: str, count: int) -> str:
        """The first entries along the last axis."""
        limits = [
            self.constant(f"{name}.{side}", np.array([value], np.int64))
            for side, value in (("start", 0), ("end", count), ("axis", -1))
        ]
        return self.op("Slice", [x, *limits], name)

    def matmul_quantized(self, x: str, matrix: StoredMatrix, name: str, bias: str = "") -> str:
        """x @ matrix.T + bias."""
        inputs = [x, matrix.data, matrix.scales, "", "", bias] if bias else [x, matrix.data, matrix.scales]
        return self.op(
            "MatMulNBits", inputs, name, domain=MICROSOFT,
            K=matrix.width, N=matrix.rows, bits=matrix.bits, block_size=matrix.block_size, accuracy_level=4,
        )  # fmt: skip

    def add_and_normalize(
        self, x: str, residual: str, name: str, weight: str, bias: str, epsilon: float
    ) -> tuple[str, str]:
        """Layer norm of x + residual, and that sum."""
        # Of an Add ONNX Runtime would make SkipLayerNormalization, which takes its CPU three times as long.
        total = self.op("Sum", [x, residual], f"{name}.sum")
        return self.op("LayerNormalization", [total, weight, bias], name, axis=-1, epsilon=epsilon), total


def as_model(graph: GraphProto, opset: int = OPSET) -> ModelProto:
    """A model of the graph, in the version of ONNX that all graphs here are in."""
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="gpt2onnx")


def activation(graph: Graph, function: str, x: str, name: str) -> str:
    """The MLP's activation; formulas as in transformers' ACT2FN."""

    def number(suffix: str, value: float) -> str:
        return graph.constant(f"{name}.{suffix}", np.array(value, graph.precision.floats))

    match function:
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate":
            return graph.op("FastGelu", [x], name, domain=MICROSOFT)
        case "gelu" | "gelu_python":
            return graph.op("Gelu", [x], name, approximate="none")
        case "gelu_10":
            whole = graph.op("Gelu", [x], f"{name}.gelu", approximate="none")
            return graph.op("Clip", [whole, number("low", -10), number("high", 10)], name)
        case "quick_gelu":
            return graph.op("QuickGelu", [x], name, domain=MICROSOFT, alpha=1.702)
        case "silu" | "swish":
            return graph.op("Mul", [x, graph.op("Sigmoid", [x], f"{name}.gate")], name)
        case "mish":
            gate = graph.op("Tanh", [graph.op("Softplus", [x], f"{name}.softplus")], f"{name}.gate")
            return graph.op("Mul", [x, gate], name)
        case "relu":
            return graph.op("Relu", [x], name)
        case "relu2":
            positive = graph.op("Relu", [x], f"{name}.relu")
            return graph.op("Mul", [positive, positive], name)
        case "relu6":
            return graph.op("Clip", [x, number("low", 0), number("high", 6)], name)
        case "leaky_relu":
            return graph.op("LeakyRelu", [x], name, alpha=0.01)
        case "hardswish":
            return graph.op("HardSwish", [x], name)
        case "tanh":
            return graph.op("Tanh", [x], name)
        case "sigmoid":
            return graph.op("Sigmoid", [x], name)
        case "sqrtsoftplus":
            return graph.op("Sqrt", [graph.op("Softplus", [x], f"{name}.softplus")], name)
        case "laplace":  # half of 1 + erf((x - mean) / (deviation * sqrt 2))
            centred = graph.op("Sub", [x, number("mean", 0.707107)], f"{name}.centred")
            scaled = graph.op("Div", [centred, number("spread", 0.282095 * math.sqrt(2))], f"{name}.scaled")
            raised = graph.op("Add", [graph.op("Erf", [scaled], f"{name}.erf"), number("one", 1)], f"{name}.raised")
            return graph.op("Mul", [raised, number("half", 0.5)], name)
        case "linear":
            return x
    raise AssertionError(f"{function} passed GPT2Config but has no operator here")
