"""Large checkpoints of other programs, written straight to disk: a test shouldn't hold all their numbers either."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import gguf
import google_crc32c
import numpy as np

Shapes = dict[str, tuple[int, ...]]
_MAGIC, _FOOTER = 0xDB4775248B80FB57, 48
_PLACES = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_GGUF = _PLACES | {"ln_1": "attn_norm", "ln_2": "ffn_norm", "ln_f": "output_norm", "wte": "token_embd", "wpe": "position_embd"}  # fmt: skip


def write_tensorflow(folder: Path, shapes: Shapes, random: np.ndarray, heads: int) -> None:
    """OpenAI's files: model.ckpt.index, model.ckpt.data-00000-of-00001 and hparams.json. The numbers are drawn from `random`.

    https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/tensor_bundle/tensor_bundle.cc
    """
    entries, offset = [(b"", b"\x08\x01\x1a\x02\x08\x01")], 0
    stored = {_openai(name): (1, *shape) if _is_matrix(name) else shape for name, shape in shapes.items()}
    with (folder / "model.ckpt.data-00000-of-00001").open("wb") as file:
        for name in sorted(stored):
            crc = 0
            for part in _parts(math.prod(stored[name]), random):
                content = part.tobytes()
                file.write(content)
                crc = google_crc32c.extend(crc, content)
            size = 4 * math.prod(stored[name])
            shape = b"".join(_field(2, b"\x08" + _varint(length)) for length in stored[name])
            entry = b"\x08\x01" + _field(2, shape) + b"\x20" + _varint(offset) + b"\x28" + _varint(size)
            entries.append((name.encode(), entry + b"\x35" + _masked(crc)))
            offset += size
    block = _block(entries)
    last = _block([(b"\xff", _varint(0) + _varint(len(block) - 5))])
    empty = _block([])
    handles = b"".join(
        map(_varint, (len(block) + len(last), len(empty) - 5, len(block), len(last) - 5))
    )  # places of a block of metadata, which is empty, and of the block that names the first
    footer = handles.ljust(_FOOTER - 8, b"\0") + _MAGIC.to_bytes(8, "little")
    (folder / "model.ckpt.index").write_bytes(block + last + empty + footer)
    positions, width = shapes["wpe.weight"]
    hparams = {"n_vocab": shapes["wte.weight"][0], "n_ctx": positions, "n_embd": width, "n_head": heads}
    (folder / "hparams.json").write_text(json.dumps(hparams))


def write_gguf(path: Path, shapes: Shapes, random: np.ndarray, heads: int) -> None:
    """llama.cpp's file: matrices in Q8_0, the rest in float32. The numbers are drawn from `random`."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_head_count(heads)
    rounded = gguf.quantize(random.reshape(-1, 32), gguf.GGMLQuantizationType.Q8_0)
    content: list[Callable[[BinaryIO], None]] = []
    for name, shape in shapes.items():
        place, _, kind = name.rpartition(".")
        prefix, place = (
            (f"blk.{place.split('.')[1]}.", place.split(".", 2)[2]) if place.startswith("h.") else ("", place)
        )
        ours, packed = f"{prefix}{_GGUF[place]}.{kind}", _is_matrix(name) or name == "wte.weight"
        count, dtype = math.prod(shape), gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        stored = shape[::-1] if _is_matrix(name) else shape
        rows, numbers = (count // 32, rounded) if packed else (count, random)
        size = count // 32 * 34 if packed else 4 * count
        writer.add_tensor_info(ours, stored, np.dtype(np.float32), size, dtype)
        content.append(lambda file, rows=rows, numbers=numbers: _write_aligned(file, rows, numbers))  # type: ignore[misc]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.write(b"\0" * (-file.tell() % 32))
        for write in content:
            write(file)


def _write_aligned(file: BinaryIO, rows: int, numbers: np.ndarray) -> None:
    for part in _parts(rows, numbers):
        file.write(np.ascontiguousarray(part).data)
    file.write(b"\0" * (-file.tell() % 32))


def _parts(count: int, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """`count` numbers, or rows of them, repeated from the beginning where there are fewer."""
    while count:
        part = numbers[: min(count, len(numbers))]
        yield part
        count -= len(part)


def _is_matrix(name: str) -> bool:
    return name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name


def _openai(name: str) -> str:
    place, _, kind = name.rpartition(".")
    if place in ("wte", "wpe"):
        return f"model/{place}"
    letter = "b" if kind == "bias" else "w" if _is_matrix(name) else "g"
    return f"model/{place.replace('h.', 'h', 1).replace('.', '/') if place.startswith('h.') else place}/{letter}"


def _block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A block of a sorted table, each key whole, with its kind of compression and its checksum."""
    content, starts = b"", []
    for key, value in entries:
        starts.append(len(content))
        content += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
    content += b"".join(start.to_bytes(4, "little") for start in starts or [0])
    content += len(starts or [0]).to_bytes(4, "little") + b"\0"
    return content + _masked(google_crc32c.value(content))


def _masked(crc: int) -> bytes:
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    made = b""
    while number > 127:
        made, number = made + bytes([number & 127 | 128]), number >> 7
    return made + bytes([number])
