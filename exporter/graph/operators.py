"""Operators of a graph under construction: linear layers in any precision, norms, activation functions.

Knows ONNX and the stored precisions, nothing of GPT-2's architecture.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from gpt2onnx.errors import CheckpointError

from .blocks import Array, QuantizedMatrix
from .weights import Store, view

# A weight as a graph takes it. Quantised matrices are [out, in]; a layer's others [in, out].
Weight: TypeAlias = Array | QuantizedMatrix

MICROSOFT = "com.microsoft"
OPSET = 20  # the first with Gelu
IR_VERSION = 10  # ONNX Runtime 1.18 and later read it


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix [rows, width] among the initializers, without its numbers."""

    name: str
    rows: int
    width: int
    bits: int
    block_size: int

    @classmethod
    def of(cls, product: NodeProto) -> "StoredMatrix":
        """The matrix of a MatMulNBits node."""
        sizes = {each.name: each.i for each in product.attribute}
        numbers = (sizes[each] for each in ("N", "K", "bits", "block_size"))
        return cls(product.input[1].removesuffix(".data"), *numbers)

    @property
    def data(self) -> str:
        """The initializer of its values."""
        return f"{self.name}.data"

    @property
    def scales(self) -> str:
        """The value that holds its scales in float32."""
        return f"{self.name}.scales"


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

    def reshape(self, x: str, name: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension, one -1 takes the rest."""
        return self.op("Reshape", [x, self.constant(f"{name}.shape", np.array(shape, np.int64))], name)

    def first(self, x: str, name: str, count: int) -> str:
        """The first entries along the last axis."""
        limits = [
            self.constant(f"{name}.{side}", np.array([value], np.int64))
            for side, value in (("start", 0), ("end", count), ("axis", -1))
        ]
        return self.op("Slice", [x, *limits], name)


@dataclass(kw_only=True)
class Graph(Nodes):
    """A network under construction, with its weights.

    Attributes:
        floats: type of activations, biases, norms and whatever isn't quantised.
    """

    store: Store
    floats: type[np.float32] | type[np.float16] = np.float32

    def weight(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """Stores a weight."""
        self.initializers.append(self.store(name, array))
        return name

    def view(self, name: str, weight: str, *shape: int, first_byte: int = 0) -> str:
        """The same bytes of the external data as another initializer.

        Two operators on one initializer keep it in memory beside the copy that one of them packs, and a Reshape of an
        initializer copies it. Two initializers on the same bytes are mapped once.

        Args:
            weight: the initializer whose bytes it shares.
            first_byte: offset in that initializer.
        """
        (stored,) = (each for each in self.initializers if each.name == weight)
        self.initializers.append(view(stored, name, shape, first_byte))
        return name

    def vector(self, name: str, array: Array) -> str:
        """Stores a weight in the graph's type of floats.

        Raises:
            CheckpointError: a number is beyond float16's range.
        """
        with np.errstate(over="ignore"):
            rounded = array.astype(self.floats, copy=False)
        if rounded is not array and not np.isfinite(rounded).all():
            raise CheckpointError(f"{name} has numbers beyond float16's range: export in another precision")
        return self.weight(name, rounded)

    def halved(self, name: str, array: Array, *, small: float = 0.0) -> str:
        """Stores a float32 weight in float16 where that has its digits; ONNX Runtime casts it once, at loading.

        Args:
            small: allowed error, as a share of the mean magnitude.
        """
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.allclose(half, array, rtol=2**-10, atol=small * float(np.abs(array).mean())):
            return self.weight(name, array)
        return self.op("Cast", [self.weight(f"{name}.half", half)], name, to=TensorProto.FLOAT)

    def quantized(self, name: str, matrix: QuantizedMatrix) -> StoredMatrix:
        """Stores a quantised matrix."""
        self.weight(f"{name}.data", matrix.data)
        self.halved(f"{name}.scales", matrix.scales)
        return StoredMatrix(name, len(matrix.data), matrix.width, matrix.bits, matrix.block_size)

    def linear(self, x: str, name: str, weight: Weight, bias: Array) -> str:
        """x @ weight + bias.

        Args:
            weight: float32 [in, out], as GPT-2's Conv1D has it, or quantised.
            bias: float32 [out].
        """
        if isinstance(weight, QuantizedMatrix):
            matrix, stored_bias = self.quantized(name, weight), self.vector(f"{name}.bias", bias)
            return self.matmul_quantized(x, matrix, f"{name}.matmul", stored_bias)
        product = self.op("MatMul", [x, self.vector(f"{name}.weight", weight)], f"{name}.matmul")
        return self.op("Add", [product, self.vector(f"{name}.bias", bias)], name)

    def matmul_quantized(self, x: str, matrix: StoredMatrix, name: str, bias: str = "") -> str:
        """x @ matrix.T + bias."""
        inputs = [x, matrix.data, matrix.scales, "", "", bias] if bias else [x, matrix.data, matrix.scales]
        return self.op(
            "MatMulNBits", inputs, name, domain=MICROSOFT,
            K=matrix.width, N=matrix.rows, bits=matrix.bits, block_size=matrix.block_size, accuracy_level=4,
        )  # fmt: skip

    def normalize(self, x: str, name: str, weight: Array, bias: Array, epsilon: float) -> str:
        """Layer norm."""
        vectors = self.vector(f"{name}.weight", weight), self.vector(f"{name}.bias", bias)
        return self.op("LayerNormalization", [x, *vectors], name, axis=-1, epsilon=epsilon)

    def add(self, x: str, residual: str, following: str) -> str:
        """x + residual, before the norm of that name."""
        # ONNX Runtime would fuse an Add with the norm to SkipLayerNormalization, which takes its CPU three times as long.
        return self.op("Sum", [x, residual], f"{following}.sum")

    def pad_end(self, x: str, name: str, count: int) -> str:
        """Zeros behind the last of four axes."""
        pads = self.constant(f"{name}.pads", np.array([0] * 7 + [count], np.int64))
        return self.op("Pad", [x, pads], name)


def as_model(graph: GraphProto, opset: int = OPSET) -> ModelProto:
    """A model of the graph, in the version of ONNX that all graphs here share."""
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="gpt2onnx")


def activation(graph: Graph, function: str, x: str, name: str) -> str:
    """The MLP's activation; formulas as in transformers' ACT2FN."""

    def number(suffix: str, value: float) -> str:
        return graph.constant(f"{name}.{suffix}", np.array(value, graph.floats))

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
