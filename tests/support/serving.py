"""What the tests of the server share: a server in a thread of this process, and clients for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

import gpt2onnx
from gpt2onnx.serving.server import Server, Settings, listen, make_server
from support.commands import wait_until


class Running:
    """A server that runs, and what it says when asked."""

    def __init__(self, server: Server, address: str) -> None:
        self.server, self.engine, self.address = server, server.engine, address
        self.client = httpx.Client(base_url=address, timeout=60)

    def complete(self, prompt: Any = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt} | fields)

    def text(self, prompt: Any = "Once upon a time", **fields: Any) -> str:
        response = self.complete(prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == f"gpt2onnx_{name}"
        )

    def wait_for_idle(self) -> None:
        wait_until(lambda: not self.engine.running and not self.engine.waiting)


@contextmanager
def serving(model: gpt2onnx.Model, **settings: Any) -> Iterator[Running]:
    """A server for the time of the `with` block."""
    settings = {"name": "tales", "shutdown_seconds": 10.0} | settings
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
            thread.join(20)
            assert not thread.is_alive(), "the server didn't end"
