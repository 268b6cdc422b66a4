"""Clients that hold connections, bodies, streams or the queue get in nobody's way; a pass that never ends ends the server."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support.bundles import add_to_logits, edit_graphs
from support.commands import wait_until
from support.serving import HEAD, ControlledModel, Running, connect, post, serving
from support.systems import posix

import gpt2onnx
from gpt2onnx.serving.http.connections import OncePerSecond
from gpt2onnx.serving.http.guard import Admission


def is_open(connection: socket.socket) -> bool:
    """Whether the server hasn't cut a connection on which it has nothing to say."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_connections_without_requests_give_way(model: gpt2onnx.Model, opened: contextlib.ExitStack) -> None:
    with serving(model, connections=10) as server:
        idle = [connect(server.address, opened, b"" if index % 2 else b"GET /hea") for index in range(50)]
        assert server.text(max_tokens=3)
        server.client.close()  # it is kept open, too
        wait_until(lambda: sum(map(is_open, idle)) <= 10)
        assert [is_open(each) for each in idle[-5:]] == [True] * 5, "not the ones that came last"
        idle[-1].setblocking(True)
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in idle[-1].recv(4096)


def test_requests_in_progress_do_not_give_way(model: gpt2onnx.Model, opened: contextlib.ExitStack) -> None:
    slow = ControlledModel(model, delay=0.01)
    with serving(slow, connections=4) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.text, max_tokens=30) for _ in range(2)]
        server.wait_for_state(2, 0)
        for _ in range(20):
            connect(server.address, opened)
        assert all(each.result() for each in running)


def test_bodies_that_never_end_give_way(model: gpt2onnx.Model, opened: contextlib.ExitStack) -> None:
    """As many as fit into memory stay; what comes later is answered."""
    size, most = 50_000, 10
    body = HEAD + f"content-length: {size}\r\n\r\n".encode() + b" " * (size - 1)
    with serving(model, bodies=most * size, admission=Admission(body_bytes=size)) as server:
        half = [connect(server.address, opened, body) for _ in range(50)]
        assert server.text("a" * 100, max_tokens=2)
        wait_until(lambda: sum(map(is_open, half)) <= most)
        assert sum(map(is_open, half)) > most // 2


def from_address(address: str, server: Running, **fields: Any) -> httpx.Response:
    """A completion for a client at another address of this machine."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=60) as client:
        return client.post(f"{server.address}/v1/completions", json={"prompt": "Once"} | fields)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has one loopback address")
def test_a_client_that_fills_the_queue_leaves_room_and_turns_to_others(
    model: gpt2onnx.Model, opened: contextlib.ExitStack
) -> None:
    slow = ControlledModel(model, delay=0.004)
    request = post(prompt="a", max_tokens=40, stream=True, eos_token_id=-1)
    with serving(slow, max_batch=4, max_queue=16) as server:
        for _ in range(30):  # they never read
            connect(server.address, opened, request)
        server.wait_for_state(4, 12)
        assert server.complete(max_tokens=1).status_code == 429
        assert from_address("127.0.0.2", server, max_tokens=1).status_code == 200
        assert server.engine.waiting == 12, "it waited for others"
        opened.close()


def test_slashes_redirect_nowhere(model: gpt2onnx.Model) -> None:
    with serving(model) as server:
        answer = server.client.post("/v1/completions/", json={"prompt": "a"}, headers={"host": "localhost"})
        assert answer.status_code == 404
        assert "there is no /v1/completions/" in answer.json()["error"]["message"]
        assert "location" not in answer.headers


def test_a_warning_is_logged_once_a_second() -> None:
    lines = OncePerSecond()
    records = [logging.makeLogRecord({"msg": msg, "levelno": logging.WARNING}) for msg in ("a %s", "a %s", "b")]
    assert [lines.filter(each) for each in records] == [True, False, True]
    time.sleep(1)
    assert lines.filter(records[0])
    assert all(lines.filter(logging.makeLogRecord({"msg": "a", "levelno": logging.INFO})) for _ in range(2))


@contextlib.contextmanager
def process(*arguments: object, before: str = "pass") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    code = f"from gpt2onnx.models import limits; {before}; from gpt2onnx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            assert server.stderr is not None
            yield server, server.stderr.readline().rpartition(" ")[2].strip()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def endless(tales_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of allowed operators whose first pass takes an hour: it multiplies large matrices again and again."""
    folder = shutil.copytree(tales_bundle, tmp_path_factory.mktemp("endless") / "bundle")

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([4000, 4000], np.int64), "size"))
        nodes = [
            helper.make_node("ReduceMax", ["input_ids"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["number"], to=1),
            helper.make_node("Expand", ["number", "size"], ["product.0"]),
            *(helper.make_node("MatMul", ["product.0", f"product.{i}"], [f"product.{i + 1}"]) for i in range(2000)),
            helper.make_node("ReduceMax", ["product.2000"], ["added"], keepdims=0),
        ]
        add_to_logits(model, nodes, "added")

    edit_graphs(folder, change)
    return folder


@posix
@pytest.mark.system
def test_a_pass_that_never_ends(endless: Path) -> None:
    """The server ends by itself, with an error's exit code, and says why."""
    with process("-m", endless, before="limits.PASS_SECONDS = 0.3") as (server, address):
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=60)
        assert (answer.status_code, "hasn't ended after 0.3 seconds" in answer.text) == (500, True)
        assert server.wait(60) == 1
        assert server.stderr is not None
        assert "a forward pass didn't end" in server.stderr.read()


@posix
@pytest.mark.system
def test_neither_descriptors_nor_patience_run_out(endless: Path, opened: contextlib.ExitStack) -> None:
    """Half-open connections, and requests that are none, fill neither the table of descriptors nor the log; SIGTERM ends all."""
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))"
    with process("-m", endless, "--shutdown-timeout", 0.2, before=few) as (server, address):
        for _ in range(150):
            connect(address, opened)
        for _ in range(40):
            connect(address, opened, b"nonsense\r\n\r\n")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{address}/v1/completions", json={"prompt": "a"}, timeout=60)
            wait_until(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
            server.send_signal(signal.SIGTERM)
            assert asked.result().status_code == 503
        assert server.wait(60) == 1
        assert server.stderr is not None
        *lines, last = server.stderr.read().splitlines()
        assert "a forward pass didn't end" in last
        assert set(lines) == {"uvicorn.error: Invalid HTTP request received."}
        assert len(lines) <= 3
