"""Cores and memory: what a process may use, from made-up machines, and what is refused for it."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import CommandLine
from support.systems import linux

import gpt2onnx
from gpt2onnx.errors import BackendError, OptionError
from gpt2onnx.experiments.machine import process_memory
from gpt2onnx.models.bundle import Bundle, FileRecord
from gpt2onnx.runtime.engine import graphs
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.host import resources
from gpt2onnx.runtime.requests import Request

V2 = "40 30 0:35 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MEMINFO = "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 4000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Writes the files that the kernel would show: machine(groups, mounts, {"sys/fs/cgroup/cpu.max": "max 100000"})."""

    def write(groups: str, mounts: str, files: dict[str, str]) -> Path:
        named = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, "proc/meminfo": MEMINFO} | files
        for name, content in named.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


def group(path: str, **files: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{path}/{name.replace('__', '.')}": content + "\n" for name, content in files.items()}


QUOTAS = [
    pytest.param("0::/\n", V2, {}, None, id="none"),
    pytest.param("0::/a\n", V2, group("a", cpu__max="max 100000"), None, id="v2-unlimited"),
    pytest.param("0::/a\n", V2, group("a", cpu__max="150000 100000"), 1.5, id="v2"),
    pytest.param("0::/a/b\n", V2, group("a", cpu__max="50000 100000") | group("a/b", cpu__max="max 100000"), 0.5, id="v2-parent"),
    pytest.param("0::/a/b\n", V2, group("a", cpu__max="300000 100000") | group("a/b", cpu__max="200000 100000"), 2, id="v2-tightest"),
    pytest.param("0::/../other\n", V2, group("", cpu__max="250000 100000"), 2.5, id="v2-namespace"),
    # A container that sees its own group as the root of the mount, and the machine's path in /proc.
    pytest.param("0::/docker/1f\n", V2.replace("0:35 /", "0:35 /docker/1f"), group("", cpu__max="70000 100000"), 0.7, id="v2-docker"),
    # Without a group of version 2.
    pytest.param("4:cpu,cpuacct:/a\n", V2, group("a", cpu__max="70000 100000"), None, id="v1"),
    pytest.param("garbage", "garbage\n", {}, None, id="garbage"),
]  # fmt: skip


@pytest.mark.parametrize(("groups", "mounts", "files", "quota"), QUOTAS)
def test_quota(machine: Machine, groups: str, mounts: str, files: dict[str, str], quota: float | None) -> None:
    assert resources.cores(machine(groups, mounts, files)).quota == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "usable", "reason"),
    [
        (4, None, 4, "affinity"),
        (8, None, 8, "the machine"),
        (4, 1.5, 2, "a control group's quota of 1.5"),
        (4, 0.2, 1, "a control group's quota of 0.2"),
        (1, 3.0, 1, "affinity"),
        (4, 100.0, 4, "affinity"),
    ],
)
def test_usable_cores(affinity: int, quota: float | None, usable: int, reason: str) -> None:
    cores = resources.Cores(8, affinity, quota)
    assert (cores.usable, cores.reason) == (usable, reason)


@linux
def test_affinity_of_this_process_counts() -> None:
    """On one core of a real machine, a model of any size gets one thread."""
    code = "from gpt2onnx.runtime.host import resources; print(resources.cores().affinity, resources.cores().usable)"
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"1", b"1"]


GB = 10**9


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "available", "reason"),
    [
        ("0::/\n", V2, {}, 4_096_000_000, "free memory"),
        ("0::/a\n", V2, group("a", memory__max="max", memory__current="5"), 4_096_000_000, "free memory"),
        # Cached files can be dropped, so they count as available.
        ("0::/a/b\n", V2, group("a", memory__max="2000000000", memory__current="1500000000",
                                memory__stat="anon 1000000000\nactive_file 100000000\ninactive_file 400000000"),
         GB, "limit of 2.0 GB"),
        ("0::/a\n", V2, group("a", memory__max="1000000000", memory__current="2000000000"), 0, "limit of 1.0 GB"),
    ],
)  # fmt: skip
def test_memory(machine: Machine, groups: str, mounts: str, files: dict[str, str], available: int, reason: str) -> None:
    root = machine(groups, mounts, files)
    found = resources.memory(root)
    assert found is not None
    assert found.available == available
    assert reason in found.reason
    assert resources.shortage(available, root) is None
    assert re.search(r"of memory, .* is available \(.*\)", resources.shortage(max(available, GB) + 1, root) or "")


