"""The fused graph: GPT-2 written straight in ONNX, with ONNX Runtime's own fused operators.

Knows the network and the tensor contract, nothing of files or of decoding. Weights are asked for by
name, one at a time, and handed on to the writer of external data at once, so memory stays small.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ...models import contract
from ...models.config import GPT2Config
from ..quantize.blocks import dequantize, quantize
from ..quantize.inputs import of_both_uses
from .operators import MICROSOFT, Graph, Layer, Precision, StoredMatrix, activation, as_model
from .weights import WeightsFile

if TYPE_CHECKING:
    from ..quantize.sequential import Twins

_HEAD_SIZE_UNIT = 8  # GroupQueryAttention takes multiples only
_LARGEST_PART = 40 << 20  # bytes of the output head that one operator multiplies with
_ROWS_UNIT = 1024  # so many rows of the head fill whole pages, which can be mapped

Tensor = Callable[[str], npt.NDArray[np.float32]]


def build(
    config: GPT2Config,
    tensor: Tensor,
    *,
    tied: bool,
    precision: Precision,
    weights: WeightsFile,
    twins: "Twins | None" = None,
) -> tuple[ModelProto, Mapping[str, Layer]]:
    """Writes the network as an ONNX model that fulfils `models.contract`.

    Args:
        config: the architecture.
        tensor: gives a weight by its checkpoint name, float32.
        tied: whether the output head is the token embedding, which is then stored once.
        precision: how weights are stored.
        weights: takes the weights as external data, in the order in which the network uses them.
        twins: two networks that follow the graph on texts; its matrices are then quantised for them.

    Returns:
        The model, its weights referring to the file of `weights`; and which of its layers `wide` can run, by their
        nodes' names.
    """
    graph = Graph(precision=precision, weights=weights, twins=twins)
    epsilon = float(config.layer_norm_epsilon)

    # The mask only says how many positions are in use: GroupQueryAttention takes that as int32 numbers.
    axis_1 = graph.constant("axis_1", np.array([1], np.int64))
    used = graph.op("ReduceSum", [contract.ATTENTION_MASK, axis_1], "mask_sum", keepdims=0)
    last = graph.op("Sub", [used, graph.constant("one", np.array(1, np.int64))], "last_position")
    seqlens_k = graph.op("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    mask_width = graph.op("Shape", [contract.ATTENTION_MASK], "mask_width", start=1, end=2)
    mask_width = graph.op("Squeeze", [mask_width], "mask_width_scalar")
    total_length = graph.op("Cast", [mask_width], "total_sequence_length", to=TensorProto.INT32)

    embedded, head = _embedding(graph, config, tensor, tied=tied)
    positions = tensor("wpe.weight")
    # Where matrices are quantised, the digits that float16 lacks don't count.
    if precision.blocks("wte") is None:
        table = graph.vector("wpe.weight", positions)
    else:
        table = graph.halved("wpe.weight", positions, small=2**-12)
    placed = graph.op("Gather", [table, contract.POSITION_IDS], "wpe", axis=0)
    residual = graph.op("Add", [embedded, placed], "embedding")

    def norm_weights(name: str) -> tuple[str, str]:
        return (
            graph.vector(f"{name}.weight", tensor(f"{name}.weight")),
            graph.vector(f"{name}.bias", tensor(f"{name}.bias")),
        )

    def linear(x: str, name: str) -> str:
        return graph.linear(x, name, tensor(f"{name}.weight"), tensor(f"{name}.bias"), beside=residual)

    x = graph.op("LayerNormalization", [residual, *norm_weights("h.0.ln_1")], "h.0.ln_1", axis=-1, epsilon=epsilon)
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        qkv = linear(x, f"{block}.attn.c_attn")
        attended = _attention(graph, config, layer, qkv, seqlens_k, total_length)
        projected = linear(attended, f"{block}.attn.c_proj")
        x, residual = graph.add_and_normalize(
            projected, residual, f"{block}.ln_2", *norm_weights(f"{block}.ln_2"), epsilon
        )
        hidden = linear(x, f"{block}.mlp.c_fc")
        hidden = activation(graph, config.activation_function, hidden, f"{block}.mlp.act")
        projected = linear(hidden, f"{block}.mlp.c_proj")
        following = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
        x, residual = graph.add_and_normalize(projected, residual, following, *norm_weights(following), epsilon)

    # Keeping the logits of only the last positions is an input with a default, which other runtimes don't see.
    everything = graph.constant(contract.LOGITS_TO_KEEP, np.array([2**31 - 1], np.int64))
    start = graph.op("Neg", [everything], "first_kept")
    kept = graph.op("Slice", [x, start, graph.constant("end", np.array([2**31 - 1], np.int64)), axis_1], "kept")
    _head(graph, config, kept, head)
    return _model(graph, config), graph.wide


def _attention(graph: Graph, config: GPT2Config, layer: int, qkv: str, seqlens_k: str, total_length: str) -> str:
    """Causal attention on packed queries, keys and values; appends to the cache."""
    name, heads, size = f"h.{layer}.attn", config.n_head, config.head_size
    past, present = list(contract.past_names(layer)), list(contract.present_names(layer))
    missing = -size % _HEAD_SIZE_UNIT
    if missing:
        # Zeros behind each head change no product of queries and keys. They are added and taken off
        # here, so that neither the weights nor the cache have another shape than in the checkpoint.
        qkv = graph.reshape(qkv, f"{name}.qkv.heads", 0, 0, 3 * heads, size)
        qkv = graph.reshape(graph.pad_end(qkv, f"{name}.qkv.padded", missing), f"{name}.qkv", 0, 0, -1)
        past = [graph.pad_end(each, f"{each}.padded", missing) for each in past]
        present = [f"{each}.padded" for each in present]
    attended = graph.op(
        "GroupQueryAttention", [qkv, "", "", *past, seqlens_k, total_length], name, domain=MICROSOFT,
        outputs=[name, *present], num_heads=heads, kv_num_heads=heads, do_rotary=0,
        scale=_attention_scale(config, layer),
    )  # fmt: skip
    if missing:
        for padded, whole in zip(present, contract.present_names(layer), strict=True):
            graph.first(padded, whole, size)
        by_head = graph.reshape(attended, f"{name}.heads", 0, 0, heads, size + missing)
        attended = graph.reshape(graph.first(by_head, f"{name}.unpadded", size), f"{name}.merged", 0, 0, -1)
    return attended


def _attention_scale(config: GPT2Config, layer: int) -> float:
    scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _embedding(graph: Graph, config: GPT2Config, tensor: Tensor, *, tied: bool) -> tuple[str, StoredMatrix | str]:
    """The token embeddings of the input, and the output head: the stored weight that it is, or a quantised matrix."""
    blocks = graph.precision.blocks("wte")
    if blocks is None:
        table = graph.vector("wte.weight", tensor("wte.weight"))
        embedded = graph.op("Gather", [table, contract.INPUT_IDS], "wte", axis=0)
        return embedded, table if tied else graph.vector("lm_head.weight", tensor("lm_head.weight"))
    exact = tensor("wte.weight")
    reaching = graph.twins.head if graph.twins else None
    fitting = of_both_uses(reaching) if reaching and tied else None
    quantized = quantize(exact, blocks.bits, blocks.size, fitting)
    matrix = graph.stored("wte", quantized)
    # MatMulNBits wants [out, blocks, bytes], GatherBlockQuantized [out, bytes]: one stored array serves both.
    stored_blocks = -(-matrix.width // blocks.size)
    flat = graph.view("wte.flat", matrix.data, matrix.rows, stored_blocks * blocks.size * blocks.bits // 8)
    embedded = graph.op(
        "GatherBlockQuantized", [flat, contract.INPUT_IDS, matrix.scales], "wte.gather", domain=MICROSOFT,
        bits=blocks.bits, block_size=blocks.size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if config.n_embd % blocks.size:
        embedded = graph.first(embedded, "wte.unpadded", config.n_embd)
    if graph.twins is not None:
        graph.twins.look_up(embedded, exact, dequantize(quantized))
    weight = exact if tied else tensor("lm_head.weight")
    head = replace(matrix, name="lm_head") if tied else graph.quantized("lm_head", weight, blocks)
    if reaching is not None:
        # Here, while its weight is at hand: the node comes last.
        graph.offer(contract.LOGITS, head, "", reaching.sample, weight.T)
    return embedded, head


def _head(graph: Graph, config: GPT2Config, x: str, head: StoredMatrix | str) -> None:
    """Appends the output head, and the cast of its logits to float32 where they are float16."""
    halves = graph.precision.floats == np.float16
    logits = "head.logits" if halves else contract.LOGITS
    if isinstance(head, str):
        # Gemm multiplies by the transposed table without copying it, but takes two dimensions only.
        rows = graph.reshape(x, "head.rows", -1, config.n_embd)
        product = _head_in_parts(graph, config, rows, head)
        batch = graph.op("Shape", [x], "head.batch", start=0, end=2)
        vocabulary = graph.constant("vocab_size", np.array([config.vocab_size], np.int64))
        shape = graph.op("Concat", [batch, vocabulary], "head.shape", axis=0)
        graph.op("Reshape", [product, shape], logits)
    else:
        graph.matmul_quantized(x, head, logits)
    if halves:
        graph.op("Cast", [logits], contract.LOGITS, to=TensorProto.FLOAT)


def _head_in_parts(graph: Graph, config: GPT2Config, rows: str, head: str) -> str:
    """Logits of rows [count, width]. While ONNX Runtime loads a weight it holds it twice, so a large head comes in parts."""
    width = config.n_embd
    row_bytes = width * np.dtype(graph.precision.floats).itemsize
    parts = -(-config.vocab_size * row_bytes // _LARGEST_PART)
    step = -(-config.vocab_size // (parts * _ROWS_UNIT)) * _ROWS_UNIT if parts > 1 else config.vocab_size
    products = []
    for part, first in enumerate(range(0, config.vocab_size, step)):
        count = min(step, config.vocab_size - first)
        weight = graph.view(f"head.weight.{part}", head, count, width, first=first * row_bytes)
        products.append(graph.op("Gemm", [rows, weight], f"head.product.{part}", transB=1))
    return products[0] if len(products) == 1 else graph.op("Concat", products, "head.product", axis=1)


def _model(graph: Graph, config: GPT2Config) -> ModelProto:
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
    inner: list[ValueInfoProto] = []
    for layer in range(config.n_layer):
        for name, filled in zip(contract.past_names(layer), contract.present_names(layer), strict=True):
            inputs.append(value(name, cache_type, batch, config.n_head, past, config.head_size))
            outputs.append(value(filled, cache_type, batch, config.n_head, total, config.head_size))
            # Where heads are padded, ONNX Runtime takes past and present for equally long unless it is told
            # otherwise, and then reuses the one's memory for the other.
            padded = config.head_size + -config.head_size % _HEAD_SIZE_UNIT
            if padded != config.head_size:
                inner.append(value(f"{name}.padded", cache_type, batch, config.n_head, past, padded))
                inner.append(value(f"{filled}.padded", cache_type, batch, config.n_head, total, padded))
    # An input that also has an initializer is optional; required inputs come first.
    inputs.append(value(contract.LOGITS_TO_KEEP, TensorProto.INT64, 1))
    proto = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.initializers, value_info=inner)
    return as_model(proto)
