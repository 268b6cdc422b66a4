"""The runtime's graphs with a key-value cache in 8 bits: a quarter of the memory, and less to read in each step.

GroupQueryAttention reads and writes such a cache itself; each channel has a scale of its own. It multiplies in float32. On many
tokens it is slow then, so prompts take another branch: attention over float32, and new keys and values are rounded beside it.
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
_QKV, _PAST, _SEQLENS_K, _TOTAL_LENGTH, _SCALES = 0, slice(3, 5), 5, 6, slice(12, 14)  # places among its inputs
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
    attentions = [node.name for node in graph.node if node.op_type == _ATTENTION]
    of_layers = dict(zip(attentions, scales, strict=True))
    for node in graph.node:
        if node.name == attentions[0]:
            _prepare(nodes, config)
        if node.name in of_layers:
            _attend(nodes, node, config, of_layers[node.name])
        else:
            nodes.nodes.append(node)
    initializers = [*graph.initializer, *nodes.initializers]
    inputs, outputs = graph.input, graph.output
    return as_model(
        helper.make_graph(nodes.nodes, graph.name, inputs, outputs, initializers, value_info=graph.value_info)
    )


def _prepare(nodes: Nodes, config: GPT2Config) -> None:
    """Appends what all layers share: whether a pass takes the branch for prompts, "prompt", and what that branch needs."""
    size = padded_head_size(config)
    whole_numbers = {
        "axis_0": [0], "axis_2": [2], "first": [0], "last": [2**31 - 1], "behind_queries": [config.n_head * size],
        "by_head": [0, 0, config.n_head, size], "least": _MIN_TOKENS,
    }  # fmt: skip
    for name, numbers in whole_numbers.items():
        nodes.constant(f"prompt.{name}", np.array(numbers, np.int64))
    nodes.constant("prompt.unit", np.array(1, np.float32))
    nodes.constant("prompt.zero", np.array(0, np.int8))

    past = nodes.op("ReduceMax", [contract.PAST_LENGTHS], "prompt.past", keepdims=0)
    total = nodes.op("Add", [past, "ragged.longest_scalar"], "prompt.total")
    nodes.op("Unsqueeze", [past, "prompt.axis_0"], "prompt.begin")
    nodes.op("Unsqueeze", [total, "prompt.axis_0"], "prompt.end")
    nodes.op("Cast", [total], "prompt.total_length", to=TensorProto.INT32)
    # Padding counts as valid: no token looks at later ones, and attention leaves no memory unwritten.
    last_key = nodes.op(
        "Cast", [nodes.op("Sub", [total, "ragged.one"], "prompt.last_key")], "prompt.seqlen_k", to=TensorProto.INT32
    )
    nodes.op("Expand", [last_key, nodes.op("Shape", [contract.COUNTS], "prompt.batch")], "prompt.seqlens_k")

    # Several pasts don't fit into an array that attention in float32 takes.
    one_row = nodes.op("Equal", [nodes.op("Size", [contract.COUNTS], "prompt.rows"), "ragged.one"], "prompt.one_row")
    fresh = nodes.op("Equal", [past, "ragged.zero"], "prompt.fresh")
    possible = nodes.op("Or", [fresh, one_row], "prompt.possible")
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
    flat = nodes.constant(f"{node.name}.scales", padded.reshape(-1))
    branches = {"then_branch": _prompt(node, names, flat), "else_branch": _step(node, names)}
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


def _prompt(node: NodeProto, scales: Sequence[str], flat: str) -> GraphProto:
    """Attention of many tokens, of one row or of rows without a past, with the past in float32.

    Args:
        scales: of keys and of values, each [1, head, 1, size].
        flat: the same, those of keys first.
    """
    inner, name = Nodes(), f"{node.name}.prompt"
    floats = inner.op(
        "Slice", [node.input[_QKV], "prompt.behind_queries", "prompt.last", "prompt.axis_2"], f"{name}.floats"
    )
    scaled = inner.op("Div", [floats, flat], f"{name}.scaled")
    rounded = inner.op("QuantizeLinear", [scaled, "prompt.unit", "prompt.zero"], f"{name}.rounded")
    new = [f"{name}.new.{part}" for part in ("key", "value")]
    inner.op("Split", [rounded], f"{name}.parts", outputs=new, axis=2, num_outputs=2)
    pasts = []
    for part, cache, scale, tokens in zip(("key", "value"), node.input[_PAST], scales, new, strict=True):
        used = inner.op("Slice", [cache, "prompt.first", "prompt.begin", "prompt.axis_2"], f"{name}.used.{part}")
        free = inner.op("Slice", [cache, "prompt.end", "prompt.last", "prompt.axis_2"], f"{name}.free.{part}")
        heads = inner.op("Reshape", [tokens, "prompt.by_head"], f"{name}.heads.{part}")
        heads = inner.op("Transpose", [heads], f"{name}.by_head.{part}", perm=[0, 2, 1, 3])
        inner.op("Concat", [used, heads, free], f"{name}.{part}", axis=2)
        whole_numbers = inner.op("Cast", [used], f"{name}.cast.{part}", to=TensorProto.FLOAT)
        pasts.append(inner.op("Mul", [whole_numbers, scale], f"{name}.past.{part}"))
    attention = NodeProto()
    attention.CopyFrom(node)
    attention.input[_PAST] = pasts
    attention.input[_SEQLENS_K], attention.input[_TOTAL_LENGTH] = "prompt.seqlens_k", "prompt.total_length"
    del attention.input[_TOTAL_LENGTH + 1 :]
    attention.output[:] = [f"{name}.out", f"{name}.keys", f"{name}.values"]
    return _branch([*inner.nodes, attention], name)


def _branch(nodes: Sequence[NodeProto], name: str) -> GraphProto:
    outputs = [helper.make_tensor_value_info(f"{name}.{each}", kind, None) for each, kind in _OUTPUTS.items()]
    return helper.make_graph(nodes, name, [], outputs)
