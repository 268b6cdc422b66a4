"""The graph of a bundle whose weights are unpacked to float32 when it is loaded, for runtimes without kernels for the packed ones.

ONNX Runtime's WebAssembly build has none for MatMulNBits: it unpacks a matrix in every pass, before it multiplies. Here
DequantizeLinear unpacks it, which ONNX Runtime computes once where the session's entry `session.disable_quant_qdq` is 1. Weights
in float16 are cast, since the CPU has no float16 kernels there either. The file of weights stays as it is.
"""

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from .operators import MICROSOFT, Nodes, StoredMatrix, as_model

_OPSET = 21  # the first whose DequantizeLinear takes blocks and numbers of 4 bits


def build(model: ModelProto) -> ModelProto:
    """Writes the same network in float32.

    Args:
        model: a bundle's fused graph, whose weights are external data.
    """
    stored = {each.name: each for each in model.graph.initializer}
    unpacked = Nodes()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            _multiply(unpacked, node, stored)
        else:
            unpacked.nodes.append(node)
    used = {name for node in unpacked.nodes for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used] + unpacked.initializers
    casts, weights = _in_float32(kept, unpacked.nodes)
    graph = helper.make_graph(
        casts + unpacked.nodes, "gpt2_unpacked", model.graph.input, model.graph.output, weights,
        value_info=model.graph.value_info,
    )  # fmt: skip
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return as_model(graph, opset=_OPSET)


def _multiply(unpacked: Nodes, node: NodeProto, stored: Mapping[str, TensorProto]) -> None:
    """Appends the product with the unpacked matrix, in place of the node."""
    matrix = StoredMatrix.of(node)
    rows, width, bits, block_size = matrix.rows, matrix.width, matrix.bits, matrix.block_size
    bias = node.input[5] if len(node.input) > 5 else ""
    x, name, blocks = node.input[0], node.name, -(-width // block_size)

    packed = TensorProto()
    packed.CopyFrom(stored[matrix.data])
    packed.name, packed.dims[:] = f"{name}.packed", [rows, blocks * block_size]
    packed.data_type = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    unpacked.initializers.append(packed)
    scales = unpacked.reshape(matrix.scales, f"{name}.scales_by_row", rows, blocks)
    middle = unpacked.op("Expand", [
        unpacked.constant(f"{name}.middle", np.array(1 << (bits - 1), np.uint8)),
        unpacked.constant(f"{name}.scales_shape", np.array([rows, blocks], np.int64)),
    ], f"{name}.middles")  # fmt: skip
    if bits == 4:
        middle = unpacked.op("Cast", [middle], f"{name}.middles_of_4_bits", to=TensorProto.UINT4)
    whole = unpacked.op(
        "DequantizeLinear", [packed.name, scales, middle], f"{name}.matrix", axis=1, block_size=block_size
    )
    if width % block_size:
        whole = unpacked.first(whole, f"{name}.matrix.unpadded", width)
    # MatMul wants [in, out]: a Transpose would be computed at loading, too, while both matrices are in memory.
    kind, outputs = "FusedMatMul", [node.output[0]]
    if not bias:
        unpacked.op(kind, [x, whole], name, domain=MICROSOFT, outputs=outputs, transB=1)
        return
    product = unpacked.op(kind, [x, whole], f"{name}.product", domain=MICROSOFT, transB=1)
    unpacked.op("Add", [product, bias], name, outputs=outputs)


def _in_float32(stored: list[TensorProto], nodes: list[NodeProto]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Casts of the weights in float16, and all weights; those that a node casts already keep their name."""
    cast_already = {node.input[0] for node in nodes if node.op_type == "Cast"}
    casts, weights = [], []
    for tensor in stored:
        if tensor.data_type == TensorProto.FLOAT16 and tensor.name not in cast_already:
            half = TensorProto()
            half.CopyFrom(tensor)
            half.name = f"{tensor.name}.float16"
            casts.append(helper.make_node("Cast", [half.name], [tensor.name], name=half.name, to=TensorProto.FLOAT))
            tensor = half
        weights.append(tensor)
    return casts, weights
