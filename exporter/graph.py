"""The fused graph: GPT-2 written straight in ONNX, with ONNX Runtime's own fused operators.

Knows the network and the tensor contract, nothing of files or of decoding. Weights are asked for by
name, one at a time, and handed on to the writer of external data at once, so memory stays small.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ..models import contract
from ..models.config import GPT2Config
from .quantize import quantize
from .weights import WeightsFile

MICROSOFT = "com.microsoft"
OPSET = 20  # the first with Gelu
IR_VERSION = 10  # what ONNX Runtime 1.18 and later read

Tensor = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Attributes:
        name: as the user asks for it.
        floats: type of activations, biases, norms and whatever isn't quantised.
        matrix_bits: bits of the blocks' matrices; None keeps them in `floats`.
        embedding_bits: bits of token embedding and output head; None keeps them in `floats`.
        block_size: weights that share a scale.
    """

    name: str
    floats: type[np.float32] | type[np.float16] = np.float32
    matrix_bits: int | None = None
    embedding_bits: int | None = None
    block_size: int | None = None

    @property
    def onnx_type(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self.floats)))


@dataclass(frozen=True)
class _StoredMatrix:
    """A quantised matrix [rows, width] in the external data, by the names of its parts."""

    data: str
    scales: str
    rows: int
    width: int
    bits: int
    block_size: int


