"""The installed program: `main`, ended without Python's own end."""

import os
import subprocess
import sys

import pytest

# A library's thread, which outlives the command and has something to do at the end.
CODE = """
import atexit, sys, threading, time
from gpt2onnx.cli.main import program

def library():
    time.sleep(1)
    atexit.register(print, "the end")
    print("the thread")

sys.argv[1:] = {arguments}
threading.Thread(target=library).start()
program()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "out", "errors"),
    [(["--version"], 0, "gpt2onnx", 0), (["generate", "-m", "missing", "a"], 1, "", 1), (["generat"], 2, "", 1)],
)
def test_all_is_written_and_the_exit_code_stays(arguments: list[str], code: int, out: str, errors: int) -> None:
    command = [sys.executable, "-c", CODE.format(arguments=arguments)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=buffered)
    assert ended.returncode == code
    assert ended.stdout.startswith(out)
    assert ended.stdout.endswith("the thread\nthe end\n")
    assert len(ended.stderr.splitlines()) == errors


def test_a_traceback_is_a_failure() -> None:
    broken = "import sys; import gpt2onnx.cli.main as it; it.main = lambda: 1 / 0; it.program()"
    ended = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
