"""A checkpoint of gpt2-xl's shape, 1.56 billion random weights, exported in every precision in little memory.

Each case prints a row of the table in docs/big-models.md: `pytest -m slow -s tests/exporter/test_big_model.py`.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import torch_files
from support.big_files import write_gguf, write_tensorflow
from support.checkpoints import byte_tokenizer

from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"),
]

XL = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25}
SHARDS = 7  # shares no factor with a block's 12 tensors, so the large ones spread evenly
# Options, and bytes on disk at most; in fp32 and fp16 1.6e9 of them for the twin.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"dtype": "fp32"}, 7.9e9),
    "fp16": ({"dtype": "fp16"}, 4.8e9),
    "int8": ({"dtype": "int8"}, 1.8e9),
    "int4": ({"dtype": "int4"}, 1.1e9),
    "int4 pure": ({"dtype": "int4", "pure": True}, 1.1e9),
}
MEMORY = 2 * 2**30
MEMORY_OF_OTHERS = 10**9  # in int4, from TensorFlow's and llama.cpp's files
TOKENS = 16

# Pages of files, which the system may drop at any time, don't count: only memory of the process's own.
WATCH = """
import json, sys, threading, time
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, 1024 * int(status["RssAnon"].split()[0]))
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
figures = {}
try:
    WORK
finally:
    done.set()
    watcher.join()
print(json.dumps(figures | {"peak": peak}))
"""
EXPORT = """
    from gpt2onnx import export
    seen = []
    progress = lambda done, total: seen.append((done, total))
    export(sys.argv[1], sys.argv[2], parity=None, progress=progress, **json.loads(sys.argv[3]))
    figures = {"seconds": time.perf_counter() - start, "progress": seen}
"""
GENERATE = """
    from gpt2onnx import load
    model = load(sys.argv[1])
    loaded = time.perf_counter() - start
    model.generate([1, 2, 3], max_new_tokens=1)
    start = time.perf_counter()
    result = model.generate([1, 2, 3], max_new_tokens=int(sys.argv[2]), min_new_tokens=int(sys.argv[2]))
    seconds = time.perf_counter() - start
    figures = {"load": loaded, "seconds": seconds, "tokens": result.sequences[0].token_ids}
"""


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The checkpoint in files with the suffix that is the fixture's parameter."""
    folder = tmp_path_factory.mktemp(request.param)
    yield _write_checkpoint(folder, {"safetensors": "model", "bin": "pytorch_model"}[request.param], request.param)
    shutil.rmtree(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "bundle"
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)


def _write_checkpoint(folder: Path, stem: str, suffix: str) -> Path:
    (folder / "config.json").write_text(json.dumps(XL))
    byte_tokenizer(257).save(str(folder / "tokenizer.json"))
    shapes = weight_shapes(GPT2Config.from_dict(XL), tied=True)
    random = _random()
    shard_of = {}
    for index in range(SHARDS):
        path = folder / f"{stem}-{index + 1:05}-of-{SHARDS:05}.{suffix}"
        part = {name: shapes[name] for name in list(shapes)[index::SHARDS]}
        shard_of |= dict.fromkeys(part, path.name)
        (_write_safetensors if suffix == "safetensors" else _write_pickle)(path, part, random)
    index_file = folder / f"{stem}.{suffix}.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def _random() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.02


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], random: np.ndarray) -> None:
    """Writes random tensors straight to disk, since not even the test should hold them all."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                count = min(left, len(random))
                file.write(random[:count].data)
                left -= count


def _write_pickle(path: Path, shapes: dict[str, tuple[int, ...]], random: np.ndarray) -> None:
    torch_files.save({name: np.resize(random, shape) for name, shape in shapes.items()}, path)


def _watched(work: str, *arguments: object) -> dict[str, Any]:
    """Runs Python in a process of its own and returns its figures, the most memory that it held among them."""
    command = [sys.executable, "-c", WATCH.replace("    WORK", work.strip("\n")), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.mark.parametrize(
    ("precision", "checkpoint"),
    [*((name, "safetensors") for name in PRECISIONS), ("int8", "bin")],
    indirect=["checkpoint"],
)
def test_exports_in_little_memory_and_generates(precision: str, checkpoint: Path, bundle: Path) -> None:
    options, limit = PRECISIONS[precision]
    exported = _watched(EXPORT, checkpoint, bundle, json.dumps(options))
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    generated = _watched(GENERATE, bundle, TOKENS)
    print(
        f"\n| {precision} from {checkpoint.name} | {size / 1e6:,.0f} MB | {exported['seconds']:.0f} s"
        f" | {exported['peak'] / 2**20:,.0f} MiB | {generated['load']:.1f} s | {generated['peak'] / 2**20:,.0f} MiB"
        f" | {TOKENS / generated['seconds']:.1f} |"
    )
    assert exported["peak"] < MEMORY, f"the export held {exported['peak'] / 2**30:.2f} GiB"
    assert size < limit, f"the bundle has {size / 1e9:.3f} GB"
    assert len(generated["tokens"]) == TOKENS
    steps = exported["progress"]
    total = 4 * sum(math.prod(shape) for shape in weight_shapes(GPT2Config.from_dict(XL), tied=True).values())
    total *= 2 if precision in ("fp32", "fp16") else 1  # the twin reads all once more
    assert all(of == total for _, of in steps)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == total


@pytest.mark.parametrize("program", ["tensorflow", "gguf"])
def test_exports_other_programs_files_in_little_memory(program: str, tmp_path: Path) -> None:
    shapes = weight_shapes(GPT2Config.from_dict(XL), tied=True)
    if program == "tensorflow":
        write_tensorflow(tmp_path, shapes, _random(), XL["n_head"])
    else:
        write_gguf(tmp_path / "model.gguf", shapes, _random(), XL["n_head"])
    try:
        exported = _watched(EXPORT, tmp_path, tmp_path / "bundle", json.dumps({"dtype": "int4"}))
        generated = _watched(GENERATE, tmp_path / "bundle", 1)
    finally:
        shutil.rmtree(tmp_path)
    print(f"\n| int4 from {program} | {exported['seconds']:.0f} s | {exported['peak'] / 1e6:,.0f} MB |")
    assert exported["peak"] < MEMORY_OF_OTHERS
    assert len(generated["tokens"]) == 1
