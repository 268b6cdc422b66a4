"""File of a job's results. A kill at any moment loses none, and leaves it fit for `--resume`."""

import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO

from gpt2onnx.errors import OutputError, PromptError

from ..models import limits
from ..runtime import jobs
from ..runtime.host import locks
from ..runtime.jsontext import to_line

# The key of a request line's result; None: the request can't be carried out.
Key = Callable[[str | PromptError], str | None]


def holds_results(path: Path) -> bool:
    """Whether a file is empty or holds results, whole ones or the beginning of one."""
    with path.open("rb") as file:
        first = file.readline(limits.RESULT)
    record = jobs.load(first)
    if isinstance(record, dict):
        return "sequences" in record or record.keys() == {"id", "error"}
    return not first or (first.startswith(b'{"id": ') and not first.endswith(b"\n"))


class Results:
    """Results in the order of the requests.

    Lines of an earlier run stay where they are as long as each is the next result. From the first that isn't, results go to a
    hidden file beside, which takes the file's name at the end. If the run is killed before, the next one has the results of both.

    Args:
        resume: keep earlier results that fit.

    Attributes:
        kept: earlier results that are among the results.

    Raises:
        OutputError: another job writes to the file.
        OSError: the file can't be read or written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.kept = 0
        self._path = Path(os.path.realpath(path)) if path.is_file() else path
        self._beside = self._path.with_name(f".{self._path.name}.new")
        self._order = deque[int | None]()  # start of each request's earlier result; None: it is being computed
        self._starts = defaultdict[str, deque[int]](deque)
        self._lines = 0  # of the earlier run
        self._whole = 0  # end of the last of them
        self._end = 0  # of those that stay where they are
        self._earlier: IO[bytes] | None = None
        self._output: IO[bytes] | None = None  # None while each result stays where it is
        there = self._path.is_file()
        self._lock = self._path.open("ab")
        if self._path.is_file() and not (
            locks.try_lock(self._lock) and os.path.samestat(self._path.stat(), os.fstat(self._lock.fileno()))
        ):
            self._lock.close()
            raise OutputError(f"another job writes to {path}: wait for it, or choose another output")
        if resume and there:
            if self._beside.exists():
                self._join()
            self._earlier = self._path.open("rb")
            self._read(self._earlier)
        else:
            self._output = self._path.open("wb")
            self._beside.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files as they are."""
        for file in (self._earlier, self._lock, self._output):  # the last may fail, on a full disk
            if file is not None:
                file.close()

    @property
    def dropped(self) -> int:
        """Earlier results that aren't among the results: failed, or of another request, model or options."""
        return self._lines - self.kept

    def missing(self, lines: Iterable[str | PromptError], key: Key) -> Iterator[str | PromptError]:
        """The request lines without an earlier result."""
        for line in lines:
            name = key(line) if self._starts else None
            starts = self._starts.get(name) if name else None
            self._order.append(starts.popleft() if starts else None)
            if self._order[-1] is None:
                yield line

    def write(self, record: jobs.Record) -> None:
        """Adds the result of the next line of `missing`."""
        self._keep()
        self._order.popleft()
        self._put((to_line(record) + "\n").encode())

    def finish(self) -> None:
        """Ends the file behind the last result."""
        self._keep()
        if self._output is None:
            os.truncate(self._path, self._end)
            return
        self._output.flush()
        if self._beside.exists():
            os.fsync(self._output.fileno())
            if sys.platform == "win32":  # renames no open file
                self.close()
            self._beside.replace(self._path)

    def _keep(self) -> None:
        """Adds the earlier results before the next one that is computed."""
        while self._order and (start := self._order[0]) is not None:
            self._put(self._line(start))
            self._order.popleft()
            self.kept += 1

    def _put(self, line: bytes) -> None:
        if self._output is None:
            if self._end < self._whole and self._line(self._end) == line:
                self._end += len(line)
                return
            self._output = self._depart()
        self._output.write(line)
        self._output.flush()

    def _depart(self) -> IO[bytes]:
        """The file that goes on where the earlier results no longer fit."""
        if self._end == self._whole:
            os.truncate(self._path, self._end)  # a line that a kill cut off
            return self._path.open("ab")
        assert self._earlier is not None
        earlier, output = self._earlier, self._beside.open("wb")
        earlier.seek(0)
        output.writelines(takewhile(lambda _: earlier.tell() <= self._end, iter(earlier.readline, b"")))
        return output

    def _line(self, start: int) -> bytes:
        assert self._earlier is not None
        self._earlier.seek(start)
        return self._earlier.readline()

    def _read(self, file: IO[bytes]) -> None:
        """Notes where the results are that didn't fail."""
        for line in _whole_lines(file):
            record = jobs.load(line)
            if isinstance(record, dict) and "request_hash" in record:
                self._starts[jobs.key(record.get("id"), record["request_hash"])].append(self._whole)
            self._whole += len(line)
            self._lines += 1

    def _join(self) -> None:
        """Moves the results of a killed run before the earlier ones that it hadn't come to."""
        joined = self._path.with_name(f".{self._path.name}.joined")
        with joined.open("wb") as output, self._beside.open("rb") as new, self._path.open("rb") as old:
            copied = Counter[int]()
            for line in _whole_lines(new):
                output.write(line)
                copied[hash(line)] += 1
            for line in _whole_lines(old):
                if copied[hash(line)]:
                    copied[hash(line)] -= 1
                else:
                    output.write(line)
            output.flush()
            os.fsync(output.fileno())
        self._take(joined)
        self._beside.unlink()

    def _take(self, joined: Path) -> None:
        """Puts a file into the place of the results, and locks it before another job can."""
        if sys.platform == "win32":  # renames no open file
            self._lock.close()
            joined.replace(self._path)
            self._lock = self._path.open("ab")
            locks.try_lock(self._lock)
            return
        lock = joined.open("ab")
        locks.try_lock(lock)
        joined.replace(self._path)
        self._lock.close()
        self._lock = lock


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file without the one that was being written when its process was killed."""
    return (line for line in file if line.endswith(b"\n"))
