"""The server in tests: one in a thread of this process, a client for it, and a model whose steps a test controls."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

import gpt2onnx
from gpt2onnx.serving.http.server import Server, Settings, listen, make_server
from support.commands import wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


class ControlledModel:
    """A model that takes `delay` seconds for each step of a prompt, and raises `error` in place of the next one."""

    def __init__(self, model: gpt2onnx.Model, delay: float = 0.0) -> None:
        self._model, self.delay = model, delay
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def follow(self, *arguments: Any) -> Iterator[Any]:
        for step in self._model.follow(*arguments):
            time.sleep(self.delay)
            if self.error is not None:
                raise self.error
            yield step


class Running:
    """A running server and a client."""

    def __init__(self, server: Server, address: str) -> None:
        self.server, self.engine, self.address = server, server.pool.first.engine, address
        self.client = httpx.Client(base_url=address, timeout=60)

    def complete(self, prompt: Any = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt} | fields)

    def choice(self, prompt: Any = "Once upon a time", **fields: Any) -> Any:
        response = self.complete(prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def text(self, prompt: Any = "Once upon a time", **fields: Any) -> str:
        return str(self.choice(prompt, **fields)["text"])

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == f"gpt2onnx_{name}"
        )

    def wait_for_state(self, running: int, waiting: int) -> None:
        wait_until(lambda: (self.engine.running, self.engine.waiting) == (running, waiting))

    def wait_for_idle(self) -> None:
        self.wait_for_state(0, 0)


def connect(address: str, opened: ExitStack, data: bytes = b"", buffer: int = 2**16) -> socket.socket:
    """A connection on which data was sent; `buffer` is what the kernel keeps for a slow reader."""
    connection = opened.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(60)
    host, _, port = address.removeprefix("http://").partition(":")
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def post(**fields: Any) -> bytes:
    """A request for completions, as it is sent."""
    body = json.dumps(fields).encode()
    return HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[Running]:
    """A server for the time of the `with` block."""
    settings = {"names": ["tales"], "shutdown_seconds": 10.0} | settings
    with listen("127.0.0.1", 0) as listener:
        addresses: list[str] = []
        server = make_server(model, listener, Settings(**settings), addresses.append)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: addresses or not thread.is_alive())
            running = Running(server, addresses[0])
            with running.client:
                yield running
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server didn't end"
