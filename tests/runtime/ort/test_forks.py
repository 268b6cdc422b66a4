"""Forked children of a process that has loaded a model: they end, and get a clear error or the right tokens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# argv: bundle, threads. Each child does something with a model; one that doesn't end in time is killed.
SCRIPT = """
import multiprocessing, os, sys, time
import gpt2onnx

folder, threads = sys.argv[1], int(sys.argv[2])
model = gpt2onnx.load(folder, threads=threads)
text = model.generate("Once", max_new_tokens=4).text

def use(_):
    return model.generate("Once", max_new_tokens=4).text

def load(_):
    return gpt2onnx.load(folder, threads=threads).generate("Once", max_new_tokens=4).text

def drop(_):
    global model
    del model
    return text

def answer(work):
    try:
        return "right" if work(0) == text else "wrong"
    except gpt2onnx.errors.BackendError as error:
        return str(error)

def child(work):
    print(work.__name__, answer(work), flush=True)
    sys.exit(3)

for work in (str, use, load, drop):
    pid = os.fork()
    if not pid:
        child(work)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(pid, 9)
        ended = os.waitpid(pid, 0)
    print(work.__name__, os.waitstatus_to_exitcode(ended[1]), flush=True)

with multiprocessing.get_context("fork").Pool(2) as pool:
    print("pool", pool.map(answer, [use, load]), flush=True)
print("parent", answer(use), flush=True)
"""


def run(bundle: Path, threads: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, bundle, str(threads)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_children_of_a_model_with_threads(tales_bundle: Path) -> None:
    lines = run(tales_bundle, 2)
    error = lines[2].removeprefix("use ")
    assert error.startswith("this process was forked after the model was loaded")
    assert "load the model in each process" in error
    assert lines == [
        "str wrong", "str 3", f"use {error}", "use 3", "load right", "load 3", "drop right", "drop 3",
        f"pool {[error, 'right']}", "parent right",
    ]  # fmt: skip


def test_children_use_a_model_without_threads(tales_bundle: Path) -> None:
    lines = run(tales_bundle, 1)
    assert lines[2:4] == ["use right", "use 3"]
    assert lines[-2:] == ["pool ['right', 'right']", "parent right"]