@dataclass
class _Graph:
    """Nodes and initializers under construction; each method appends and returns value names."""

    precision: Precision
    weights: WeightsFile
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

    def weight(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """A weight kept in the external data."""
        self.initializers.append(self.weights.append(name, array))
        return name

    def vector(self, name: str, array: npt.NDArray[np.float32]) -> str:
        return self.weight(name, array.astype(self.precision.floats))

    def linear(self, x: str, name: str, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> str:
        """x @ weight + bias, with weight [in, out] as GPT-2's Conv1D stores it."""
        if self.precision.matrix_bits is None:
            product = self.op("MatMul", [x, self.vector(f"{name}.weight", weight)], f"{name}.matmul")
            return self.op("Add", [product, self.vector(f"{name}.bias", bias)], name)
        matrix = self.quantized(name, weight.T, self.precision.matrix_bits)
        return self.matmul_quantized(x, matrix, f"{name}.matmul", self.vector(f"{name}.bias", bias))

    def quantized(self, name: str, matrix: npt.NDArray[np.float32], bits: int) -> _StoredMatrix:
        """Quantises [out, in] and stores it."""
        assert self.precision.block_size is not None
        result = quantize(matrix, bits, self.precision.block_size)
        data = self.weight(f"{name}.data", result.data)
        scales = self.weight(f"{name}.scales", result.scales.astype(self.precision.floats))
        rows, width = matrix.shape
        return _StoredMatrix(data, scales, rows, width, bits, result.block_size)

    def matmul_quantized(self, x: str, matrix: _StoredMatrix, name: str, bias: str = "") -> str:
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
        total = f"{name}.sum"
        normalized = self.op(
            "SkipLayerNormalization", [x, residual, weight, bias], name, domain=MICROSOFT,
            outputs=[name, "", "", total], epsilon=epsilon,
        )  # fmt: skip
        return normalized, total


def build(config: GPT2Config, tensor: Tensor, *, tied: bool, precision: Precision, weights: WeightsFile) -> ModelProto:
    """Writes the network as an ONNX model that fulfils `models.contract`.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name, float32.
        tied: whether the output head is the token embedding, which is then stored once.
        precision: how weights are stored.
        weights: takes the weights as external data, in the order in which the network uses them.

    Returns:
        The model, its weights referring to the file of `weights`.
    """
    graph = _Graph(precision, weights)
    epsilon = config.layer_norm_epsilon

    # The mask only says how many positions are in use: GroupQueryAttention takes that as int32 numbers.
    axis_1 = graph.constant("axis_1", np.array([1], np.int64))
    used = graph.op("ReduceSum", [contract.ATTENTION_MASK, axis_1], "mask_sum", keepdims=0)
    last = graph.op("Sub", [used, graph.constant("one", np.array(1, np.int64))], "last_position")
    seqlens_k = graph.op("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    mask_width = graph.op("Shape", [contract.ATTENTION_MASK], "mask_width", start=1, end=2)
    mask_width = graph.op("Squeeze", [mask_width], "mask_width_scalar")
    total_length = graph.op("Cast", [mask_width], "total_sequence_length", to=TensorProto.INT32)

    embedded, head = _embedding(graph, config, tensor, tied=tied)
    positions = graph.op(
        "Gather", [graph.vector("wpe.weight", tensor("wpe.weight")), contract.POSITION_IDS], "wpe", axis=0
    )
    residual = graph.op("Add", [embedded, positions], "embedding")

    def norm_weights(name: str) -> tuple[str, str]:
        return (
            graph.vector(f"{name}.weight", tensor(f"{name}.weight")),
            graph.vector(f"{name}.bias", tensor(f"{name}.bias")),
        )

    def linear(x: str, name: str) -> str:
        return graph.linear(x, name, tensor(f"{name}.weight"), tensor(f"{name}.bias"))

    x = graph.op("LayerNormalization", [residual, *norm_weights("h.0.ln_1")], "h.0.ln_1", axis=-1, epsilon=epsilon)
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        qkv = linear(x, f"{block}.attn.c_attn")
        attended = graph.op(
            "GroupQueryAttention", [qkv, "", "", *contract.past_names(layer), seqlens_k, total_length],
            f"{block}.attn", domain=MICROSOFT, outputs=[f"{block}.attn", *contract.present_names(layer)],
            num_heads=config.n_head, kv_num_heads=config.n_head, do_rotary=0, scale=_attention_scale(config, layer),
        )  # fmt: skip
        projected = linear(attended, f"{block}.attn.c_proj")
        x, residual = graph.add_and_normalize(
            projected, residual, f"{block}.ln_2", *norm_weights(f"{block}.ln_2"), epsilon
        )
        hidden = linear(x, f"{block}.mlp.c_fc")
        hidden = _activation(graph, config.activation_function, hidden, f"{block}.mlp.act")
        projected = linear(hidden, f"{block}.mlp.c_proj")
        following = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
        x, residual = graph.add_and_normalize(projected, residual, following, *norm_weights(following), epsilon)

    # Keeping the logits of only the last positions is an input with a default, which other runtimes don't see.
    everything = graph.constant(contract.LOGITS_TO_KEEP, np.array([2**31 - 1], np.int64))
    start = graph.op("Neg", [everything], "first_kept")
    kept = graph.op("Slice", [x, start, graph.constant("end", np.array([2**31 - 1], np.int64)), axis_1], "kept")
    _head(graph, config, kept, head)
    return _model(graph, config)


def _attention_scale(config: GPT2Config, layer: int) -> float:
    scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _embedding(graph: _Graph, config: GPT2Config, tensor: Tensor, *, tied: bool) -> tuple[str, _StoredMatrix | str]:
    """The token embeddings of the input, and the output head: a stored float matrix's name, or a quantised matrix."""
    bits = graph.precision.embedding_bits
    if bits is None:
        table = graph.vector("wte.weight", tensor("wte.weight"))
        embedded = graph.op("Gather", [table, contract.INPUT_IDS], "wte", axis=0)
        return embedded, table if tied else graph.vector("lm_head.weight", tensor("lm_head.weight"))
    matrix = graph.quantized("wte", tensor("wte.weight"), bits)
    # MatMulNBits wants [out, blocks, bytes], GatherBlockQuantized [out, bytes]: one stored array serves both.
    flat = graph.op("Reshape", [matrix.data, graph.constant("flat", np.array([matrix.rows, -1], np.int64))], "wte.flat")
    embedded = graph.op(
        "GatherBlockQuantized", [flat, contract.INPUT_IDS, matrix.scales], "wte.gather", domain=MICROSOFT,
        bits=bits, block_size=matrix.block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if config.n_embd % matrix.block_size:
        limits = [
            graph.constant(f"width.{side}", np.array([value], np.int64))
            for side, value in (("start", 0), ("end", config.n_embd), ("axis", 2))
        ]
        embedded = graph.op("Slice", [embedded, *limits], "wte.unpadded")
    return embedded, matrix if tied else graph.quantized("lm_head", tensor("lm_head.weight"), bits)


def _head(graph: _Graph, config: GPT2Config, x: str, head: _StoredMatrix | str) -> None:
    """Appends the output head and the cast of its logits to float32."""
    if isinstance(head, str):
        # Gemm multiplies by the transposed table without copying it, but takes two dimensions only.
        rows = graph.op("Reshape", [x, graph.constant("rows", np.array([-1, config.n_embd], np.int64))], "head.rows")
        product = graph.op("Gemm", [rows, head], "head.product", transB=1)
        batch = graph.op("Shape", [x], "head.batch", start=0, end=2)
        vocabulary = graph.constant("vocab_size", np.array([config.vocab_size], np.int64))
        shape = graph.op("Concat", [batch, vocabulary], "head.shape", axis=0)
        logits = graph.op("Reshape", [product, shape], "head.logits")
    else:
        logits = graph.matmul_quantized(x, head, "head.matmul")
    graph.op("Cast", [logits], contract.LOGITS, to=TensorProto.FLOAT)


def _activation(graph: _Graph, function: str, x: str, name: str) -> str:
    """The MLP's activation; formulas as in transformers' ACT2FN."""
    match function:
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
            return graph.op("FastGelu", [x], name, domain=MICROSOFT)
        case "gelu":
            return graph.op("Gelu", [x], name, approximate="none")
        case "quick_gelu":
            return graph.op("QuickGelu", [x], name, domain=MICROSOFT, alpha=1.702)
        case "relu":
            return graph.op("Relu", [x], name)
        case "tanh":
            return graph.op("Tanh", [x], name)
        case "silu" | "swish":
            return graph.op("Mul", [x, graph.op("Sigmoid", [x], f"{name}.gate")], name)
    raise AssertionError(f"{function} passed GPT2Config but has no operator here")


def _model(graph: _Graph, config: GPT2Config) -> ModelProto:
    batch, past, total = "batch_size", "past_sequence_length", "total_sequence_length"
    cache_type = graph.precision.onnx_type

    def value(name: str, kind: int, *shape: str | int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    inputs = [
        value(contract.INPUT_IDS, TensorProto.INT64, batch, "sequence_length"),
        value(contract.ATTENTION_MASK, TensorProto.INT64, batch, total),
        value(contract.POSITION_IDS, TensorProto.INT64, batch, "sequence_length"),
    ]
    outputs = [value(contract.LOGITS, TensorProto.FLOAT, batch, "kept_sequence_length", config.vocab_size)]
    for layer in range(config.n_layer):
        for name, filled in zip(contract.past_names(layer), contract.present_names(layer), strict=True):
            inputs.append(value(name, cache_type, batch, config.n_head, past, config.head_size))
            outputs.append(value(filled, cache_type, batch, config.n_head, total, config.head_size))
    # An input that also has an initializer is optional; required inputs come first.
    inputs.append(value(contract.LOGITS_TO_KEEP, TensorProto.INT64, 1))
    proto = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.initializers)
    return helper.make_model(
        proto,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
        producer_name="gpt2onnx",
    )
