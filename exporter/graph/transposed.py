"""The second graph of a network in fp32, for batches and several drafts.

It computes products the other way round: W^T [out, in] times x^T [in, rows], in place of x times W. ONNX Runtime reads the second
matrix of a product once for every twelve rows of the first. So here it reads the weights once, and not once for every twelve rows
of x. With AVX-512 products of 8, 16 and 32 rows are 1.1, 1.4 and 1.4 times as fast, of 128 as fast.

The transposed matrices aren't stored: a graph without inputs makes them. The output head's lies transposed in the first graph.
"""

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...models import contract
from .operators import Nodes
from .second_graph import assembled
from .weights import view

_STAYS_TRANSPOSED = ".mlp.c_fc"  # layers whose result goes through an activation function into the next product


def build(model: ModelProto) -> tuple[ModelProto, ModelProto]:
    """Writes the second graph, and the graph that makes its weights.

    Args:
        model: the fused graph in fp32, whose weights are external data.

    Returns:
        The second graph: the first one's inputs and outputs; the weights made for it are initializers without data.
        And the graph whose outputs they are: of each layer's matrix the transpose, float32 [out, in].
    """
    stored = {each.name: each for each in model.graph.initializer}
    products = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul"}
    second, making, made = Nodes(), Nodes(), list[ValueInfoProto]()
    axes = second.op("Shape", [contract.INPUT_IDS], "transposed.axes")
    transposed = set[str]()  # values [width, rows]
    for node in model.graph.node:
        if node.output[0] in products:
            continue  # comes with its bias
        if node.input[0] in products:
            product = products[node.input[0]]
            made.append(_make(making, stored[product.input[1]]))
            transposed |= _multiply(second, node, product, stored, transposed, axes)
        else:
            transposed |= _carry_on(second, node, transposed)
    return assembled(model, second, making, made)


def _make(making: Nodes, matrix: TensorProto) -> ValueInfoProto:
    """Appends the transpose of a matrix."""
    making.initializers.append(matrix)
    name = making.op("Transpose", [matrix.name], f"{matrix.name}.transposed", perm=[1, 0])
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, matrix.dims[::-1])


def _multiply(
    second: Nodes,
    addition: NodeProto,
    product: NodeProto,
    stored: Mapping[str, TensorProto],
    transposed: set[str],
    axes: str,
) -> set[str]:
    """Appends a layer: its product and the addition of its bias; returns the result if it stays transposed."""
    name, (x, weight) = addition.name, product.input
    inputs, outputs = stored[weight].dims
    bias = view(stored[addition.input[1]], f"{name}.bias.column", [outputs, 1])
    second.initializers.append(bias)
    rows = x if x in transposed else second.reshape(x, f"{name}.rows", -1, inputs)
    columns = name if name.endswith(_STAYS_TRANSPOSED) else f"{name}.columns"
    second.op("Gemm", [f"{weight}.transposed", rows, bias.name], columns, transB=int(x not in transposed))
    if columns == name:
        return {name}
    back = second.op("Transpose", [columns], f"{name}.back", perm=[1, 0])
    width = second.constant(f"{name}.outputs", np.array([outputs], np.int64))
    second.op("Reshape", [back, second.op("Concat", [axes, width], f"{name}.shape", axis=0)], name)
    return set()


def _carry_on(second: Nodes, node: NodeProto, transposed: set[str]) -> set[str]:
    """Appends another node; returns those of its results that are transposed."""
    if node.op_type == "Gemm":  # a part of the output head
        second.op("Gemm", node.input[::-1], node.name, transB=1)
    elif not transposed.intersection(node.input):
        second.nodes.append(node)
        return set()
    elif node.op_type == "Concat":  # of the head's parts
        second.op("Concat", node.input, node.name, axis=0)
    elif node.op_type == "Reshape":  # the logits
        back = second.op("Transpose", [node.input[0]], f"{node.name}.back", perm=[1, 0])
        second.op("Reshape", [back, node.input[1]], node.name)
        return set()
    else:  # an activation function works number by number
        second.nodes.append(node)
    return set(node.output)