def test_swap_counts(machine: Machine) -> None:
    swap = MEMINFO.replace("SwapFree: 0", "SwapFree: 1000000")
    files = group("a", memory__max="2000000000", memory__current="2000000000", memory__swap__max="300000000")
    found = resources.memory(machine("0::/a\n", V2, {"proc/meminfo": swap} | files))
    assert found is not None
    assert found.available == 300_000_000
    files = group("a", memory__max="2000000000", memory__current="2000000000", memory__swap__max="300000000",
                  memory__swap__current="200000000")  # fmt: skip
    found = resources.memory(machine("0::/a\n", V2, {"proc/meminfo": swap} | files))
    assert found is not None
    assert found.available == 100_000_000
    found = resources.memory(machine("0::/\n", V2, {"proc/meminfo": swap}))
    assert found is not None
    assert found.available == 5_120_000_000


def test_a_system_that_tells_nothing_refuses_nothing(tmp_path: Path) -> None:
    assert resources.memory(tmp_path) is None
    assert resources.shortage(10**15, tmp_path) is None
    assert resources.cores(tmp_path).quota is None


@linux
def test_address_space_limit() -> None:
    code = (
        "from gpt2onnx.runtime.host import resources\n"
        "print(resources.memory()); print(resources.shortage(10**9)); print(resources.shortage(2 * 10**8))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=lambda: _limit(8 * 10**8), capture_output=True, check=True, text=True
    )
    first, second, third = done.stdout.splitlines()
    assert "an address-space limit of 800 MB (ulimit -v)" in first
    assert second.startswith("1.0 GB of memory, ")
    assert third == "None"


