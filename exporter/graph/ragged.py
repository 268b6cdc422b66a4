"""The network as our own runtime runs it: each row of a pass brings its own number of tokens, behind its own past.

`model.onnx` is for interchange: its rows bring equally many tokens, and an attention mask says how long their pasts are. Here
GroupQueryAttention gets both lengths of each row (`query_seqlens`, from ONNX Runtime 1.32 on), so that prompts,
parts of prompts, single tokens and drafts share a pass; logits are computed at the positions that are asked for.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ...models import contract
from ...models.config import GPT2Config
from .operators import Nodes, as_model

_ATTENTION = "GroupQueryAttention"
_SEQLENS_K, _TOTAL_LENGTH, _QUERY_SEQLENS = 5, 6, 16  # places among its inputs


def build(model: ModelProto, config: GPT2Config) -> ModelProto:
    """Rewrites the interchange graph with the inputs of `contract`'s second form; it refers to the same weights.

    Args:
        model: the fused graph or the second graph, whose weights are external data.
    """
    graph, nodes = model.graph, Nodes()
    whole_numbers = {"axis_0": [0], "axis_1": [1], "all_rows": [-1, config.n_embd], "last": [config.n_positions - 1]}
    for name, values in whole_numbers.items():
        nodes.constant(f"ragged.{name}", np.array(values, np.int64))
    for name, value in {"zero": 0, "one": 1}.items():
        nodes.constant(f"ragged.{name}", np.array(value, np.int64))

    # Positions of padding may lie beyond the last one, whose embedding then stands in.
    longest = nodes.op("Shape", [contract.INPUT_IDS], "ragged.longest", start=1, end=2)
    longest = nodes.op("Squeeze", [longest], "ragged.longest_scalar")
    offsets = nodes.op("Range", ["ragged.zero", longest, "ragged.one"], "ragged.offsets")
    past = nodes.op("Unsqueeze", [contract.PAST_LENGTHS, "ragged.axis_1"], "ragged.past")
    positions = nodes.op("Add", [past, offsets], "ragged.positions")
    positions = nodes.op("Min", [positions, "ragged.last"], "ragged.position_ids")

    total = nodes.op("Add", [contract.PAST_LENGTHS, contract.COUNTS], "ragged.total")
    total = nodes.op(
        "Max", [nodes.op("Sub", [total, "ragged.one"], "ragged.last_key"), "ragged.zero"], "ragged.seqlens"
    )
    seqlens_k = nodes.op("Cast", [total], "ragged.seqlens_k", to=TensorProto.INT32)
    counts = nodes.op("Cast", [contract.COUNTS], "ragged.query_seqlens", to=TensorProto.INT32)
    capacity = nodes.op("Shape", [contract.past_names(0)[0]], "ragged.capacity", start=2, end=3)
    capacity = nodes.op(
        "Cast",
        [nodes.op("Squeeze", [capacity], "ragged.capacity_scalar")],
        "ragged.capacity_int32",
        to=TensorProto.INT32,
    )

    # The operator leaves outputs of padding unwritten. A layer that rounds its input with one scale would see that memory.
    per_tensor = any(node.op_type == "DynamicQuantizeMatMul" for node in graph.node)
    if per_tensor:
        ends = nodes.op("Unsqueeze", [contract.COUNTS, "ragged.axis_1"], "ragged.ends")
        valid = nodes.op("Less", ["ragged.offsets", ends], "ragged.valid_tokens")
        valid = nodes.op("Unsqueeze", [valid, nodes.constant("ragged.axis_2", np.array([2], np.int64))], "ragged.valid")
        nodes.constant("ragged.nothing", np.array(0, np.float32))

    def changed(node: NodeProto) -> NodeProto:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [positions if name == contract.POSITION_IDS else name for name in node.input]
        if node.op_type == _ATTENTION:
            copy.input[_SEQLENS_K], copy.input[_TOTAL_LENGTH] = seqlens_k, capacity
            copy.input.extend([""] * (_QUERY_SEQLENS - len(copy.input)))
            copy.input.append(counts)
            if per_tensor:
                copy.output[0] = f"{node.name}.unmasked"
        return copy

    for node in graph.node:
        if node.op_type == "Slice" and contract.HIDDEN in node.output:
            flat = nodes.op("Reshape", [node.input[0], "ragged.all_rows"], "ragged.states")
            chosen = nodes.op("Gather", [flat, contract.LOGITS_AT], "ragged.chosen", axis=0)
            nodes.op("Unsqueeze", [chosen, "ragged.axis_1"], contract.HIDDEN)
        else:
            nodes.nodes.append(changed(node))
            if per_tensor and node.op_type == _ATTENTION:
                nodes.op(
                    "Where",
                    [valid, f"{node.name}.unmasked", "ragged.nothing"],
                    f"{node.name}.masked",
                    outputs=[node.output[0]],
                )

    logits, *presents = graph.output
    floats = presents[0].type.tensor_type.elem_type
    kept = helper.make_tensor_value_info(contract.HIDDEN, floats, ["logits", 1, config.n_embd])
    outputs = [logits, kept, *presents]
    nodes.nodes[:] = _needed(nodes.nodes, {each.name for each in outputs})
    used = {name for node in nodes.nodes for name in node.input}
    initializers = [each for each in graph.initializer if each.name in used]
    inputs = [each for each in graph.input if each.name in used and each.name != contract.LOGITS_TO_KEEP]
    inputs += [
        helper.make_tensor_value_info(contract.PAST_LENGTHS, TensorProto.INT64, ["batch_size"]),
        helper.make_tensor_value_info(contract.COUNTS, TensorProto.INT64, ["batch_size"]),
        helper.make_tensor_value_info(contract.LOGITS_AT, TensorProto.INT64, ["logits"]),
    ]
    constants = [each for each in nodes.initializers if each.name in used]
    return as_model(
        helper.make_graph(
            nodes.nodes, "gpt2_ragged", inputs, outputs, [*initializers, *constants], value_info=graph.value_info
        )
    )


def _needed(nodes: list[NodeProto], wanted: set[str]) -> list[NodeProto]:
    """The nodes that some outputs depend on, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]
