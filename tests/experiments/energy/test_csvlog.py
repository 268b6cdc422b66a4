"""The file of energy's rows: whole, whoever else writes to it and whatever its disk does."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from support.isolated import run
from support.systems import posix

from gpt2onnx.errors import OutputError
from gpt2onnx.experiments.energy.csvlog import CsvLog

APPEND = """
import sys
from pathlib import Path
from gpt2onnx.experiments.energy.csvlog import CsvLog
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for index in range(count):
    CsvLog(path, ["writer", "index", "text"]).append({"writer": name, "index": index, "text": name * (1 + 997 * index % 9001)})
"""


def test_processes_that_append_at_once_tear_no_row(tmp_path: Path) -> None:
    path, count = tmp_path / "log.csv", 60
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, path, name, str(count)]) for name in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["writer", "index", "text"]
    assert sorted((name, int(index)) for name, index, _ in rows) == [
        (name, index) for name in "abcd" for index in range(count)
    ]
    assert [text for name, index, text in rows] == [name * (1 + 997 * int(index) % 9001) for name, index, _ in rows]
    assert len(list(tmp_path.iterdir())) == 1, "a lock file was left"


@posix
def test_a_row_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom pathlib import Path\nfrom gpt2onnx.experiments.energy.csvlog import CsvLog\n"
        "log = CsvLog(Path(sys.argv[1]), ['a', 'b'])\nlog.append({'a': 1, 'b': None})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "log.append({'a': 'x' * 100, 'b': 2})"
    )
    status, _, err = run(code, tmp_path / "log.csv")
    assert status == 1
    assert "OutputError: can't write" in err
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,\n"


def test_rows_go_behind_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b\r\n1,2")  # as an editor may have left it
    CsvLog(path, ["a", "b"]).append({"a": 3, "b": [4, "x"]})
    assert path.read_bytes() == b'a,b\r\n1,2\n3,"[4, ""x""]"\n'
    with pytest.raises(OutputError, match="other columns"):
        CsvLog(path, ["a", "c"])