def _limit(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Limits the bytes that are available."""

    def set_to(size: int) -> None:
        monkeypatch.setattr(resources, "memory", lambda root=None: resources.Memory(size, "a limit"))

    return set_to


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    tales_bundle: Path, command_line: CommandLine, little_memory: Callable[[int], None]
) -> None:
    weights = graphs.weight_bytes(Bundle.open(tales_bundle))
    assert weights > 27e6
    large = with_weights(Bundle.open(tales_bundle), 3 * GB)
    little_memory(2 * GB)
    with pytest.raises(
        BackendError, match=r"needs at least 3\.0 GB of memory, 2\.0 GB is available \(a limit\): free some"
    ):
        Runner(large)
    gpt2onnx.load(tales_bundle)


def test_a_cache_that_cannot_fit_is_refused(tales_model: gpt2onnx.Model, little_memory: Callable[[int], None]) -> None:
    model = gpt2onnx.load(tales_model.bundle.folder, threads=1)  # whose cache holds nothing that could serve again
    little_memory(10**8)
    message = (
        r"900 sequences of 103 tokens need .* GB of memory, 100 MB is available .*: lower the batch size, the beams"
    )
    with pytest.raises(OptionError, match=message):
        model.generate([1, 2, 3, 4], num_beams=900, max_new_tokens=100)
    # In a job it is the answer to that request alone.
    requests = [
        Request(
            [1, 2],
            model.generation_config.merged(
                {"max_new_tokens": 3 * count, "num_return_sequences": count, "do_sample": True}
            ),
        )
        for count in (1, 900, 2)
    ]
    outcomes = [outcome for _, outcome in model.complete(requests, batch_size=1)]
    assert [type(outcome) for outcome in outcomes] == [gpt2onnx.Result, OptionError, gpt2onnx.Result]


def test_rows_need_memory_once_they_are_in_use(little_memory: Callable[[int], None]) -> None:
    cache = KVCache((1, 2, 1000, 1, 1000, 50))  # 400 kB a row
    little_memory(10**8)
    cache.reserve(200)
    little_memory(10**7)
    cache.reserve(200)
    cache.reserve(150)
    with pytest.raises(OptionError, match="300 sequences of 1000 tokens need 120 MB of memory, 10 MB is available"):
        cache.reserve(500)
    with pytest.raises(OptionError, match="need 320 MB"):
        cache.reserve(1000)
    little_memory(4 * 10**8)
    cache.reserve(1000)


def test_what_cannot_fit_beside_others_waits(tales_model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[token] for token in range(1, 7)]
    options = {"num_beams": 10, "max_new_tokens": 4}
    alone = [tales_model.generate(prompt, **options).sequences[0].token_ids for prompt in prompts]
    model = gpt2onnx.load(tales_model.bundle.folder, threads=1)
    limit = 2 * 10**7  # ten rows of 64 positions take 8 MB

    def left(root: object = None) -> resources.Memory:
        return resources.Memory(limit - model._scheduler.reserved_bytes, "a limit")

    monkeypatch.setattr(resources, "memory", left)
    monkeypatch.setattr(resources, "_NEGLIGIBLE", 0)
    together = model.generate(prompts, **options, batch_size=6)
    assert [result.sequences[0].token_ids for result in together] == alone
    assert model._scheduler.reserved_bytes <= limit


def test_memory_that_the_cache_holds_is_not_asked_for_again(
    tales_model: gpt2onnx.Model, little_memory: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_NEGLIGIBLE", 0)
    model = gpt2onnx.load(tales_model.bundle.folder, threads=1)
    options = {"num_beams": 10, "max_new_tokens": 4}
    little_memory(10**7)
    first = model.generate([1], **options)
    little_memory(10**6)
    assert model.generate([1], **options).sequences == first.sequences


def test_a_cache_that_grows_copies_rows_in_use_only() -> None:
    small, large = KVCache((1, 2, 4, 1, 8, 2)), KVCache((1, 2, 4, 1, 16, 2))
    small.reserve(2)
    small.advance(slice(0, 2), np.array([3, 3]))
    small.data[:] = 1
    large.take_over(small)
    assert large.data[:, :, :2, :, :8].all()
    assert not large.data[:, :, 2:].any()
    assert large.lengths.tolist() == [3, 3, 0, 0]


def with_weights(bundle: Bundle, size: int, **changes: object) -> Bundle:
    files = {"onnx/model.onnx_data": FileRecord(size, "")}
    return replace(bundle, manifest=replace(bundle.manifest, files=files, **changes))


def test_threads_are_no_more_than_the_weights_are_worth(tales_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four megabytes of weights keep one core busy, whatever the machine has; more weights take more of them."""
    bundle = Bundle.open(tales_bundle)
    monkeypatch.setattr(resources, "cores", lambda: resources.Cores(4, 4, None))
    for size, threads in ((5_000_000, 1), (7_000_000, 2), (12_000_000, 3), (10**9, 4)):
        assert graphs.threads(with_weights(bundle, size)) == threads
    monkeypatch.setattr(resources, "cores", lambda: resources.Cores(4, 4, 1.5))
    assert graphs.threads(with_weights(bundle, 10**9)) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_freed_memory_is_returned() -> None:
    def anonymous() -> int:
        used = process_memory().anonymous
        assert used is not None
        return used

    # Too small for pages of their own; every hundredth stays, so that the heap doesn't shrink by itself.
    blocks = [b"1" * 60_000 for _ in range(2000)]
    kept = blocks[::100]
    full = anonymous()
    del blocks
    resources.return_freed_memory()
    assert full - anonymous() > 0.8 * 60_000 * (2000 - len(kept))
