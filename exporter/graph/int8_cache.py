"""The runtime's graphs with a key-value cache in 8 bits: a quarter of the memory, and less to read in each step.

GroupQueryAttention reads and writes such a cache itself; each channel has a scale of its own. On many tokens it is slow then,
so prompts take another branch: attention over float32, and new keys and values are rounded beside it.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ...models import contract
from ...models.config import GPT2Config
from .blocks import Array
from .fused import padded_head_size
from .operators import Nodes, as_model

_ATTENTION = "GroupQueryAttention"
_PAST, _TOTAL_LENGTH, _SCALES = slice(3, 5), 6, slice(12, 14)  # places among its inputs
# Its outputs, and their types: what each token attends to, and the cache.
_OUTPUTS = {"out": TensorProto.FLOAT, "key": TensorProto.INT8, "value": TensorProto.INT8}
_MIN_TOKENS = 16  # of a pass, from which on the branch for prompts is faster


def build(model: ModelProto, config: GPT2Config, scales: Array) -> ModelProto:
    """Rewrites a graph of `ragged.build` for a cache in int8; it refers to the same weights.

    Args:
        model: the graph, with activations in float32.
        scales: of keys and values, float32 [layer, 2, head, size]: a value is about scale * int8.
    """
    graph, nodes = model.graph, Nodes()
    layers = range(config.n_layer)
    cached = {name for layer in layers for name in contract.past_names(layer) + contract.present_names(layer)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name.removesuffix(".padded") in cached:
            value.type.tensor_type.elem_type = TensorProto.INT8
    _prepare(nodes, config)
    remaining = iter(scales)
    for node in graph.node:
        if node.op_type != _ATTENTION:
            nodes.nodes.append(node)
            continue
        if node.name == "h.0.attn":
            _decide(nodes)
        _attend(nodes, node, config, next(remaining))
    initializers = [*graph.initializer, *nodes.initializers]
    inputs, outputs = graph.input, graph.output
    return as_model(
        helper.make_graph(nodes.nodes, graph.name, inputs, outputs, initializers, value_info=graph.value_info)
    )


def _prepare(nodes: Nodes, config: GPT2Config) -> None:
    """Adds the constants of all layers."""
    size = padded_head_size(config)
    whole_numbers = {
        "start": [0], "stop": [2**31 - 1], "axis_2": [2], "behind_queries": [config.n_head * size],
        "by_head": [0, 0, config.n_head, size], "least": _MIN_TOKENS,
    }  # fmt: skip
    for name, numbers in whole_numbers.items():
        nodes.constant(f"prompt.{name}", np.array(numbers, np.int64))
    nodes.constant("prompt.unit", np.array(1, np.float32))
    nodes.constant("prompt.zero", np.array(0, np.int8))


def _decide(nodes: Nodes) -> None:
    """Appends whether a pass takes the branch for prompts, "prompt", and the lengths that this needs."""
    past = nodes.op("ReduceMax", [contract.PAST_LENGTHS], "prompt.past", keepdims=0)
    nodes.op("Unsqueeze", [past, "prompt.start"], "prompt.begin")
    end = nodes.op("Add", [past, "ragged.longest_scalar"], "prompt.total")
    nodes.op("Unsqueeze", [end, "prompt.start"], "prompt.end")
    nodes.op("Cast", [end], "prompt.total_length", to=TensorProto.INT32)
    # Several pasts, or padding behind one, don't fit into an array that attention in float32 takes.
    fewest = nodes.op("ReduceMin", [contract.COUNTS], "prompt.fewest", keepdims=0)
    whole = nodes.op("Equal", [fewest, "ragged.longest_scalar"], "prompt.whole")
    one_row = nodes.op("Equal", [nodes.op("Size", [contract.COUNTS], "prompt.rows"), "ragged.one"], "prompt.one_row")
    single = nodes.op("And", [one_row, whole], "prompt.single")
    fresh = nodes.op("Equal", [past, "ragged.zero"], "prompt.fresh")
    possible = nodes.op("Or", [fresh, single], "prompt.possible")
    many = nodes.op("GreaterOrEqual", ["ragged.longest_scalar", "prompt.least"], "prompt.many")
    nodes.op("And", [many, possible], "prompt")


def _attend(nodes: Nodes, node: NodeProto, config: GPT2Config, scales: Array) -> None:
    """Appends attention in place of its node.

    Args:
        scales: of keys and values, float32 [2, head, size].
    """
    padded = np.ones((2, 1, config.n_head, 1, padded_head_size(config)), np.float32)
    padded[:, 0, :, 0, : config.head_size] = scales
    names = [
        nodes.constant(f"{node.name}.{part}_scale", each) for part, each in zip(("key", "value"), padded, strict=True)
    ]
    nodes.constant(f"{node.name}.scales", padded.reshape(-1))
    branches = {"then_branch": _prompt(node, names), "else_branch": _step(node, names)}
    nodes.op("If", ["prompt"], node.name, outputs=list(node.output), **branches)


def _step(node: NodeProto, scales: Sequence[str]) -> GraphProto:
    """Attention that reads and writes the cache."""
    attention = NodeProto()
    attention.CopyFrom(node)
    attention.input[_SCALES] = scales
    attention.output[:] = [f"{node.name}.step.{each}" for each in _OUTPUTS]
    attention.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    attention.attribute.extend(helper.make_attribute(f"{each}_quant_type", "PER_CHANNEL") for each in "kv")
    return _branch([attention], f"{node.name}.step")


def _prompt(node: NodeProto, scales: Sequence[str]) -> GraphProto:
    """Attention of many tokens, of one row or of rows without a past, with the past in float32."""
    inner, name, past = Nodes(), f"{node.name}.prompt", node.input[_PAST]
    new = inner.op("Slice", [node.input[0], "prompt.behind_queries", "prompt.stop", "prompt.axis_2"], f"{name}.new")
    new = inner.op("Div", [new, f"{node.name}.scales"], f"{name}.scaled")
    new = inner.op("QuantizeLinear", [new, "prompt.unit", "prompt.zero"], f"{name}.rounded")
    parts = [f"{name}.new.{part}" for part in ("key", "value")]
    inner.op("Split", [new], f"{name}.parts", outputs=parts, axis=2, num_outputs=2)
    floats = []
    for part, cached, rows, scale in zip(("key", "value"), past, parts, scales, strict=True):
        used = inner.op("Slice", [cached, "prompt.start", "prompt.begin", "prompt.axis_2"], f"{name}.used.{part}")
        free = inner.op("Slice", [cached, "prompt.end", "prompt.stop", "prompt.axis_2"], f"{name}.free.{part}")
        rows = inner.op("Reshape", [rows, "prompt.by_head"], f"{name}.by_position.{part}")
        heads = inner.op("Transpose", [rows], f"{name}.by_head.{part}", perm=[0, 2, 1, 3])
        inner.op("Concat", [used, heads, free], f"{name}.{part}", axis=2)
        used = inner.op("Cast", [used], f"{name}.cast.{part}", to=TensorProto.FLOAT)
        floats.append(inner.op("Mul", [used, scale], f"{name}.past.{part}"))
    attention = NodeProto()
    attention.CopyFrom(node)
    attention.input[_PAST], attention.input[_TOTAL_LENGTH] = floats, "prompt.total_length"
    del attention.input[_TOTAL_LENGTH + 1 :]
    attention.output[:] = [f"{name}.out", f"{name}.keys", f"{name}.values"]
    return _branch([*inner.nodes, attention], name)


def _branch(nodes: Sequence[NodeProto], name: str) -> GraphProto:
    outputs = [helper.make_tensor_value_info(f"{name}.{each}", kind, None) for each, kind in _OUTPUTS.items()]
    return helper.make_graph(nodes, name, [], outputs)
