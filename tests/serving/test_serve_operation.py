"""What operators rely on: keys, limits, queues, clients that vanish or dawdle, shutdown, failures, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.commands import CommandLine, wait_until
from support.serving import Running, serving

import gpt2onnx
from gpt2onnx.errors import BackendError, OptionError
from gpt2onnx.runtime.requests import Request
from gpt2onnx.serving import guard, stream
from gpt2onnx.serving import server as serving_server
from gpt2onnx.serving.completions import Limits
from gpt2onnx.serving.engine import Engine, Job
from gpt2onnx.serving.guard import Admission, is_loopback
from gpt2onnx.serving.metrics import Metrics

LONG = {"max_tokens": 500, "eos_token_id": -1, "temperature": 0}


@pytest.fixture
def model(tales_bundle: Path) -> gpt2onnx.Model:
    return gpt2onnx.load(tales_bundle, threads=1)


@pytest.fixture
def slow_model(model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> gpt2onnx.Model:
    """Takes 10 ms for a pass at least, so that tests can step in."""
    forward = model.runner.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.01)
        return forward(*arguments, **options)

    monkeypatch.setattr(model.runner, "forward", slow)
    return model


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    """Sockets that are closed at the end."""
    opened: list[socket.socket] = []
    yield opened
    for each in opened:
        each.close()


def connect(server: Running, connections: list[socket.socket], data: bytes = b"") -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connections.append(connection)
    connection.sendall(data)
    return connection


def http_request(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_keys(model: gpt2onnx.Model, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key\n\n second-key \n")
    keys = serving_server.read_keys(file)
    with serving(model, admission=Admission(keys=keys, only_local=False)) as server:
        for header, status in (
            ({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "Bearer"}, 401),
            ({"authorization": "first-key"}, 401), ({"authorization": "Bearer first-key"}, 200),
            ({"authorization": "bearer second-key"}, 200), ({"authorization": b"Bearer \xff"}, 401),
        ):  # fmt: skip
            for path in ("/v1/models", "/metrics"):
                response = server.client.get(path, headers=header)
                assert response.status_code == status, (header, path)
                if status == 401:
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
        assert server.complete().status_code == 401
        for path in ("/health", "/docs", "/openapi.json", "/"):
            assert server.client.get(path).status_code == 200, path
        document = server.client.get("/openapi.json").json()
        for path in ("/v1/completions", "/v1/models", "/metrics"):
            for operation in document["paths"][path].values():
                assert operation["security"] == [{"HTTPBearer": []}]
        # A key protects from what a Host header could.
        assert server.client.get("/health", headers={"host": "gpt.example"}).status_code == 200
    for content in (b"", b"\n \n"):
        file.write_bytes(content)
        with pytest.raises(OptionError, match="no API key"):
            serving_server.read_keys(file)
    with pytest.raises(OptionError, match="can't read"):
        serving_server.read_keys(tmp_path / "missing")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, with a function whose time doesn't depend on where they differ."""
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    check = guard.Guard(lambda *_: asyncio.sleep(0), Admission(keys=[b"a", b"b", b"c"], only_local=False), None)._check
    check("/v1/models", {"authorization": "Bearer a"})
    assert compared == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("localhost:8000", True), ("127.0.0.1:1", True), ("127.3.2.1", True), ("[::1]:8000", True),
     ("a.localhost:80", True), ("LOCALHOST", True), ("example.com", False), ("localhost.example.com:80", False),
     ("192.168.1.1:8000", False), ("", False), ("127.0.0.1.nip.io", False), ("[::2]:80", False)],
)  # fmt: skip
def test_other_names_are_refused_without_a_key(host: str, local: bool) -> None:
    assert guard._is_local(host) == local
    if ":" not in host:
        assert is_loopback(host.lower()) == local


def test_browsers_are_kept_in_bounds(model: gpt2onnx.Model) -> None:
    with serving(model) as server:
        assert server.client.get("/health", headers={"host": "evil.example"}).status_code == 403
        page = server.client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert (
            "access-control-allow-origin" not in server.client.get("/health", headers={"origin": "http://a.b"}).headers
        )
        docs = server.client.get("/docs")
        assert "http" not in docs.text.replace("openapi.json", "").replace("HTTP", "").replace(" https", " ")
        for field in ("max_tokens", "no_repeat_ngram_size", "Retry-After"):
            assert field in docs.text
        assert "any]" not in docs.text, "a list of nobody knows what"


