"""Cores and memory that this process may use.

Knows no ONNX Runtime. Limits come from the scheduler's affinity, from the control groups of this process and those above them
(version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html) and from the address-space limit.
"""

import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")  # tests put a folder of their own in its place
# Bytes; looking for limits takes a millisecond, which less memory isn't worth.
_NEGLIGIBLE = 2**26


class Cores(NamedTuple):
    """Cores, and the limit that decides their number.

    Attributes:
        machine: cores of the machine.
        affinity: those that the scheduler lets this process run on (taskset, cpusets).
        quota: processor time that control groups allow, in cores; None: they set no limit.
    """

    machine: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once; a quota counts from the next whole core."""
        return max(1, min(self.affinity, math.ceil(self.quota) if self.quota else self.affinity))

    @property
    def reason(self) -> str:
        """The limit that decides."""
        if self.quota is not None and self.quota <= self.affinity:
            return f"a control group's quota of {self.quota:g}"
        return "affinity" if self.affinity < self.machine else "the machine"


class Memory(NamedTuple):
    """Available memory in bytes, and the limit that decides."""

    available: int
    reason: str


def cores(root: Path = _ROOT) -> Cores:
    """The cores that this process may use."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine, affinity, min(_quotas(root), default=None))


def memory(root: Path = _ROOT) -> Memory | None:
    """The memory that this process can still get, by the tightest limit; None: the system doesn't say.

    Pages of files that the kernel would drop, and free swap space, count as available.
    """
    return min(_memory_limits(root), key=lambda limit: limit.available, default=None)


def sums_of_byte_products_overflow(root: Path = _ROOT) -> bool:
    """Whether the processor may add up products of bytes in 16 bits, as x86 does without VNNI.

    https://www.intel.com/content/www/us/en/docs/onednn/developer-guide-reference/2025-0/nuances-of-int8-computations.html
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & _processor_flags(root)


def has_avx512(root: Path = _ROOT) -> bool:
    """Whether the processor is known to have vectors of 512 bits, of x86."""
    return "avx512f" in _processor_flags(root)


@functools.cache
def _processor_flags(root: Path) -> frozenset[str]:
    """The extensions that the system names, among other words."""
    return frozenset(_words(root / "proc/cpuinfo"))


def shortage(needed: int, root: Path = _ROOT) -> str | None:
    """The needed and available memory in words, if the needed bytes aren't available."""
    if needed < _NEGLIGIBLE:
        return None
    limit = memory(root)
    if limit is None or needed <= limit.available:
        return None
    return f"{in_words(needed)} of memory, {in_words(limit.available)} is available ({limit.reason})"


def in_words(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root):
        quota, period, *_ = [*_words(folder / "cpu.max"), "", ""]
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[Memory]:
    machine = _numbers(root / "proc/meminfo", unit=1024)
    swap = machine.get("SwapFree:", 0)
    if "MemAvailable:" in machine:
        yield Memory(machine["MemAvailable:"] + swap, "the machine's free memory")
    for folder in _groups(root):
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            counted = _numbers(folder / "memory.stat")
            files = sum(counted.get(f"{kind}_file", 0) for kind in ("active", "inactive"))
            allowed, swapped = _text(folder / "memory.swap.max"), _text(folder / "memory.swap.current")
            left = max(0, int(allowed) - int(swapped or 0)) if allowed.isdecimal() else swap
            extra = min(swap, left)
            available = max(0, int(limit) - int(used) + files) + extra
            yield Memory(available, f"a control group's limit of {in_words(int(limit))}")
    yield from _address_space(root)


def _address_space(root: Path) -> Iterator[Memory]:
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _words(root / "proc/self/statm")
    if limit != resource.RLIM_INFINITY and pages:
        used = int(pages[0]) * resource.getpagesize()
        yield Memory(max(0, limit - used), f"an address-space limit of {in_words(limit)} (ulimit -v)")


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process: its own and those above it."""
    own = next((line[3:] for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), None)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        # proc_pid_mountinfo(5): id parent device root mountpoint options … - type source options
        mount, _, filesystem = line.partition(" - ")
        if own is None or filesystem.split(" ")[0] != "cgroup2":
            continue
        shown, place = mount.split(" ")[3:5]
        top = root / place.lstrip("/")
        # In a container the mount may begin at a group below the root.
        inside = os.path.relpath(own, shown)
        folder = top if inside.startswith("..") else Path(os.path.normpath(top / inside))
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) * unit for pair in pairs if len(pair) >= 2 and pair[1].isdecimal()}


def return_freed_memory() -> None:
    """Returns freed memory to the system, which glibc keeps otherwise."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
