"""Small ONNX graphs written by hand, as the onnx package isn't there where models run.

A protobuf message is a row of fields: a key (number and kind of the field), then its value. The numbers are those of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Old ones, whose operators every provider has.
_IR_VERSION, _OPSET = 7, 13
_ELEMENT_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(np.float16): 10}

_Value = tuple[str, npt.DTypeLike, int]


def identity() -> bytes:
    """A graph that gives back its input: float32 x [n] -> y [n]."""
    return _model([("Identity", ["x"], "y", {})], [("x", np.float32, 1)], ("y", np.float32, 1))


def rearrangement(dtype: npt.DTypeLike) -> bytes:
    """A graph that chooses rows anew and lengthens each: data [a, old rows, b, c], rows [new rows], pads [8] -> moved."""
    nodes = [
        ("Gather", ["data", "rows"], "chosen", {"axis": 1}),
        ("Pad", ["chosen", "pads"], "moved", {}),
    ]
    inputs: list[_Value] = [("data", dtype, 4), ("rows", np.int64, 1), ("pads", np.int64, 1)]
    return _model(nodes, inputs, ("moved", dtype, 4))


def with_weights(count: int) -> bytes:
    """A graph that adds weights [count], which the caller has to give, to its input: float32 x [count] -> sums [count]."""
    weights = _external("weights", count)
    return _model([("Add", ["x", "weights"], "sums", {})], [("x", np.float32, 1)], ("sums", np.float32, 1), weights)


def _model(
    nodes: Sequence[tuple[str, list[str], str, dict[str, int]]],
    inputs: Sequence[_Value],
    output: _Value,
    initializer: bytes = b"",
) -> bytes:
    graph = b"".join(_field(1, _node(*node)) for node in nodes) + _field(2, b"helper")
    if initializer:
        graph += _field(5, initializer)
    graph += b"".join(_field(11, _value_info(*value)) for value in inputs) + _field(12, _value_info(*output))
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def _node(kind: str, inputs: list[str], output: str, attributes: dict[str, int]) -> bytes:
    encoded = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    encoded += _field(3, output.encode()) + _field(4, kind.encode())
    for name, number in attributes.items():
        encoded += _field(5, _field(1, name.encode()) + _field(3, number) + _field(20, 2))  # 2: an integer
    return encoded


def _external(name: str, count: int) -> bytes:
    """An initializer of `count` numbers in float32, whose data is external."""
    location = _field(1, b"location") + _field(2, b"nowhere")
    tensor = _field(1, count) + _field(2, _ELEMENT_TYPES[np.dtype(np.float32)]) + _field(8, name.encode())
    return tensor + _field(13, location) + _field(14, 1)  # 1: external


def _value_info(name: str, dtype: npt.DTypeLike, rank: int) -> bytes:
    shape = b"".join(_field(1, _field(2, f"{name}.{axis}".encode())) for axis in range(rank))
    tensor = _field(1, _ELEMENT_TYPES[np.dtype(dtype)]) + _field(2, shape)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