def test_large_bodies(model: gpt2onnx.Model, connections: list[socket.socket]) -> None:
    with serving(model, admission=Admission(body_bytes=10_000)) as server:
        assert server.complete("a" * 11_000).status_code == 413
        assert server.complete("a" * 9_000).status_code in (200, 400)
        # In parts, without saying how much there will be; the rest isn't even read.
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        connection = connect(server, connections, head)
        connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n2000\r\n" + b" " * 0x2000 + b"\r\n")
        assert b" 413 " in connection.recv(4096)
        for length in (b"99999999999999", b"-1", b"1e3"):
            connection = connect(
                server, connections, head.replace(b"transfer-encoding: chunked", b"content-length: " + length)
            )
            answer = connection.recv(4096)
            assert b" 413 " in answer or b" 400 " in answer, answer
        assert server.text()


def test_slow_bodies_and_headers(
    model: gpt2onnx.Model, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_server, "_HEADER_SECONDS", 0.5)
    with serving(model, admission=Admission(body_seconds=0.3)) as server:
        connection = connect(server, connections, http_request({"prompt": "a"})[:-3])
        answer = b""
        while part := connection.recv(4096):  # until the server closes the connection
            answer += part
        assert b" 408 " in answer
        assert b"body_timeout" in answer
        # Headers that come a letter at a time get no more time than others.
        connection = connect(server, connections)
        started = time.monotonic()
        with contextlib.suppress(OSError):  # once the server has cut the connection
            while time.monotonic() < started + 10:
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() < started + 5
        # Neither does a second request on the same connection.
        connection = connect(server, connections, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        connection.sendall(b"GET /hea")
        assert select.select([connection], [], [], 5)[0], "a half request was kept"


def test_full_queue(slow_model: gpt2onnx.Model) -> None:
    with serving(slow_model, max_batch=2, max_queue=3) as server:
        with ThreadPoolExecutor(5) as pool:
            running = []
            for count in range(1, 6):
                running.append(pool.submit(server.complete, max_tokens=30, temperature=0))
                state = min(count, 2), max(0, count - 2)
                wait_until(lambda state=state: (server.engine.running, server.engine.waiting) == state)
            refused = server.complete()
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            health = server.client.get("/health").json()
            assert health == {"status": "ok", "running": 2, "waiting": 3}
            answers = [each.result() for each in running]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        # All prompts of a request have to fit.
        assert server.complete(["a"] * 4).status_code == 400
        assert server.complete(["a"] * 3, max_tokens=1).status_code == 200
        assert server.metric("http_requests_total") == 8


def test_rows_count(slow_model: gpt2onnx.Model) -> None:
    """Beams and choices take rows of the batch: no more run together than there may."""
    with serving(slow_model, max_batch=4) as server, ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(server.text, num_beams=3, max_tokens=20), pool.submit(server.text, n=2, max_tokens=20),
                       pool.submit(server.text, max_tokens=20), pool.submit(server.text, n=4, max_tokens=9)]:  # fmt: skip
            future.result()
        page = server.client.get("/metrics").text
        buckets = {line.split('le="')[1].split('"')[0]: float(line.split()[-1])
                   for line in page.splitlines() if line.startswith("gpt2onnx_batch_rows_bucket")}  # fmt: skip
        assert buckets["4.0"] == buckets["+Inf"] > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_vanished_clients_free_their_rows(
    slow_model: gpt2onnx.Model, connections: list[socket.socket], streamed: bool
) -> None:
    with serving(slow_model, max_batch=2, max_queue=4) as server:
        gone = [
            connect(server, connections, http_request({"prompt": "A", "stream": streamed} | LONG)) for _ in range(4)
        ]
        wait_until(lambda: server.engine.running == 2 and server.engine.waiting == 2)
        for connection in gone:
            connection.close()
        started = time.monotonic()
        server.wait_for_idle()
        assert time.monotonic() < started + 2, "they ran on"
        wait_until(lambda: server.metric("abandoned_total") == 4)
        assert server.text(max_tokens=5)
        assert server.metric("completion_tokens_total") < 4 * 500


