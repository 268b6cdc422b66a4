"""Part: consecutive requests of one input file, and the file of their results."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import pyarrow
from pyarrow import parquet

from gpt2onnx.errors import PromptError

from ..runtime import jobs
from ..runtime.jsontext import to_line

Format = Literal["jsonl", "parquet"]

_NAME = re.compile(r"part-(\d{5,})-(\d{12,})\.(?:jsonl|parquet)")

_LOGPROB = pyarrow.struct(
    {
        "token_id": pyarrow.int32(),
        "logprob": pyarrow.float64(),
        "rank": pyarrow.int64(),
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
        "score": pyarrow.float64(),
    }
)
# A result line without `energy`, and the request's place in the input.
SCHEMA = pyarrow.schema(
    {
        "file": pyarrow.int64(),
        "index": pyarrow.int64(),
        "id": pyarrow.string(),
        "prompt": pyarrow.string(),
        "prompt_ids": pyarrow.list_(pyarrow.int32()),
        "sequences": pyarrow.list_(_SEQUENCE),
        "seed": pyarrow.uint64(),
        "request_hash": pyarrow.string(),
        "usage": pyarrow.struct({"prompt_tokens": pyarrow.int64(), "completion_tokens": pyarrow.int64()}),
        "seconds": pyarrow.float64(),
        "error": pyarrow.string(),
    }
)


class Part(NamedTuple):
    """Place of a part in the input.

    Attributes:
        file: number of its input file, sorted by path, from 0.
        first: number of its first request in that file, from 0; empty lines don't count.
    """

    file: int
    first: int

    def __str__(self) -> str:
        return f"part-{self.file:05d}-{self.first:012d}"

    def name(self, format: Format) -> str:  # noqa: A002
        """Name of its results' file. Sorted by name, files are in the order of the requests."""
        return f"{self}.{format}"

    @classmethod
    def named(cls, name: str) -> "Part | None":
        """Reads a part from its file's name; None for other files."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(int(found[1]), int(found[2]))


def cut(lines: Iterable[str | PromptError], file: int, size: int) -> Iterator[tuple[Part, list[str | PromptError]]]:
    """Cuts the lines of a file into parts of `size`."""
    requests = iter(lines)
    first = 0
    while batch := list(islice(requests, size)):
        yield Part(file, first), batch
        first += size


def encode(part: Part, records: Sequence[jobs.Record], format: Format) -> bytes:  # noqa: A002
    """Encodes a part's results: JSON lines, or a Parquet table of SCHEMA."""
    if format == "jsonl":
        return "".join(to_line(record) + "\n" for record in records).encode()
    rows = [
        {"file": part.file, "index": index} | _clean({**record, "id": _name(record["id"])} | _small_seed(record))
        for index, record in enumerate(records, part.first)
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _name(identity: Any) -> str | None:
    """An id in a text column: a text as it is, anything else as JSON."""
    return identity if isinstance(identity, str) or identity is None else json.dumps(identity)


def _small_seed(record: jobs.Record) -> jobs.Record:
    """The seed as it fits into its column; draws are the same, since seeds count modulo 2**32."""
    return {"seed": record["seed"] % 2**64} if record.get("seed") else {}


def _clean(value: Any) -> Any:
    """Replaces lone surrogates, which JSON can escape and UTF-8 can't hold; log probabilities become pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: list(map(tuple, inner)) if name == "top" else _clean(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_clean(inner) for inner in value]
    return value
