"""A second graph of the same network, for passes of many rows: prompts and batches.

MatMulNBits multiplies a single row as fast as its matrix can be read. Where many rows pass at once DynamicQuantizeMatMul
is up to twice as fast, on matrices of 8 bits with one scale for each output, and with one scale for all of its input.
Which layers bear that is chosen by what reaches them (`rounding`).

Those matrices aren't stored. A small graph makes them of the first graph's, block by block: a whole number times its
block's scale becomes a whole number times its output's. The runtime runs that before it opens the second graph.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
"""

import math
from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...models.bundle import WIDE_WEIGHTS
from .operators import MICROSOFT, Layer, Nodes, StoredMatrix, as_model
from .weights import view, without_data

_OPSET = 21  # the first with numbers of 4 bits
_LARGEST = 127
# So many rows of a matrix are made anew at a time: a buffer of their size is used again and again, and not asked for anew.
_ROWS = 3072
# Of an output whose weights are all 0.
_LEAST_STEP = 1e-30


def build(model: ModelProto, layers: Mapping[str, Layer]) -> tuple[ModelProto, ModelProto]:
    """Writes the second graph, and the one that makes its weights.

    Args:
        model: the first graph, whose weights are external data.
        layers: those to run in the other way, by their nodes' names.

    Returns:
        The second graph: the first one's inputs and outputs; the weights that are made for it are initializers
        without data. And a graph without inputs that has them as outputs: of each matrix the values, int8 [in, out],
        and the scales, float32 [out].
    """
    stored = {each.name: each for each in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    wide, making, made = Nodes(), Nodes(), list[ValueInfoProto]()
    for node in model.graph.node:
        if node.name in layers:
            _multiply(wide, node, layers[node.name])
            made += _make(making, layers[node.name].matrix, stored, makers)
        else:
            wide.nodes.append(node)
    used = {name for node in wide.nodes for name in node.input}
    kept = [each for each in model.graph.initializer if each.name in used]
    graph = helper.make_graph(
        wide.nodes, "gpt2_wide", model.graph.input, model.graph.output,
        [*kept, *wide.initializers, *(without_data(each, WIDE_WEIGHTS) for each in made)], value_info=model.graph.value_info,
    )  # fmt: skip
    weights = helper.make_graph(making.nodes, "wide_weights", [], made, making.initializers)
    return as_model(graph), as_model(weights, opset=_OPSET)


def _multiply(wide: Nodes, node: NodeProto, layer: Layer) -> None:
    """The layer's product, in place of its node."""
    name, (product,) = layer.matrix.name, node.output
    weights = [_columns(layer.matrix), _steps(layer.matrix)]
    kind, x, least = "DynamicQuantizeMatMul", node.input[0], layer.rounding.least
    if least is None:
        bias = ["", layer.bias] if layer.bias else []
        wide.op(kind, [x, *weights, *bias], node.name, domain=MICROSOFT, outputs=[product])
        return
    last = wide.constant(f"{name}.last_axis", np.array([-1], np.int64))
    greatest = wide.op("ReduceMax", [x, last], f"{name}.greatest", keepdims=1)
    row_scale = wide.op(
        "Max", [greatest, wide.constant(f"{name}.least", np.array(least, np.float32))], f"{name}.row_scale"
    )
    scaled = wide.op("Div", [x, row_scale], f"{name}.scaled")
    scaled = wide.op(kind, [scaled, *weights], f"{name}.scaled_product", domain=MICROSOFT)
    if not layer.bias:
        wide.op("Mul", [scaled, row_scale], node.name, outputs=[product])
        return
    rescaled = wide.op("Mul", [scaled, row_scale], f"{name}.rescaled")
    wide.op("Add", [rescaled, layer.bias], node.name, outputs=[product])


def _make(
    making: Nodes, matrix: StoredMatrix, stored: Mapping[str, TensorProto], makers: Mapping[str, NodeProto]
) -> list[ValueInfoProto]:
    """A matrix with one scale for each output, and these scales."""
    name, middle = matrix.name, 1 << (matrix.bits - 1)
    blocks = matrix.width // matrix.block_size

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
    step = making.op("Max", [step, making.constant(f"{name}.least", np.array(_LEAST_STEP, np.float32))], f"{name}.step")
    steps = making.op("Reshape", [step, whole_numbers("all", -1)], _steps(matrix))

    counts = [min(_ROWS, matrix.rows - first) for first in range(0, matrix.rows, _ROWS)]
    ratios = [f"{name}.ratio.{part}" for part in range(len(counts))]
    ratio = making.op("Div", [scales, step], f"{name}.ratio")
    making.op("Split", [ratio, whole_numbers("counts", *counts)], f"{name}.ratios", outputs=ratios, axis=0)
    parts = []
    for part, (count, ratio) in enumerate(zip(counts, ratios, strict=True)):
        this, (_, *row_shape) = f"{name}.{part}", stored[matrix.data].dims
        data = view(stored[matrix.data], f"{this}.data", [count, *row_shape], part * _ROWS * math.prod(row_shape))
        data.data_type = TensorProto.UINT4 if matrix.bits == 4 else TensorProto.UINT8
        # Each block as a row: of the forms that DequantizeLinear knows that with a scale for each row is the fastest.
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
        columns = _columns(matrix) if len(counts) == 1 else f"{this}.columns"
        parts.append(making.op("Transpose", [rows], columns, perm=[1, 0]))
    columns = parts[0] if len(parts) == 1 else making.op("Concat", parts, _columns(matrix), axis=1)
    return [
        helper.make_tensor_value_info(columns, TensorProto.INT8, [matrix.width, matrix.rows]),
        helper.make_tensor_value_info(steps, TensorProto.FLOAT, [matrix.rows]),
    ]


def _columns(matrix: StoredMatrix) -> str:
    return f"{matrix.name}.columns"


def _steps(matrix: StoredMatrix) -> str:
    return f"{matrix.name}.steps"
