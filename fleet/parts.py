"""Parts: so many requests of one input file that are carried out together, and the file that holds their results."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import pyarrow
from pyarrow import parquet
from ray.data.datasource import FileBasedDatasource

from ..runtime import jobs
from ..runtime.jsontext import to_line

Format = Literal["jsonl", "parquet"]
FORMATS: tuple[Format, ...] = ("jsonl", "parquet")

_NAME = re.compile(r"part-(\d{5,})-(\d{12,})\.(?:jsonl|parquet)")

_LOGPROB = pyarrow.struct(
    {
        "token_id": pyarrow.int32(),
        "logprob": pyarrow.float64(),
        "processed_logprob": pyarrow.float64(),
        "top": pyarrow.map_(pyarrow.int32(), pyarrow.float64()),
    }
)
_SEQUENCE = pyarrow.struct(
    {
        "text": pyarrow.string(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "finish_reason": pyarrow.string(),
        "logprobs": pyarrow.list_(_LOGPROB),
    }
)
# Of a result line, without `energy`, and with where in the input the request stands.
SCHEMA = pyarrow.schema(
    {
        "file": pyarrow.int64(),
        "index": pyarrow.int64(),
        "id": pyarrow.string(),
        "prompt": pyarrow.string(),
        "prompt_ids": pyarrow.list_(pyarrow.int32()),
        "sequences": pyarrow.list_(_SEQUENCE),
        "usage": pyarrow.struct({"prompt_tokens": pyarrow.int64(), "completion_tokens": pyarrow.int64()}),
        "seconds": pyarrow.float64(),
        "error": pyarrow.string(),
    }
)


class Part(NamedTuple):
    """Where a part begins.

    Attributes:
        file: number of its input file, in the order of their paths, from 0.
        first: number of its first request in that file, from 0; empty lines aren't counted.
    """

    file: int
    first: int

    def name(self, format: Format) -> str:  # noqa: A002
        """Its file of results. Sorted by name, such files are in the order of the requests."""
        return f"part-{self.file:05d}-{self.first:012d}.{format}"

    @classmethod
    def named(cls, name: str) -> "Part | None":
        """The part whose results a file of this name holds; None where it isn't one's."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(int(found[1]), int(found[2]))


class RequestFiles(FileBasedDatasource):
    """Ray Data's reader of files of requests: a block for each part, a row with its lines.

    Lines are those that Python's text files have, and bytes that aren't UTF-8 are replaced, as for a job on one machine.

    Args:
        paths: of the files, in their order.
        filesystem: that they lie in.
        size: requests of a part.
        done: parts that aren't read.
    """

    def __init__(self, paths: Sequence[str], filesystem: Any, size: int, done: Iterable[Part]) -> None:
        super().__init__(list(paths), filesystem=filesystem)
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._size = size
        self._done = frozenset(done)

    def _read_stream(self, f: Any, path: str) -> Iterator[pyarrow.Table]:
        lines = io.TextIOWrapper(f, encoding="utf-8", errors="replace")
        for part, requests in cut(lines, self._numbers[path], self._size):
            if part not in self._done:
                texts = pyarrow.array([requests], pyarrow.list_(pyarrow.large_string()))
                yield pyarrow.table({"file": [part.file], "first": [part.first], "lines": texts})


def cut(lines: Iterable[str], file: int, size: int) -> Iterator[tuple[Part, list[str]]]:
    """The parts of a file, of so many requests each, with their lines; empty ones are left out."""
    requests = filter(str.strip, lines)
    first = 0
    while some := list(islice(requests, size)):
        yield Part(file, first), some
        first += size


def encode(part: Part, records: Sequence[jobs.Record], format: Format) -> bytes:  # noqa: A002
    """The file of a part's results: result lines, or a Parquet table of SCHEMA."""
    if format == "jsonl":
        return "".join(to_line(record) + "\n" for record in records).encode()
    rows = [
        {"file": part.file, "index": index} | _clean({**record, "id": _name(record["id"])})
        for index, record in enumerate(records, part.first)
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _name(identity: Any) -> str | None:
    """An id as a column of texts holds it: a text as it is, anything else as JSON."""
    return identity if isinstance(identity, str) or identity is None else json.dumps(identity)


def _clean(value: Any) -> Any:
    """A value whose texts UTF-8 can hold: halves of surrogate pairs, which only JSON's escapes can write, are replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: list(map(tuple, inner)) if name == "top" else _clean(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_clean(inner) for inner in value]
    return value
