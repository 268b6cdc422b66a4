"""Where an ONNX graph takes its weights from, and whether it can run without end, read off the file without the onnx package.

A protobuf message is a row of fields: a key (number and kind of the field), then its value. Only the fields that
lead to a tensor are entered; their numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from collections.abc import Iterator, Mapping

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
# Fields that hold programs: functions, and graphs that an operator runs as often as it likes.
_PROGRAMS: Mapping[str, _Fields] = {
    "Model": {20: "a training graph", 25: "functions"},
    "Attribute": {6: "loops or branches", 11: "loops or branches"},
}
_MOST_NESTED = 100  # protobuf's own limit
_LONGEST_NUMBER = 70  # bits


def locations(model: bytes) -> set[str]:
    """The locations of a model's external data, as its tensors give them: relative to the model's folder.

    Args:
        model: the content of a .onnx file.

    Raises:
        ValueError: it isn't a protobuf message.
    """
    tensors = (_entries(model, begin, end) for begin, end in _tensors(model))
    return {value for entries in tensors for key, value in entries if key == _LOCATION}


def program(model: bytes) -> str | None:
    """Which parts of a model may run as often as they like; None where every operator runs once.

    Args:
        model: the content of a .onnx file.

    Raises:
        ValueError: it isn't a protobuf message.
    """
    pending = [("Model", 0, len(model))]
    while pending:
        kind, begin, end = pending.pop()
        for number, first, last in _fields(model, begin, end):
            if found := _PROGRAMS.get(kind, {}).get(number):
                return found
            if (inner := _WAYS[kind].get(number)) in ("Graph", "Node", "Attribute"):
                pending.append((inner, first, last))
    return None


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
        for number, first, last in _fields(model, begin, end):
            # Most nodes have no tensor to look for.
            if number in ways and model.find(_LOCATION.encode(), first, last) >= 0:
                pending.append((ways[number], first, last, depth + 1))


def _entries(model: bytes, begin: int, end: int) -> list[tuple[str, str]]:
    """Keys and values of the external data of the tensor that lies between two offsets."""
    entries = list[tuple[str, str]]()
    for number, first, last in _fields(model, begin, end):
        if number == _EXTERNAL:
            pair = {part: _text(model[start:stop]) for part, start, stop in _fields(model, first, last)}
            entries.append((pair.get(_KEY, ""), pair.get(_VALUE, "")))
    return entries


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _fields(model: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields with a length in the message between two offsets: number, begin and end of each."""
    while begin < end:
        key, begin = _varint(model, begin, end)
        match key & 7:
            case 0:
                _, begin = _varint(model, begin, end)
            case 1:
                begin += 8
            case 2:
                size, begin = _varint(model, begin, end)
                if size <= end - begin:
                    yield key >> 3, begin, begin + size
                begin += size
            case 5:
                begin += 4
            case kind:
                raise ValueError(f"fields of kind {kind} are unknown")
        if begin > end:
            raise ValueError("it ends inside a field")


def _varint(model: bytes, begin: int, end: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and where the next field begins."""
    number = shift = 0
    while begin < end and shift < _LONGEST_NUMBER:
        byte = model[begin]
        number |= (byte & 127) << shift
        begin, shift = begin + 1, shift + 7
        if byte < 128:
            return number, begin
    raise ValueError("it ends inside a number")
