"""Facts beside figures: machine, versions, a model's precision and device; read bandwidth, memory of this process."""

import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.host import resources
from ..runtime.model import Model
from ..runtime.ort import providers

_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of this process in bytes; None if the system doesn't tell.

    Attributes:
        resident: now.
        anonymous: of it, private to this process.
        file: of it, pages of files: libraries and mapped weights. Processes share them, and the kernel can drop them.
        peak: the largest resident size so far.
    """

    resident: int | None
    anonymous: int | None
    file: int | None
    peak: int | None


def process_memory() -> ProcessMemory:
    """Reads the memory of this process: https://docs.kernel.org/filesystems/proc.html, elsewhere getrusage(2)."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ProcessMemory(None, None, None, _peak_by_usage())
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def of(name: str) -> int | None:
        return int(fields[name][0]) * 1024 if name in fields else None

    return ProcessMemory(of("VmRSS"), of("RssAnon"), of("RssFile"), of("VmHWM"))


def _peak_by_usage() -> int | None:
    if sys.platform == "win32":  # no getrusage
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class MemoryReader:
    """Measures read bandwidth, which bounds decoding speed.

    Args:
        threads: readers, each of its own part.
        size: bytes read at a time, many times the size of caches.

    Attributes:
        best: highest bandwidth measured, bytes a second.
    """

    def __init__(self, threads: int, size: int = 1 << 28) -> None:
        self.best = 0.0
        self._pool = ThreadPoolExecutor(threads)
        array = np.ones(size // 4, np.float32)
        # The fastest way to read differs between machines.
        ways: list[tuple[Callable[[Any], object], Any]] = [
            (np.max, array),
            (np.bitwise_or.reduce, array.view(np.uint64)),
            (lambda part: np.dot(part, part), array),
        ]
        self._ways = [(way, np.array_split(content, threads)) for way, content in ways]
        self._size = array.nbytes

    def read(self) -> float:
        """Reads once in each way; returns the bytes a second of the fastest."""
        found = 0.0
        for way, parts in self._ways:
            started = time.perf_counter()
            for _ in self._pool.map(way, parts):
                pass
            found = max(found, self._size / (time.perf_counter() - started))
        self.best = max(self.best, found)
        return found


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, operating system, versions."""
    return {
        "processor": _processor(),
        "cores": resources.cores().usable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {
            "gpt2onnx": version("gpt2onnx"),
            providers.PACKAGE: providers.VERSION,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def setting(model: Model) -> dict[str, Any]:
    """Precision of weights and KV cache, graph, device and threads of a model."""
    bundle, runner = model.bundle, model.runner
    cache_dtype = "fp16" if runner.dtype == np.float16 else bundle.cache_dtype
    return {
        "dtype": bundle.manifest.dtype, "cache_dtype": cache_dtype, "graph": bundle.manifest.graph,
        "device": runner.device, "threads": runner.threads,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "model name"
    ]
    return names[0] if names else platform.processor() or platform.machine()
