"""The second graph of a quantised network, for passes of many rows: prefill and batches.

MatMulNBits multiplies a single row as fast as its matrix can be read. On many rows DynamicQuantizeMatMul is up to twice as
fast: its weights have 8 bits and one scale for each output, its input is quantised per tensor.

Its matrices aren't stored. A graph without inputs makes them from the first graph's blocks: value times the block's scale
becomes value times the output's scale. The runtime runs it before it opens the second graph.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...models import contract
from ...models.bundle import SECOND_GRAPH_WEIGHTS
from .input_rounding import PerTensor
from .operators import MICROSOFT, Nodes, StoredMatrix, as_model
from .weights import view, without_data

# Passes of narrower networks are short in any case.
MIN_WIDTH = 512

_OPSET = 21  # the first with numbers of 4 bits
_LARGEST = 127
_ROWS_AT_ONCE = 3072  # of a matrix, so that buffers of this size are reused instead of allocated anew
_MIN_STEP = 1e-30  # for an output whose weights are all 0


def build(model: ModelProto, layers: Mapping[str, PerTensor]) -> tuple[ModelProto, ModelProto]:
    """Writes the second graph, and the graph that makes its weights.

    Args:
        model: the first graph, whose weights are external data.
        layers: how the layers that change quantise their input, by name.

    Returns:
        The second graph: the first one's inputs and outputs; the weights made for it are initializers without data.
        And the graph whose outputs they are: of each matrix the values, int8 [in, out], and the scales, float32 [out].
    """
    stored = {each.name: each for each in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    second, making, made = Nodes(), Nodes(), list[ValueInfoProto]()
    for node in model.graph.node:
        layer = "lm_head" if node.name == contract.LOGITS else node.name.removesuffix(".matmul")
        if node.op_type == "MatMulNBits" and layer in layers:
            _multiply(second, node, layer, layers[layer])
            made += _make(making, node, layer, stored, makers)
        else:
            second.nodes.append(node)
    return assembled(model, second, making, made)


def assembled(
    model: ModelProto, second: Nodes, making: Nodes, made: Sequence[ValueInfoProto]
) -> tuple[ModelProto, ModelProto]:
    """The second graph, and the graph that makes its weights.

    Args:
        model: the first graph, with the same inputs and outputs.
        second: nodes of the second graph.
        making: nodes that make weights for it.
        made: these weights.
    """
    used = {name for node in second.nodes for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used]
    graph = helper.make_graph(
        second.nodes, "gpt2_second_graph", model.graph.input, model.graph.output,
        [*kept, *second.initializers, *(without_data(each, SECOND_GRAPH_WEIGHTS) for each in made)],
        value_info=model.graph.value_info,
    )  # fmt: skip
    weights = helper.make_graph(making.nodes, "second_graph_weights", [], made, making.initializers)
    return as_model(graph), as_model(weights, opset=_OPSET)


def _multiply(second: Nodes, node: NodeProto, name: str, rounding: PerTensor) -> None:
    """Appends the layer's product, in place of its node."""
    product, x, bias = node.output[0], node.input[0], node.input[5] if len(node.input) > 5 else ""
    kind, weights = "DynamicQuantizeMatMul", [f"{name}.columns", f"{name}.steps"]
    if rounding.min_row_scale is None:
        inputs = [x, *weights, "", bias] if bias else [x, *weights]
        second.op(kind, inputs, node.name, domain=MICROSOFT, outputs=[product])
        return
    last = second.constant(f"{name}.last_axis", np.array([-1], np.int64))
    greatest = second.op("ReduceMax", [x, last], f"{name}.greatest", keepdims=1)
    least = second.constant(f"{name}.least", np.array(rounding.min_row_scale, np.float32))
    row_scale = second.op("Max", [greatest, least], f"{name}.row_scale")
    scaled = second.op("Div", [x, row_scale], f"{name}.scaled")
    scaled = second.op(kind, [scaled, *weights], f"{name}.scaled_product", domain=MICROSOFT)
    if not bias:
        second.op("Mul", [scaled, row_scale], node.name, outputs=[product])
        return
    rescaled = second.op("Mul", [scaled, row_scale], f"{name}.rescaled")
    second.op("Add", [rescaled, bias], node.name, outputs=[product])