def test_slow_readers_disturb_nobody(
    slow_model: gpt2onnx.Model, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that doesn't read is cut off in the end; one that reads late gets all of it."""
    monkeypatch.setattr(stream, "WRITE_SECONDS", 0.7)
    whole = slow_model.generate("A", max_new_tokens=40, eos_token_id=-1).text
    # More than the kernel keeps for a reader.
    many = {"prompt": ["A", "B", "C", "D", "E"], "stream": True, "logprobs": 100} | LONG
    with serving(slow_model, max_batch=8) as server:
        connection = socket.socket()
        connections.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        host, port = server.address.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(http_request(many))
        late = connect(server, connections, http_request({"prompt": "A", "stream": True} | LONG | {"max_tokens": 40}))
        wait_until(lambda: server.engine.running == 6)
        assert server.text("A", temperature=0, max_tokens=40, eos_token_id=-1) == whole
        wait_until(lambda: server.metric("abandoned_total") == 1)
        server.wait_for_idle()
        received = b""
        while b"[DONE]" not in received:
            part = late.recv(65536)
            assert part, "cut off"
            received += part
        pieces = [json.loads(line[6:]) for line in received.split(b"\n") if line.strip().startswith(b"data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole


def test_time_out(slow_model: gpt2onnx.Model) -> None:
    with serving(slow_model, limits=Limits(seconds=0.4), max_batch=1) as server:
        late = server.complete(**LONG)
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "timeout_error"
        server.wait_for_idle()
        events = server.complete(stream=True, **LONG).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(events) > 3
        server.wait_for_idle()
        assert server.text(max_tokens=2)


def test_limits(model: gpt2onnx.Model) -> None:
    with serving(model, limits=Limits(prompt_tokens=10, max_tokens=20)) as server:
        assert server.complete([1] * 10, max_tokens=20).status_code == 200
        for fields in ({"prompt": [1] * 11}, {"prompt": [1], "max_tokens": 21}):
            response = server.complete(**fields)
            assert response.status_code == 400
            assert "allowed" in response.json()["error"]["message"]


def test_shutdown_finishes_what_runs(slow_model: gpt2onnx.Model) -> None:
    with serving(slow_model, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(server.complete, stream=streamed, max_tokens=30, temperature=0) for streamed in (False, True)
        ]
        wait_until(lambda: server.engine.running + server.engine.waiting == 2)
        server.server.should_exit = True
        wait_until(lambda: server.engine.stopping)
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{server.address}/v1/completions", json={"prompt": "a"})
        whole, streamed = (each.result() for each in running)
        assert whole.status_code == 200
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_shutdown_ends_in_time(slow_model: gpt2onnx.Model) -> None:
    with serving(slow_model, max_batch=1, shutdown_seconds=0.3) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.complete, stream=streamed, **LONG) for streamed in (False, True)]
        wait_until(lambda: server.engine.running + server.engine.waiting == 2)
        server.server.should_exit = True
        whole, streamed = (each.result() for each in running)
        assert whole.status_code == 503
        assert "shutting down" in whole.json()["error"]["message"]
        assert "shutting down" in streamed.text
        assert "[DONE]" not in streamed.text


def test_failure_of_the_batch(model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ONNX Runtime ends what runs, not the server; until it happens again and again."""
    forward, failing = model.runner.forward, threading.Event()

    def fail(*arguments: Any, **options: Any) -> Any:
        if failing.is_set():
            raise BackendError("the network's output is not a number")
        return forward(*arguments, **options)

    monkeypatch.setattr(model.runner, "forward", fail)
    with serving(model) as server:
        before = server.text(temperature=0)
        for _ in range(2):
            failing.set()
            assert server.complete().status_code == 500
            failing.clear()
            assert server.text(temperature=0) == before
        failing.set()
        for _ in range(3):
            assert server.complete().status_code == 500
        wait_until(lambda: server.engine.failure is not None)
        assert server.client.get("/health").status_code == 503
        assert server.complete().status_code == 503


def test_crash_of_the_thread(
    model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a bug")

    with serving(model) as server:
        assert server.client.get("/health").status_code == 200
        monkeypatch.setattr(model.runner, "forward", crash)
        response = server.complete()
        assert response.status_code == 500
        assert "a bug" not in response.text
        assert "ZeroDivisionError" in caplog.text
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        refused = server.complete()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


def test_no_prompt_in_logs(model: gpt2onnx.Model, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(model) as server:
        server.text("The secret prince", max_tokens=3)
        server.complete("The secret prince", max_tokens=-3)
        assert "secret" not in caplog.text
    with serving(model, log_prompts=True) as server:
        text = server.text("The secret prince", max_tokens=3)
        assert "The secret prince" in caplog.text
        assert repr(text)[1:-1] in caplog.text


def test_metrics(model: gpt2onnx.Model) -> None:
    with serving(model) as server:
        server.text("The old king", max_tokens=7, temperature=0)
        assert server.metric("prompt_tokens_total") == 3
        assert server.metric("completion_tokens_total") == 7
        for name in ("queue_seconds", "first_token_seconds", "request_seconds"):
            assert server.metric(f"{name}_count") == 1
        assert server.metric("token_gap_seconds_count") == 6
        assert server.metric("batch_rows_sum") == 6
        assert 'model="tales"' in server.client.get("/metrics").text


def test_energy(model: gpt2onnx.Model) -> None:
    """Shares add up to what the machine took while the batch ran."""
    with serving(model, energy=True) as server, ThreadPoolExecutor(3) as pool:
        wait_until(lambda: server.metric("watts") > 0)
        assert server.client.get("/v1/models").json()["data"][0]["energy"] is True
        jobs = [pool.submit(server.complete, prompt, max_tokens=100, eos_token_id=-1, **fields)
                for prompt, fields in (("A", {}), ("The", {"n": 3}), ("One", {"num_beams": 3}))]  # fmt: skip
        usages = [job.result().json()["usage"] for job in jobs]
        for usage in usages:
            energy = usage["energy"]
            assert energy["joules"] > 0
            assert energy["joules_per_token"] == pytest.approx(energy["joules"] / usage["completion_tokens"])
            assert "power" in energy["method"]
        total = sum(usage["energy"]["joules"] for usage in usages)
        assert total == pytest.approx(server.metric("joules_total"), rel=0.05)


def test_prompts_read_together_share_what_that_took(model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their tokens, though a pass over both is the first one's news."""
    forward, shapes = model.runner.forward, []

    def slow(cache: Any, rows: slice, tokens: Any, *more: Any, **named: Any) -> Any:
        shapes.append(tokens.shape)
        time.sleep(0.3 if tokens.shape[1] > 1 else 0)
        return forward(cache, rows, tokens, *more, **named)

    monkeypatch.setattr(model.runner, "forward", slow)
    power: Any = SimpleNamespace(watts=10.0)
    engine = Engine(model, max_batch=4, max_queue=4, metrics=Metrics(), power=power)
    jobs = [Job(wake=lambda: None, rows=1, streamed=False) for _ in range(2)]
    options = model.options({"max_new_tokens": 2, "eos_token_id": -1})
    engine.submit([Request([5] * length, options, id=job) for length, job in zip((12, 18), jobs, strict=True)])
    engine.start()
    engine.close()
    engine.join(60)
    assert engine.failure is None
    assert shapes == [(2, 18), (2, 1)]
    assert jobs[1].joules / jobs[0].joules == pytest.approx(18 / 12, rel=0.1)
    assert sum(job.joules for job in jobs) >= 3


def test_what_a_failed_batch_took_is_its_own(model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails at the first step, between the reading of one prompt and that of the next."""
    forward, steps = model.runner.forward, []

    def failing(cache: Any, rows: slice, tokens: Any, *more: Any, **named: Any) -> Any:
        if tokens.shape[1] > 1:
            time.sleep(0.3)
            return forward(cache, rows, tokens, *more, **named)
        steps.append(rows)
        if len(steps) == 1:
            raise BackendError("ONNX Runtime failed")
        return forward(cache, rows, tokens, *more, **named)

    monkeypatch.setattr(model.runner, "forward", failing)
    power: Any = SimpleNamespace(watts=10.0)
    engine = Engine(model, max_batch=4, max_queue=4, metrics=Metrics(), power=power)
    failed, other = (Job(wake=lambda: None, rows=1, streamed=False) for _ in range(2))
    options = model.options({"max_new_tokens": 2, "eos_token_id": -1})
    engine.submit([Request([5] * 36, options, id=failed)])
    engine.start()
    wait_until(lambda: failed.done)
    engine.submit([Request([6] * 12, options, id=other)])
    engine.close()
    engine.join(60)
    assert isinstance(failed.error, BackendError)
    assert other.error is None
    assert failed.joules >= 3
    assert other.joules >= 3


def test_command_line(tales_bundle: Path, command_line: CommandLine, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    arguments = [
        sys.executable,
        "-m",
        "gpt2onnx",
        "serve",
        "-m",
        str(tales_bundle),
        "--port",
        "0",
        "--name",
        "stories",
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().rpartition(" ")[2].strip()
            assert address.startswith("http://127.0.0.1:")
            answer = httpx.post(f"{address}/v1/completions", json={"prompt": "Once", "model": "stories"}, timeout=30)
            assert answer.status_code == 200
            taken = command_line("serve", "-m", tales_bundle, "--port", address.rpartition(":")[2])
            assert taken.code == 1
            assert "can't listen" in taken.err
            assert taken.err.count("\n") == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            assert process.stdout is not None
            assert process.stdout.read() == ""
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_wrong_command_lines(tales_bundle: Path, command_line: CommandLine, tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--country", "FRA"], 2, "--energy"),
        (["--max-batch", "0"], 2, "max-batch"),
        (["--port", "70000"], 2, "port"),
        (["--host", "no such host"], 1, "can't listen"),
        (["--api-key-file", str(tmp_path / "missing")], 1, "can't read"),
    ):
        result = command_line("serve", "-m", tales_bundle, *arguments)
        assert (result.code, result.err.count("\n")) == (code, 1), result
        assert message in result.err


def test_missing_extra(tales_bundle: Path) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['gpt2onnx', 'serve']; import gpt2onnx.cli.main as m; m.main()"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert "pip install 'gpt2onnx[serve]'" in result.stderr
        assert result.stderr.count("\n") == 1


def test_every_option_arrives(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: dict[str, Any] = {}
    monkeypatch.setattr("gpt2onnx.cli.serve.load", lambda *arguments, **more: taken.update(loaded=(*arguments, more)))
    monkeypatch.setattr(
        serving_server, "serve", lambda model, listener, settings, ready: taken.update(settings=settings)
    )
    assert command_line("serve", "--port", 0).code == 0
    plain = serving_server.Settings(name="tales", admission=Admission(keys=[]))
    assert taken == {"loaded": ("tales", "cpu", None, {"wide_after": 0}), "settings": plain}

    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    log = logging.getLogger("gpt2onnx.serving")
    monkeypatch.setattr(log, "level", log.level)  # put back at the end
    finished = command_line(
        "serve", "-m", "some/model", "--port", 0, "--name", "mine", "--api-key-file", keys, "--max-batch", 3, "--max-queue", 5,
        "--max-prompt-tokens", 7, "--max-tokens", 11, "--max-body", 13, "--timeout", 17, "--shutdown-timeout", 19,
        "--energy", "--country", "FRA", "--log-prompts", "--device", "cuda", "--threads", 23,
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert taken["loaded"] == ("some/model", "cuda", 23, {"wide_after": 0})
    assert taken["settings"] == serving_server.Settings(
        name="mine", max_batch=3, max_queue=5, limits=Limits(prompt_tokens=7, max_tokens=11, seconds=17),
        admission=Admission(keys=[b"open sesame"], only_local=False, body_bytes=13), energy=True, country="FRA",
        log_prompts=True, shutdown_seconds=19,
    )  # fmt: skip
