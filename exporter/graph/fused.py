"""The fused graph: GPT-2 written straight in ONNX, with ONNX Runtime's own fused operators.

Knows the network and the tensor contract, nothing of files or of decoding. Weights are asked for by
name, one at a time, and handed on to the store at once, so memory stays small.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ...models import contract
from ...models.config import GPT2Config
from .blocks import Array, QuantizedMatrix
from .operators import MICROSOFT, Graph, StoredMatrix, Weight, activation, as_model
from .weights import Store

_HEAD_SIZE_UNIT = 8  # GroupQueryAttention takes multiples only
_LARGEST_PART = 40 << 20  # bytes of the output head that one operator multiplies with
_PART_ROWS_UNIT = 1024  # rows of the head that fill whole pages, so that a part can be mapped
# Rounding error of positions that doesn't count beside that of quantised embeddings, as a share of their mean.
_HARMLESS_ERROR_OF_POSITIONS = 2**-12

Weights: TypeAlias = Callable[[str], Weight]
# Two int32 values: the index of each row's last position, and the length of cache and input together.
Lengths: TypeAlias = tuple[str, str]


def build(
    config: GPT2Config,
    weights: Weights,
    *,
    tied: bool,
    store: Store,
    floats: type[np.float32] | type[np.float16] = np.float32,
) -> ModelProto:
    """Writes the network as an ONNX model that fulfils `models.contract`.

    Args:
        weights: gives a weight by its checkpoint name; matrices may be quantised.
        tied: whether the output head is the token embedding, which is then stored once.
        store: takes the weights, in the order in which the network uses them.
        floats: type of activations, the KV cache and the weights that aren't quantised.

    Raises:
        CheckpointError: a number is beyond float16's range.
    """
    graph = Graph(store=store, floats=floats)
    axis_1 = graph.constant("axis_1", np.array([1], np.int64))
    lengths = attention_lengths(graph, axis_1)
    embedded, head = _embedding(graph, config, weights, tied=tied)
    residual = add_positions(
        graph, embedded, plain(weights, "wpe.weight"), quantized_embedding=isinstance(head, StoredMatrix)
    )

    def linear(x: str, name: str) -> str:
        return graph.linear(x, name, weights(f"{name}.weight"), plain(weights, f"{name}.bias"))

    x = normalize(graph, config, residual, "h.0.ln_1", weights)
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        x = attention(graph, config, layer, linear(x, f"{block}.attn.c_attn"), lengths)
        residual = graph.add(linear(x, f"{block}.attn.c_proj"), residual, f"{block}.ln_2")
        x = normalize(graph, config, residual, f"{block}.ln_2", weights)
        x = activation(graph, config.activation_function, linear(x, f"{block}.mlp.c_fc"), f"{block}.mlp.act")
        following = f"h.{layer + 1}.ln_1" if layer + 1 < config.n_layer else "ln_f"
        residual = graph.add(linear(x, f"{block}.mlp.c_proj"), residual, following)
        x = normalize(graph, config, residual, following, weights)

    # Keeping the logits of only the last positions is an input with a default, which other runtimes don't see.
    everything = graph.constant(contract.LOGITS_TO_KEEP, np.array([2**31 - 1], np.int64))
    start = graph.op("Neg", [everything], "first_kept")
    kept = graph.op(
        "Slice", [x, start, graph.constant("end", np.array([2**31 - 1], np.int64)), axis_1], contract.HIDDEN
    )
    _head(graph, config, kept, head)
    return _model(graph, config)


def plain(weights: Weights, name: str) -> Array:
    """A weight that is never quantised."""
    array = weights(name)
    assert not isinstance(array, QuantizedMatrix), f"{name} is no matrix of a linear layer"
    return array


def normalize(graph: Graph, config: GPT2Config, x: str, name: str, weights: Weights) -> str:
    """The layer norm of that name."""
    vectors = plain(weights, f"{name}.weight"), plain(weights, f"{name}.bias")
    return graph.normalize(x, name, *vectors, float(config.layer_norm_epsilon))


def add_positions(graph: Graph, embedded: str, positions: Array, *, quantized_embedding: bool) -> str:
    """Token embeddings plus position embeddings."""
    if quantized_embedding:
        table = graph.halved("wpe.weight", positions, small=_HARMLESS_ERROR_OF_POSITIONS)
    else:
        table = graph.vector("wpe.weight", positions)
    placed = graph.op("Gather", [table, contract.POSITION_IDS], "wpe", axis=0)
    return graph.op("Add", [embedded, placed], "embedding")


def attention_lengths(graph: Graph, axis_1: str) -> Lengths:
    """The lengths that GroupQueryAttention takes in place of the mask, which only says how many positions are used."""
    used = graph.op("ReduceSum", [contract.ATTENTION_MASK, axis_1], "mask_sum", keepdims=0)
    last = graph.op("Sub", [used, graph.constant("one", np.array(1, np.int64))], "last_position")
    seqlens_k = graph.op("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    mask_width = graph.op("Shape", [contract.ATTENTION_MASK], "mask_width", start=1, end=2)
    mask_width = graph.op("Squeeze", [mask_width], "mask_width_scalar")
    return seqlens_k, graph.op("Cast", [mask_width], "total_sequence_length", to=TensorProto.INT32)


def attention(graph: Graph, config: GPT2Config, layer: int, qkv: str, lengths: Lengths, *, cached: bool = True) -> str:
    """Causal attention on packed queries, keys and values.

    Args:
        qkv: [batch, length, 3 * width].
        lengths: from `attention_lengths`.
        cached: read and write the KV cache; otherwise there is no past.
    """
    name, heads, size = f"h.{layer}.attn", config.n_head, config.head_size
    past = list(contract.past_names(layer)) if cached else ["", ""]
    present = list(contract.present_names(layer))
    missing = padded_head_size(config) - size
    if missing:
        # Zeros behind each head change no product of queries and keys. They are added and taken off
        # here, so that neither the weights nor the cache have another shape than in the checkpoint.
        qkv = graph.reshape(qkv, f"{name}.qkv.heads", 0, 0, 3 * heads, size)
        qkv = graph.reshape(graph.pad_end(qkv, f"{name}.qkv.padded", missing), f"{name}.qkv", 0, 0, -1)
        past = [graph.pad_end(each, f"{each}.padded", missing) if each else "" for each in past]
        present = [f"{each}.padded" for each in present]
    attended = graph.op(
        "GroupQueryAttention", [qkv, "", "", *past, *lengths], name, domain=MICROSOFT,
        outputs=[name, *present], num_heads=heads, kv_num_heads=heads, do_rotary=0,
        scale=_attention_scale(config, layer),
    )  # fmt: skip
    if missing:
        if cached:
            for padded, whole in zip(present, contract.present_names(layer), strict=True):
                graph.first(padded, whole, size)
        by_head = graph.reshape(attended, f"{name}.heads", 0, 0, heads, size + missing)
        attended = graph.reshape(graph.first(by_head, f"{name}.unpadded", size), f"{name}.merged", 0, 0, -1)
    return attended


def padded_head_size(config: GPT2Config) -> int:
    """The size of a head that attention is computed with: a multiple of what GroupQueryAttention takes."""
    return config.head_size + -config.head_size % _HEAD_SIZE_UNIT


def _attention_scale(config: GPT2Config, layer: int) -> float:
    scale = 1 / math.sqrt(config.head_size) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _embedding(graph: Graph, config: GPT2Config, weights: Weights, *, tied: bool) -> tuple[str, StoredMatrix | str]:
    """The token embeddings of the input, and the output head: a quantised matrix, or the name of another weight."""
    table = weights("wte.weight")
    if not isinstance(table, QuantizedMatrix):
        name = graph.vector("wte.weight", table)
        embedded = graph.op("Gather", [name, contract.INPUT_IDS], "wte", axis=0)
        return embedded, name if tied else graph.vector("lm_head.weight", plain(weights, "lm_head.weight"))
    matrix = graph.quantized("wte", table)
    # MatMulNBits wants [out, blocks, bytes], GatherBlockQuantized [out, bytes]: one stored array serves both.
    blocks = -(-matrix.width // matrix.block_size)
    flat = graph.view("wte.flat", matrix.data, matrix.rows, blocks * matrix.block_size * matrix.bits // 8)
    embedded = graph.op(
        "GatherBlockQuantized", [flat, contract.INPUT_IDS, matrix.scales], "wte.gather", domain=MICROSOFT,
        bits=matrix.bits, block_size=matrix.block_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    if config.n_embd % matrix.block_size:
        embedded = graph.first(embedded, "wte.unpadded", config.n_embd)
    if tied:
        return embedded, matrix
    head = weights("lm_head.weight")
    assert isinstance(head, QuantizedMatrix), "embedding and head are quantised together"
    return embedded, graph.quantized("lm_head", head)


def _head(graph: Graph, config: GPT2Config, x: str, head: StoredMatrix | str) -> None:
    """Appends the output head, and the cast of its logits to float32 where they are float16."""
    halves = graph.floats == np.float16
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
    """Logits of rows [count, width]. ONNX Runtime holds a weight twice while it loads it, so a large head comes in parts."""
    width = config.n_embd
    row_bytes = width * np.dtype(graph.floats).itemsize
    parts = -(-config.vocab_size * row_bytes // _LARGEST_PART)
    step = -(-config.vocab_size // (parts * _PART_ROWS_UNIT)) * _PART_ROWS_UNIT if parts > 1 else config.vocab_size
    products = []
    for part, first in enumerate(range(0, config.vocab_size, step)):
        count = min(step, config.vocab_size - first)
        weight = graph.view(f"head.weight.{part}", head, count, width, first_byte=first * row_bytes)
        products.append(graph.op("Gemm", [rows, weight], f"head.product.{part}", transB=1))
    return products[0] if len(products) == 1 else graph.op("Concat", products, "head.product", axis=1)


def _model(graph: Graph, config: GPT2Config) -> ModelProto:
    batch, past, total = "batch_size", "past_sequence_length", "total_sequence_length"
    cache_type = int(helper.np_dtype_to_tensor_dtype(np.dtype(graph.floats)))

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
            padded = padded_head_size(config)
            if padded != config.head_size:
                inner.append(value(f"{name}.padded", cache_type, batch, config.n_head, past, padded))
                inner.append(value(f"{filled}.padded", cache_type, batch, config.n_head, total, padded))
    # An input that also has an initializer is optional; required inputs come first.
    inputs.append(value(contract.LOGITS_TO_KEEP, TensorProto.INT64, 1))
    proto = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, graph.initializers, value_info=inner)
    return as_model(proto)