def _make(
    making: Nodes, node: NodeProto, name: str, stored: Mapping[str, TensorProto], makers: Mapping[str, NodeProto]
) -> list[ValueInfoProto]:
    """Appends a matrix with one scale for each output, and these scales.

    Args:
        node: the first graph's product with that matrix.
        stored: the first graph's initializers.
        makers: the first graph's nodes by their outputs.
    """
    matrix = StoredMatrix.of(node)
    middle, blocks = 1 << (matrix.bits - 1), matrix.width // matrix.block_size

    def whole_numbers(suffix: str, *values: int) -> str:
        return making.constant(f"{name}.{suffix}", np.array(values, np.int64))

    if cast := makers.get(matrix.scales):
        making.nodes.append(cast)
    making.initializers.append(stored[cast.input[0] if cast else matrix.scales])
    scales = making.op("Reshape", [matrix.scales, whole_numbers("rows", matrix.rows, blocks)], f"{name}.scales_by_row")
    largest = making.op("Abs", [scales], f"{name}.size_of_scales")
    largest = making.op("ReduceMax", [largest, whole_numbers("axis_1", 1)], f"{name}.largest_scale", keepdims=1)
    share = making.constant(f"{name}.share", np.array(middle / _LARGEST, np.float32))
    step = making.op("Mul", [largest, share], f"{name}.largest_step")
    step = making.op("Max", [step, making.constant(f"{name}.least", np.array(_MIN_STEP, np.float32))], f"{name}.step")
    steps = making.op("Reshape", [step, whole_numbers("all", -1)], f"{name}.steps")

    counts = [min(_ROWS_AT_ONCE, matrix.rows - first) for first in range(0, matrix.rows, _ROWS_AT_ONCE)]
    ratios = [f"{name}.ratio.{part}" for part in range(len(counts))]
    ratio = making.op("Div", [scales, step], f"{name}.ratio")
    making.op("Split", [ratio, whole_numbers("counts", *counts)], f"{name}.ratios", outputs=ratios, axis=0)
    parts = []
    for part, (count, ratio) in enumerate(zip(counts, ratios, strict=True)):
        this, (_, *row_shape) = f"{name}.{part}", stored[matrix.data].dims
        data = view(
            stored[matrix.data], f"{this}.data", [count, *row_shape], part * _ROWS_AT_ONCE * math.prod(row_shape)
        )
        data.data_type = TensorProto.UINT4 if matrix.bits == 4 else TensorProto.UINT8
        # Each block as a row: DequantizeLinear is fastest with a scale for each row.
        data.dims[:] = [count * blocks, matrix.block_size]
        making.initializers.append(data)
        ratio = making.op("Reshape", [ratio, f"{name}.all"], f"{this}.ratio_by_block")
        middles = making.constant(f"{this}.middle", np.array(middle, np.uint8))
        middles = making.op("Expand", [middles, whole_numbers(f"{part}.blocks", count * blocks)], f"{this}.middles")
        if matrix.bits == 4:
            middles = making.op("Cast", [middles], f"{this}.middles_of_4_bits", to=TensorProto.UINT4)
        values = making.op("DequantizeLinear", [data.name, ratio, middles], f"{this}.values", axis=0)
        one = making.constant(f"{this}.one", np.array(1, np.float32))
        zero = making.constant(f"{this}.zero", np.array(0, np.int8))
        values = making.op("QuantizeLinear", [values, one, zero], f"{this}.rounded")
        rows = making.op("Reshape", [values, whole_numbers(f"{part}.shape", count, matrix.width)], f"{this}.rows")
        columns = f"{name}.columns" if len(counts) == 1 else f"{this}.columns"
        parts.append(making.op("Transpose", [rows], columns, perm=[1, 0]))
    columns = parts[0] if len(parts) == 1 else making.op("Concat", parts, f"{name}.columns", axis=1)
    return [
        helper.make_tensor_value_info(columns, TensorProto.INT8, [matrix.width, matrix.rows]),
        helper.make_tensor_value_info(steps, TensorProto.FLOAT, [matrix.rows]),
    ]
