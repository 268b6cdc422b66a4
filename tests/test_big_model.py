"""A checkpoint of gpt2-xl's shape, 1.56 billion random weights, exported in every precision in little memory."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer

import gpt2onnx
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

pytestmark = pytest.mark.slow

XL = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25}
SHARDS = 3
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4 pure": {"dtype": "int4", "pure": True},
}
LIMITS = {"fp32": 6.3e9, "fp16": 3.2e9, "int8": 1.8e9, "int4": 1.1e9, "int4 pure": 1.1e9}  # bytes on disk
MEMORY = 2 * 2**30

# Pages of files, which the system may drop at any time, don't count: only memory of the process's own.
EXPORT = """
import json, sys, threading, time
from gpt2onnx import export
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.01):
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = max(peak, 1024 * int(status["RssAnon"].split()[0]))
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
export(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({"peak": peak, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def xl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("xl")
    (folder / "config.json").write_text(json.dumps(XL))
    byte_tokenizer(257).save(str(folder / "tokenizer.json"))
    shapes = weight_shapes(GPT2Config.from_dict(XL), tied=True)
    random = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.02
    shard_of = {}
    for index in range(SHARDS):
        path = folder / f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        names = list(shapes)[index::SHARDS]
        shard_of |= dict.fromkeys(names, path.name)
        _write_safetensors(path, {name: shapes[name] for name in names}, random)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    yield folder
    for path in folder.iterdir():
        path.unlink()


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], random: np.ndarray) -> None:
    """Writes random tensors straight to disk, since not even the test should hold them all."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, len(random))
                file.write(random[:count].data)
                left -= count


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_exports_in_little_memory_and_generates(precision: str, xl_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    command = [sys.executable, "-c", EXPORT, str(xl_checkpoint), str(target), json.dumps(PRECISIONS[precision])]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{precision}: {size / 1e6:,.0f} MB, {figures['seconds']:.0f} s, peak {figures['peak'] / 2**20:,.0f} MiB")
    assert figures["peak"] < MEMORY, f"the export held {figures['peak'] / 2**30:.2f} GiB"
    assert size < LIMITS[precision], f"the bundle has {size / 1e9:.3f} GB"
    result = gpt2onnx.load(target).generate([1, 2, 3], max_new_tokens=3, min_new_tokens=3)
    assert len(result.sequences[0].token_ids) == 3
    for path in sorted(target.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
