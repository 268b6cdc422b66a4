"""What the fuzz tests share: how long they run, damage to a file's bytes, and what counts as a good end.

GPT2ONNX_FUZZ=N tries N inputs for each test instead of a few, other ones in every run; `make fuzz` does.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
from hypothesis import strategies as st

from gpt2onnx.errors import Gpt2OnnxError

ASKED = os.environ.get("GPT2ONNX_FUZZ")
SECONDS = 20  # that no input may take

Result = TypeVar("Result")


def inputs(few: int) -> hypothesis.settings:
    """A few inputs, always the same ones, or the number that was asked for."""
    return hypothesis.settings(
        max_examples=int(ASKED) if ASKED else few,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )


def ends_well(action: Callable[[], Result]) -> Result | str:
    """The action's result, or the one clear line that it ended with; whatever else it raises is a bug."""
    begin = time.process_time()  # of this process alone: others may be busy
    try:
        result: Result | str = action()
    except Gpt2OnnxError as error:
        message = str(error)
        assert message, "an error without a message"
        assert "\n" not in message, message
        assert len(message) < 3000, message[:3000]
        result = message
    took = time.process_time() - begin
    assert took < SECONDS, f"it took {took:.0f} s"
    return result


# Numbers that are often a limit somewhere, as a file may hold them.
_ODD_BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [
            b"\0" * 8,
            b"\xff" * 8,
            b"\x7f\xff\xff\xff",
            b"\xff\xff\xff\x7f",
            b"-1",
            b"1e999",
            b"NaN",
            b"[" * 300,
            b"\n",
            b'"',
            b"\\ud800",
        ]
    ),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content of a file with a few of its bytes overwritten, taken out, put in, or all cut off behind one."""
    broken = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place, odd = draw(st.integers(0, max(0, len(broken) - 1))), draw(_ODD_BYTES)
        match draw(st.sampled_from(["overwrite", "overwrite", "insert", "remove", "repeat", "cut"])):
            case "overwrite":
                broken[place : place + len(odd)] = odd
            case "insert":
                broken[place:place] = odd
            case "remove":
                del broken[place : place + len(odd)]
            case "repeat":
                broken[place:place] = broken[place : place + draw(st.integers(1, 200))]
            case "cut":
                del broken[place:]
    return bytes(broken)


# What may stand where a file should hold something else.
odd_values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([0, -1, 2**31, 2**53, 2**63, -(2**63), 10**18, 10**400]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["", "\0", "\ud800", "gpt2", "../../etc/passwd", "x" * 5000, "<|endoftext|>"]),
    st.lists(st.one_of(st.integers(-1, 300), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.none(), st.text(max_size=3)), max_size=3),
)


def write_json(path: Path, content: object) -> None:
    """Python's JSON, which also writes NaN, and half of a surrogate pair as an escape."""
    path.write_text(json.dumps(content), encoding="utf-8")
