"""What Linux, macOS and Windows do in ways of their own, each way forced on whatever system runs this."""

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from support.checkpoints import MakeCheckpoint
from support.paths import REPOSITORY
from support.systems import linux

import gpt2onnx
from gpt2onnx.errors import OutputError
from gpt2onnx.experiments import machine
from gpt2onnx.experiments.energy.csvlog import CsvLog
from gpt2onnx.exporter.files import atomic
from gpt2onnx.runtime.host import locks, resources

# Standard modules that Windows lacks.
POSIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")


class Msvcrt:
    """Windows' locks, of bytes, inside one process. https://docs.python.org/3/library/msvcrt.html"""

    LK_UNLCK, LK_LOCK = 0, 1

    def __init__(self) -> None:
        self.held: set[tuple[int, int]] = set()
        self.waited = threading.Event()
        self.broken: OSError | None = None

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        if self.broken:
            raise self.broken
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        assert size == 1
        if mode == self.LK_UNLCK:
            self.held.remove(place)
        elif place in self.held:
            self.waited.set()  # the real one has tried for ten seconds by now
            raise OSError(errno.EDEADLK, "Resource deadlock avoided")
        else:
            self.held.add(place)


class System:
    """The module `sys` on another system."""

    def __init__(self, platform: str) -> None:
        self.platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets gpt2onnx, and nothing else, find itself on a system: on("win32")."""

    def put(platform: str) -> None:
        for name, module in sys.modules.items():
            if name.startswith("gpt2onnx.") and hasattr(module, "sys"):
                monkeypatch.setattr(module, "sys", System(platform))

    return put


@pytest.fixture
def windows(on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Msvcrt:
    """Lets gpt2onnx find itself on Windows."""

    def no_library(name: str | None) -> None:
        raise TypeError("bad argument type for built-in operation")

    msvcrt = Msvcrt()
    on("win32")
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)  # type: ignore[arg-type]
    for name in POSIX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    return msvcrt


@pytest.fixture
def windows_files(windows: Msvcrt, monkeypatch: pytest.MonkeyPatch) -> Msvcrt:
    """Its file system, too: folders can't be opened, and take no name that another has; ends of lines are translated."""
    rename, open_by_descriptor, open_path = Path.rename, os.open, Path.open

    def rename_to_free_name(path: Path, to: Path) -> Path:
        if to.exists():
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(to))
        return rename(path, to)

    def open_file(path: Any, flags: int, *more: Any, **named: Any) -> int:
        # shutil.rmtree opens folders where the system can.
        if Path(path).is_dir() and not sys._getframe(1).f_code.co_filename.endswith("shutil.py"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_by_descriptor(path, flags, *more, **named)

    def open_with_line_ends(
        path: Path, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:  # fmt: skip
        translates = newline is None and "b" not in mode and "r" not in mode
        return open_path(path, mode, buffering, encoding, errors, "\r\n" if translates else newline)

    monkeypatch.setattr(Path, "rename", rename_to_free_name)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(Path, "open", open_with_line_ends)
    return windows


# Locks.


def test_a_lock_makes_other_processes_wait(tmp_path: Path) -> None:
    """By the system's own means."""
    code = (
        "import sys, time; from pathlib import Path; from gpt2onnx.runtime.host.locks import lock, unlock\n"
        "with Path(sys.argv[1]).open('ab') as file, Path(sys.argv[2]).open('a') as log:\n"
        "    print('started', flush=True); lock(file)\n"
        "    print('first', file=log, flush=True); time.sleep(0.02); print('second', file=log, flush=True); unlock(file)\n"
    )
    path, log = tmp_path / "lock", tmp_path / "log"
    with path.open("wb") as file:
        locks.lock(file)
        waiting = [
            subprocess.Popen([sys.executable, "-c", code, path, log], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in waiting:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
        assert not log.read_text(encoding="utf-8")
        locks.unlock(file)
        assert [process.wait(60) for process in waiting] == [0, 0]
        for process in waiting:
            process.communicate()
    assert log.read_text(encoding="utf-8").split() == ["first", "second"] * 2
    assert path.read_bytes() == b""


def test_windows_lock_waits_until_it_is_released(windows: Msvcrt, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    got = threading.Event()

    def second() -> None:
        with path.open("r+b") as file:
            locks.lock(file)
            got.set()
            locks.unlock(file)

    with path.open("r+b") as first:
        locks.lock(first)
        ((_, place),) = windows.held
        assert place > 2**29, "a byte that a reader may want is locked"
        thread = threading.Thread(target=second)
        thread.start()
        assert windows.waited.wait(60)
        assert not got.is_set()
        first.seek(0)  # as users of the file do
        locks.unlock(first)
    thread.join(60)
    assert got.is_set()
    assert not windows.held
    assert path.read_bytes() == b"content"


def test_windows_without_locks_says_so(windows: Msvcrt, tmp_path: Path) -> None:
    windows.broken = OSError(errno.EACCES, "Permission denied")
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Permission denied"):
        locks.lock(file)
    with pytest.raises(OutputError, match="Permission denied"):
        CsvLog(tmp_path / "log.csv", ["a"])


def test_csv_rows_on_windows(windows: Msvcrt, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for number in range(3):
        CsvLog(path, ["a", "b"]).append({"a": number, "b": "x"})
    assert path.read_bytes() == b"a,b\n0,x\n1,x\n2,x\n"
    assert not windows.held


# Files and folders.


def _write(target: Path, content: str) -> None:
    with atomic.replacing(target, lambda: None) as folder:
        (folder / "file").write_text(content, encoding="utf-8")


@pytest.mark.parametrize("before", ["nothing", "empty folder", "full folder"])
def test_a_folder_is_replaced_on_windows(windows_files: Msvcrt, tmp_path: Path, before: str) -> None:
    target = tmp_path / "target"
    if before != "nothing":
        target.mkdir()
    if before == "full folder":
        (target / "old").touch()
    _write(target, "new")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_workspaces_of_others_stay_where_folders_have_no_locks(windows_files: Msvcrt, tmp_path: Path) -> None:
    """Nothing there tells whether their process still runs."""
    other = tmp_path / ".gpt2onnx-0123456789abcdef"
    other.mkdir()
    (other / ".gpt2onnx-unfinished").touch()
    _write(tmp_path / "target", "new")
    assert [path.name for path in other.iterdir()] == [".gpt2onnx-unfinished"]


def test_a_file_is_replaced_on_windows(windows_files: Msvcrt, tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with atomic.replacing_file(tmp_path / "target", lambda: None) as file:
            file.write(content)
        assert (tmp_path / "target").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_same_bundle_on_windows(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Byte for byte, down to the ends of lines."""
    checkpoint = make_checkpoint()
    here = gpt2onnx.export(checkpoint, tmp_path / "here")
    request.getfixturevalue("windows_files")
    there = gpt2onnx.export(checkpoint, tmp_path / "there")
    assert there.manifest.files == here.manifest.files
    assert {"config.json", "tokenizer_config.json"} <= set(here.manifest.files)


@linux
def test_no_file_is_open_or_mapped_while_a_bundle_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows doesn't rename the folder of a file that is."""
    rename = Path.rename
    seen = []

    def look(path: Path, target: Path) -> Path:
        mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
        opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        seen.append([name for name in (*mapped, *opened) if name.startswith((f"{path}/", f"{target}/"))])
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look)
    gpt2onnx.export("tales", tmp_path / "bundle")
    # Reads what the fp32 network predicts from a folder of its own.
    gpt2onnx.export("tales", tmp_path / "bundle", dtype="int8", force=True, calibrate=False, quality=False)
    assert seen == [[]] * 3  # one without a bundle there; the old one and the new


@pytest.mark.system  # needs Ray
def test_what_is_flushed_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows flushes nothing else."""
    from gpt2onnx.fleet.storage import Place

    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(os.write(descriptor, b""))  # fails for what is open for reading only

    monkeypatch.setattr(os, "fsync", fsync)
    Place.of(str(tmp_path)).write("part", b"content")
    assert flushed == [0]
    assert (tmp_path / "part").read_bytes() == b"content"


# Limits and figures of the process.


def _usage() -> SimpleNamespace:
    """The module `resource` where the peak was 5 units, and the address space is limited."""
    return SimpleNamespace(
        RUSAGE_SELF=0, RLIMIT_AS=9, RLIM_INFINITY=-1,
        getrusage=lambda who: SimpleNamespace(ru_maxrss=5), getrlimit=lambda kind: (10**9, -1), getpagesize=lambda: 4096,
    )  # fmt: skip


@pytest.fixture
def statm(tmp_path: Path) -> Path:
    """A root where this process is said to use 1,000 pages."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "statm").write_text("1000 1 1 1 0 1 0\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("system", "peak"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_of_memory_has_the_unit_of_its_system(
    on: Callable[[str], None], system: str, peak: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """getrusage(2): kilobytes on Linux, bytes on macOS."""
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", _usage())  # type: ignore[arg-type]
    on(system)
    assert machine.process_memory() == machine.ProcessMemory(None, None, None, peak)


def test_peak_of_memory_is_unknown_on_windows(windows: Msvcrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "none")
    assert machine.process_memory() == machine.ProcessMemory(None, None, None, None)


def test_address_space_limit_where_there_is_one(
    on: Callable[[str], None], statm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("linux")
    monkeypatch.setitem(sys.modules, "resource", _usage())  # type: ignore[arg-type]
    found = resources.memory(statm)
    assert found is not None
    assert found.available == 10**9 - 1000 * 4096


def test_no_address_space_limit_on_windows(windows: Msvcrt, statm: Path) -> None:
    assert resources.memory(statm) is None


def test_without_affinity_all_cores_count(windows: Msvcrt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """macOS and Windows don't say which cores a process may run on."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cores = resources.cores(tmp_path)
    assert (cores.machine, cores.affinity, cores.usable, cores.reason) == (6, 6, 6, "the machine")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_freed_memory_is_left_to_systems_without_glibc(
    system: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "win32":
        request.getfixturevalue("windows")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    resources.return_freed_memory()


# The server's socket.


@pytest.mark.parametrize(("system", "reused"), [("linux", True), ("darwin", True), ("win32", False)])
def test_a_port_is_taken_over_only_where_that_is_safe(
    on: Callable[[str], None], system: str, reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SO_REUSEADDR: POSIX lets a restarted server listen at once, Windows would let two servers have one port."""
    pytest.importorskip("uvicorn")
    from gpt2onnx.serving.http.server import listen

    options = []

    class Socket(socket.socket):
        def setsockopt(self, level: int, name: int, *value: Any) -> None:
            options.append((level, name))
            super().setsockopt(level, name, *value)

    monkeypatch.setattr(socket, "socket", Socket)
    on(system)
    listen("127.0.0.1", 0).close()
    assert ((socket.SOL_SOCKET, socket.SO_REUSEADDR) in options) == reused


# The workflow.


def test_the_workflow_holds_nothing_but_calls_of_the_makefile() -> None:
    """It runs elsewhere only; what it calls is tested here."""
    root = REPOSITORY
    workflow = (root / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets
    calls = re.findall(r"^ *(?:- )?run: (.*)$", workflow, re.MULTILINE)
    assert calls == [f"make {target} PYTHON=python" for target in ("test", "reference", "site", "newest")]
    assert {call.split()[1] for call in calls} <= set(targets[1].split())
    used = set(re.findall(r"^ *(?:- )?uses: (.*)@v\d+$", workflow, re.MULTILINE))
    assert used == {"actions/checkout", "actions/setup-python"}
    assert workflow.count("uses:") == 2 * len(calls)
