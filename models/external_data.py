"""Where an ONNX graph takes its weights from, read off the file without the onnx package.

Only the fields that lead to a tensor are entered; their numbers are those of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from collections.abc import Iterator, Mapping

from . import protobuf

_KEY, _VALUE = 1, 2  # StringStringEntryProto
_EXTERNAL = 13  # TensorProto.external_data
_LOCATION = "location"
_Fields = Mapping[int, str]
# Of each message: the fields that hold a message through which a tensor can be reached.
_WAYS: Mapping[str, _Fields] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_MOST_NESTED = 100  # protobuf's own limit


def locations(model: bytes) -> set[str]:
    """The locations of a model's external data, as its tensors give them: relative to the model's folder.

    Args:
        model: the content of a .onnx file.

    Raises:
        ValueError: it isn't a protobuf message.
    """
    tensors = (_entries(model, begin, end) for begin, end in _tensors(model))
    return {value for entries in tensors for key, value in entries if key == _LOCATION}


def _tensors(model: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each tensor that names a location."""
    pending = [("Model", 0, len(model), 0)]
    while pending:
        kind, begin, end, depth = pending.pop()
        if depth > _MOST_NESTED:
            raise ValueError("messages are nested too deep")
        if kind == "Tensor":
            yield begin, end
            continue
        ways = _WAYS[kind]
        for number, place in protobuf.fields(model, begin, end):
            # Most nodes have no tensor to look for.
            if (
                number in ways
                and isinstance(place, slice)
                and model.find(_LOCATION.encode(), place.start, place.stop) >= 0
            ):
                pending.append((ways[number], place.start, place.stop, depth + 1))


def _entries(model: bytes, begin: int, end: int) -> list[tuple[str, str]]:
    """Keys and values of the external data of the tensor that lies between two offsets."""
    entries = list[tuple[str, str]]()
    for number, place in protobuf.fields(model, begin, end):
        if number == _EXTERNAL and isinstance(place, slice):
            pair = {part: _text(values[-1]) for part, values in protobuf.messages(model[place]).items()}
            entries.append((pair.get(_KEY, ""), pair.get(_VALUE, "")))
    return entries


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
