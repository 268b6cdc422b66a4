"""What a bundle's graph may hold, and where its weights are, read off the file before ONNX Runtime opens it.

While ONNX Runtime loads a graph, it computes all that depends on constants alone, and Ctrl-C doesn't stop it. So a graph may
hold only what exported graphs hold: listed operators and attributes, no subgraphs but the branches of If, and no result of
constants that is larger than these are. What operators make of tokens later isn't limited here.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import limits, protobuf
from .messages import shown

_DOMAINS = frozenset({b"", b"ai.onnx", b"com.microsoft"})
# Of fused and of portable graphs.
_OPERATORS = frozenset(
    b"Abs Add And Cast Clip Concat Constant ConstantOfShape DequantizeLinear Div DynamicQuantizeMatMul Equal Erf Exp Expand"
    b" FastGelu Flatten Gather GatherBlockQuantized Gelu Gemm Greater GreaterOrEqual GroupQueryAttention HardSigmoid HardSwish"
    b" Identity If LayerNormalization LeakyRelu Less LessOrEqual Log MatMul MatMulNBits Max Min Mish Mul Neg Not Or Pad Pow"
    b" QuantizeLinear QuickGelu Range ReduceMax ReduceMean ReduceSum Relu Reshape Shape Sigmoid Sign Size Slice"
    b" Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Transpose Trilu Unsqueeze Where".split()
)
_ATTRIBUTES = frozenset(
    b"K N accuracy_level allowzero alpha approximate axis beta bits block_size do_rotary else_branch end epsilon gather_axis"
    b" k_quant_type keepdims kv_cache_bit_width kv_num_heads num_heads num_outputs perm quantize_axis saturate scale start"
    b" stash_type then_branch to transA transB upper v_quant_type value".split()
)
# Operators that exported graphs apply to constants alone: they make no more numbers than they take, or as many as a constant says.
_OF_CONSTANTS = frozenset({b"Cast", b"ConstantOfShape", b"Neg"})
# Operators that make as many numbers as an input says, and which input. It may also come from the inputs' shapes.
_SIZES = {b"ConstantOfShape": 0, b"Expand": 1, b"Pad": 1}

# Fields of ONNX' messages: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 2, 5, 11, 12, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_TENSOR, _ATTRIBUTE_PROGRAM, _ATTRIBUTE_PROGRAMS = 1, 5, 6, 11
_ATTRIBUTE_TYPE, _ATTRIBUTE_TENSORS = 20, (10, 22, 23)
_TYPE_TENSOR = 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_INT64S, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 7, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_INT64 = 7
_POSITIONS = b"wpe.weight"  # in the name of the table of positions


class NotExportedError(Exception):
    """A graph holds what no exported graph has: its message says what."""


@dataclass
class _Graph:
    """A model's graph: its nodes in order, and what is known before the first of them.

    Attributes:
        nodes: each by its fields of texts and messages.
        constants: initializers and results of Constant, by name; None where only the place of the data is known.
        inputs: names.
        locations: files that weights are in, relative to the graph's folder.
    """

    nodes: list[dict[int, list[bytes]]] = field(default_factory=list)
    constants: dict[bytes, memoryview] = field(default_factory=dict)
    inputs: set[bytes] = field(default_factory=set)
    locations: set[str] = field(default_factory=set)


def check(model: bytes, positions: int, *, makes_weights: bool = False) -> set[str]:
    """Refuses a graph that holds what no exported graph has.

    Args:
        model: the content of a .onnx file.
        positions: rows of the table of positions.
        makes_weights: whether it is the graph that computes weights of weights, which isn't computed while it is opened.

    Returns:
        The files that it takes weights from, relative to its own folder.

    Raises:
        NotExportedError: it holds such a thing.
        ValueError: it isn't a protobuf message.
    """
    graph = _read(model)
    _check_positions(graph, positions)
    known = {b"", *graph.inputs, *graph.constants}
    _Nodes(graph, folds=not makes_weights).check(graph.nodes, known, branches=True)
    return graph.locations


def _read(model: bytes) -> _Graph:
    graph, view = _Graph(), memoryview(model)
    for kind, place in protobuf.fields(model, 0, len(model)):
        if kind in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise NotExportedError("a training graph" if kind == _MODEL_TRAINING else "functions")
        if kind != _MODEL_GRAPH or not isinstance(place, slice):
            continue
        for number, part in protobuf.fields(model, place.start, place.stop):
            if number == _GRAPH_SPARSE:
                raise NotExportedError("sparse tensors")
            if not isinstance(part, slice):
                continue
            if number == _GRAPH_NODE:
                graph.nodes.append(protobuf.messages(model[part]))
            elif number == _GRAPH_INITIALIZER:
                graph.constants[_name(view[part], _TENSOR_NAME)] = view[part]
                graph.locations |= _locations(model[part])
            elif number == _GRAPH_INPUT:
                graph.inputs.add(_name(view[part], 1))
    return graph


def _check_positions(graph: _Graph, positions: int) -> None:
    for name, tensor in graph.constants.items():
        if _POSITIONS in name and (rows := next(_integers(tensor, _TENSOR_DIMS), 0)) != positions:
            raise NotExportedError(f"{rows:,} positions where config.json says {positions:,}")


class _Nodes:
    """Checks nodes in their order.

    Args:
        graph: their graph.
        folds: whether ONNX Runtime computes what depends on constants alone.
    """

    def __init__(self, graph: _Graph, *, folds: bool) -> None:
        self._graph, self._folds = graph, folds
        self._names = {*graph.inputs, *graph.constants}
        self._constant, self._taken = {b"", *graph.constants}, set[bytes]()

    def check(self, nodes: list[dict[int, list[bytes]]], known: set[bytes], *, branches: bool) -> None:
        """Checks the nodes of the graph, or of a branch, which has no branches itself.

        Args:
            known: names that they may refer to; those of their results join it.
            branches: whether they may have some.
        """
        graph = self._graph
        for node in nodes:
            operator = _last(node, _NODE_OPERATOR)
            inputs, outputs = node.get(_NODE_INPUT, []), node.get(_NODE_OUTPUT, [])
            if operator not in _OPERATORS or _last(node, _NODE_DOMAIN) not in _DOMAINS:
                raise NotExportedError(f"the operator {_shown(operator)}")
            if operator == b"Constant" and not branches:
                raise NotExportedError("a constant in a branch")
            if not known.issuperset(inputs):
                raise NotExportedError("operators in another order")
            for attribute in node.get(_NODE_ATTRIBUTE, []):
                for branch in _check_attribute(graph, attribute):
                    if operator != b"If" or not branches:
                        raise NotExportedError("loops, or branches in branches")
                    self.check(_nodes_of(branch), known.copy(), branches=False)
            if operator in _SIZES:
                _check_size(graph, operator, inputs)
            if operator == b"Constant":
                graph.constants |= dict.fromkeys(outputs, _value(node))
                self._constant.update(outputs)
            elif self._constant.issuperset(inputs):
                # Each constant goes into at most one, so that all of them together take no more memory than the file.
                if self._folds and (operator not in _OF_CONSTANTS or self._taken.intersection(inputs)):
                    raise NotExportedError(f"{_shown(operator)} of constants")
                self._constant.update(outputs)
                self._taken.update(inputs, outputs)
            results = {name for name in outputs if name}
            if len(results) < sum(map(bool, outputs)) or not self._names.isdisjoint(results):
                raise NotExportedError("a name twice")
            self._names |= results
            known |= results


def _nodes_of(branch: bytes) -> list[dict[int, list[bytes]]]:
    """The nodes of a branch, which has neither inputs nor weights of its own."""
    nodes = []
    for number, place in protobuf.fields(branch, 0, len(branch)):
        if number == _GRAPH_NODE and isinstance(place, slice):
            nodes.append(protobuf.messages(branch[place]))
        elif number not in (_GRAPH_NAME, _GRAPH_OUTPUT):
            raise NotExportedError("more in a branch than operators and results")
    return nodes


def _check_attribute(graph: _Graph, attribute: bytes) -> list[bytes]:
    """Refuses an attribute that no exported graph has; returns the branches that it holds."""
    branches = []
    for number, place in protobuf.fields(attribute, 0, len(attribute)):
        if number == _ATTRIBUTE_PROGRAMS:
            raise NotExportedError("several programs in an attribute")
        if number in _ATTRIBUTE_TENSORS:
            raise NotExportedError("several or sparse tensors in an attribute")
        if number == _ATTRIBUTE_PROGRAM and isinstance(place, slice):
            branches.append(attribute[place])
        if number == _ATTRIBUTE_NAME and isinstance(place, slice) and attribute[place] not in _ATTRIBUTES:
            raise NotExportedError(f"the attribute {_shown(attribute[place])}")
        if number == _ATTRIBUTE_TENSOR and isinstance(place, slice):
            graph.locations |= _locations(attribute[place])
    return branches


def _check_size(graph: _Graph, operator: bytes, inputs: list[bytes]) -> None:
    """Refuses a constant that asks for more numbers than there may be."""
    name = inputs[_SIZES[operator]] if _SIZES[operator] < len(inputs) else b""
    if name not in graph.constants:
        return
    numbers = _whole_numbers(graph.constants[name])
    if numbers is None or math.prod(each for each in numbers if each > 1) > limits.CONSTANT:
        raise NotExportedError(f"{_shown(operator)} to more than {limits.CONSTANT:,} numbers")


def _whole_numbers(tensor: memoryview) -> list[int] | None:
    """The int64 numbers of a tensor; None where the file doesn't hold them, or holds others."""
    found = list(_integers(tensor, _TENSOR_INT64S))
    count = math.prod(_integers(tensor, _TENSOR_DIMS))
    if list(_integers(tensor, _TENSOR_TYPE))[-1:] != [_INT64]:
        return None
    for number, place in protobuf.fields(tensor, 0, len(tensor)):
        if number == _TENSOR_RAW and isinstance(place, slice):
            raw = bytes(tensor[place])
            found += [each for (each,) in struct.iter_unpack("<q", raw[: len(raw) // 8 * 8])]
    return found if len(found) == count else None


def _locations(tensor: bytes) -> set[str]:
    """The files that a tensor's external data names; none where its numbers are in the graph."""
    if b"location" not in tensor:
        return set()
    entries = map(protobuf.messages, protobuf.messages(tensor).get(_TENSOR_EXTERNAL, ()))
    found = (_last(entry, _ENTRY_VALUE) for entry in entries if _last(entry, _ENTRY_KEY) == b"location")
    return {name.decode("utf-8", "surrogateescape") for name in found}


def _integers(message: memoryview, number: int) -> Iterator[int]:
    """A repeated field of whole numbers, packed or not."""
    for found, place in protobuf.fields(message, 0, len(message)):
        if found != number:
            continue
        if not isinstance(place, slice):
            yield _signed(place)
            continue
        begin = place.start
        while begin < place.stop:
            value, begin = protobuf.varint(message, begin, place.stop)
            yield _signed(value)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _value(node: dict[int, list[bytes]]) -> memoryview:
    """The tensor of a Constant, which has nothing else that ONNX Runtime could take in its place."""
    tensors = []
    for attribute in node.get(_NODE_ATTRIBUTE, []):
        for number, place in protobuf.fields(attribute, 0, len(attribute)):
            if number == _ATTRIBUTE_TENSOR and isinstance(place, slice):
                tensors.append(attribute[place])
            elif (number, place) != (_ATTRIBUTE_TYPE, _TYPE_TENSOR) and number != _ATTRIBUTE_NAME:
                raise NotExportedError("a constant that isn't a tensor")
    if len(tensors) != 1:
        raise NotExportedError("a constant of none or several tensors")
    return memoryview(tensors[0])


def _name(message: memoryview, number: int) -> bytes:
    """The last of a message's texts with this number."""
    name = b""
    for found, place in protobuf.fields(message, 0, len(message)):
        if found == number and isinstance(place, slice):
            name = bytes(message[place])
    return name


def _last(node: dict[int, list[bytes]], number: int) -> bytes:
    return node.get(number, [b""])[-1]


def _shown(name: bytes) -> str:
    return shown(name.decode("utf-8", "replace"))
