"""What operators rely on: keys, limits, queue, clients that leave or read slowly, shutdown, failures, metrics, command line."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import select
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.commands import wait_until
from support.serving import HEAD, ControlledModel, connect, post, serving

import gpt2onnx
from gpt2onnx.errors import BackendError, OptionError
from gpt2onnx.serving.http import server as serving_server
from gpt2onnx.serving.http.guard import Admission, is_loopback
from gpt2onnx.serving.service import Limits

LONG: dict[str, Any] = {"max_tokens": 500, "eos_token_id": -1, "temperature": 0}


@pytest.fixture
def slow_model(model: gpt2onnx.Model) -> ControlledModel:
    return ControlledModel(model, delay=0.01)


def test_keys(model: gpt2onnx.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key\n\n second-key \n")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert serving_server.read_keys(file) == [b"first-key", b"second-key"]
    assert ("other users can read" in caplog.text) == (sys.platform != "win32")
    caplog.clear()
    (tmp_path / "marked").write_text("first-key\nsecond-key", encoding="utf-8-sig")
    assert serving_server.read_keys(tmp_path / "marked") == [b"first-key", b"second-key"]
    caplog.clear()
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    with pytest.raises(OptionError, match="is it another file"):
        serving_server.read_keys(tmp_path / "large")
    file.chmod(0o600)
    keys = serving_server.read_keys(file)
    assert caplog.text == ""
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
    file.write_bytes(b"\n \n")
    with pytest.raises(OptionError, match="no API key"):
        serving_server.read_keys(file)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, with a function whose time doesn't depend on where they differ."""
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(other) or compare(one, other))
    assert Admission(keys=[b"a", b"b", b"c"]).accepts(b"a")
    assert compared == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("localhost:8000", True), ("127.0.0.1:1", True), ("127.3.2.1", True), ("[::1]:8000", True),
     ("a.localhost:80", True), ("LOCALHOST", True), ("::1", True), ("example.com", False), ("localhost.example.com:80", False),
     ("192.168.1.1:8000", False), ("", False), ("127.0.0.1.nip.io", False), ("[::2]:80", False)],
)  # fmt: skip
def test_names_of_this_machine(host: str, local: bool) -> None:
    assert is_loopback(host) == local


def test_browsers_are_kept_in_bounds(model: gpt2onnx.Model) -> None:
    with serving(model) as server:
        assert server.client.get("/health", headers={"host": "evil.example"}).status_code == 403
        page = server.client.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        health = server.client.get("/health", headers={"origin": "http://a.b"})
        assert "access-control-allow-origin" not in health.headers
        docs = server.client.get("/docs")
        assert docs.headers["content-security-policy"] == policy
        assert "http" not in docs.text.replace("openapi.json", "").replace("HTTP", "").replace(" https", " ")
        for field in ("max_tokens", "no_repeat_ngram_size", "Retry-After"):
            assert field in docs.text
        assert "any]" not in docs.text, "a list of nobody knows what"
        assert "<td>seed</td><td>integer</td>" in docs.text
        assert "e+" not in docs.text, "a range that limits nobody"


def test_large_bodies(model: gpt2onnx.Model, opened: contextlib.ExitStack) -> None:
    with serving(model, admission=Admission(body_bytes=10_000)) as server:
        assert server.complete("a" * 11_000).status_code == 413
        assert server.complete("a" * 9_000).status_code in (200, 400)
        # In parts, without saying how much there will be; the rest isn't even read.
        part = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
        connection = connect(server.address, opened, HEAD + b"transfer-encoding: chunked\r\n\r\n" + part + part)
        assert b" 413 " in connection.recv(4096)
        for length in (b"99999999999999", b"-1", b"1e3", b"9" * 5000):
            answer = connect(server.address, opened, HEAD + b"content-length: " + length + b"\r\n\r\n").recv(4096)
            assert b" 413 " in answer or b" 400 " in answer, answer
        assert server.text()


def test_slow_bodies_and_headers(model: gpt2onnx.Model, opened: contextlib.ExitStack) -> None:
    with serving(model, header_seconds=0.5, admission=Admission(body_seconds=0.3)) as server:
        connection = connect(server.address, opened, post(prompt="a")[:-3])
        answer = b""
        while part := connection.recv(4096):  # until the server closes the connection
            answer += part
        assert b" 408 " in answer
        assert b"body_timeout" in answer
        # Headers that come a letter at a time get no more time than others.
        connection = connect(server.address, opened, b"")
        with contextlib.suppress(OSError):  # once the server has cut the connection
            for _ in range(600):
                connection.sendall(b"G")
                time.sleep(0.05)
            pytest.fail("they got half a minute")
        # Neither does a second request on the same connection.
        connection = connect(server.address, opened, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        connection.sendall(b"GET /hea")
        assert select.select([connection], [], [], 60)[0], "a half request was kept"


def test_full_queue(slow_model: ControlledModel) -> None:
    with serving(slow_model, max_batch=2, max_queue=3) as server:
        with ThreadPoolExecutor(5) as pool:
            running = []
            for count in range(1, 6):
                running.append(pool.submit(server.complete, max_tokens=30, temperature=0))
                server.wait_for_state(min(count, 2), max(0, count - 2))
            refused = server.complete()
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert server.client.get("/health").json() == {"status": "ok", "running": 2, "waiting": 3}
            answers = [each.result() for each in running]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        # All prompts of a request have to fit.
        assert server.complete(["a"] * 4).status_code == 400
        assert server.complete(["a"] * 3, max_tokens=1).status_code == 200
        assert server.metric("http_requests_total") == 8


def test_rows_count(slow_model: ControlledModel) -> None:
    """Beams and choices take rows of the batch: no more run together than there may, which is one more for a small request."""
    with serving(slow_model, max_batch=7) as server, ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(server.text, num_beams=3, max_tokens=20), pool.submit(server.text, n=2, max_tokens=20),
                       pool.submit(server.text, max_tokens=20), pool.submit(server.text, n=4, max_tokens=9)]:  # fmt: skip
            future.result()
        page = server.client.get("/metrics").text
        buckets = {line.split('le="')[1].split('"')[0]: float(line.split()[-1])
                   for line in page.splitlines() if line.startswith("gpt2onnx_batch_rows_bucket")}  # fmt: skip
        assert buckets["8.0"] == buckets["+Inf"] > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_vanished_clients_free_their_rows(
    slow_model: ControlledModel, opened: contextlib.ExitStack, streamed: bool
) -> None:
    with serving(slow_model, max_batch=2, max_queue=8) as server:
        for _ in range(4):
            connect(server.address, opened, post(prompt="A", stream=streamed, **LONG))
        server.wait_for_state(2, 2)
        opened.close()
        server.wait_for_idle()
        wait_until(lambda: server.metric("abandoned_total") == 4)
        assert server.text(max_tokens=5)
        assert server.metric("completion_tokens_total") < 4 * 500


def test_clients_that_leave_do_not_shorten_the_wait_of_others(
    slow_model: ControlledModel, opened: contextlib.ExitStack
) -> None:
    waits = []
    with serving(slow_model, max_batch=16, max_queue=64) as server:
        for _ in range(2):
            connect(server.address, opened, post(prompt=["A"] * 64, **LONG))
            server.wait_for_state(16, 48)
            waits.append(server.complete().headers["retry-after"])
            opened.close()
            server.wait_for_idle()
    assert waits[0] == waits[1] != "1"


@pytest.mark.system
def test_slow_readers_disturb_nobody(
    slow_model: ControlledModel, tales_model: gpt2onnx.Model, opened: contextlib.ExitStack
) -> None:
    """A client that doesn't read is cut off in the end; one that reads late gets all of it."""
    whole = tales_model.generate("A", max_new_tokens=40, eos_token_id=-1).text
    slow_model.delay = 0.002
    # More than the kernel keeps for a reader.
    many = post(prompt=["A", "B", "C", "D", "E"], stream=True, logprobs=100, **LONG)
    with serving(slow_model, max_batch=8, write_seconds=0.7) as server:
        connect(server.address, opened, many, buffer=1024)
        late = connect(server.address, opened, post(prompt="A", stream=True, **LONG | {"max_tokens": 40}))
        server.wait_for_state(6, 0)
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


def test_time_out(slow_model: ControlledModel) -> None:
    with serving(slow_model, limits=Limits(seconds=0.4), max_batch=1) as server:
        late = server.complete(**LONG)
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "timeout_error"
        server.wait_for_idle()
        events = server.complete(stream=True, **LONG).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-2] == "data: [DONE]"
        assert len(events) > 3
        server.wait_for_idle()
        assert server.metric("abandoned_total") == 2
        assert server.text(max_tokens=2)


def test_limits_of_a_request(model: gpt2onnx.Model) -> None:
    with serving(model, limits=Limits(prompt_tokens=10, max_tokens=20)) as server:
        assert server.complete([1] * 10, max_tokens=20).status_code == 200
        for fields in ({"prompt": [1] * 11}, {"prompt": [1], "max_tokens": 21}):
            response = server.complete(**fields)
            assert response.status_code == 400
            assert "above the server's limit" in response.json()["error"]["message"]
            assert ("raise --max-tokens" if "max_tokens" in fields else "raise --max-prompt-tokens") in response.text
    # Nobody asked for the default, which the limit lowers.
    with serving(model, limits=Limits(max_tokens=3), chat_template="turns") as server:
        for fields, path in (
            ({"prompt": "Once"}, "/v1/completions"),
            ({"messages": [{"role": "user", "content": "Once"}]}, "/v1/chat/completions"),
        ):
            answer = server.client.post(path, json=fields | {"eos_token_id": -1}).json()
            assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.system
def test_many_continuations_do_not_hold_up_a_small_request(slow_model: ControlledModel) -> None:
    with serving(slow_model, max_batch=8) as server, ThreadPoolExecutor(4) as pool:
        large = [pool.submit(server.complete, n=8, temperature=1, max_tokens=80) for _ in range(2)]
        server.wait_for_state(1, 1)
        small = [pool.submit(server.complete, max_tokens=3, temperature=0) for _ in range(2)]
        answers = [each.result() for each in small]
        assert not any(each.done() for each in large)
        assert all(each.status_code == 200 for each in answers)
        # They don't keep the second large one from its turn.
        endless = [pool.submit(server.complete, max_tokens=160, temperature=0) for _ in range(2)]
        assert all(each.result().status_code == 200 for each in (*large, *endless))


@pytest.mark.parametrize("patience", [10.0, 0.3])
def test_shutdown(slow_model: ControlledModel, patience: float) -> None:
    """What runs and waits is finished, or ends with an error in time."""
    asked = LONG if patience < 1 else {"max_tokens": 30, "temperature": 0}
    with serving(slow_model, max_batch=1, shutdown_seconds=patience) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.complete, stream=streamed, **asked) for streamed in (False, True)]
        server.wait_for_state(1, 1)
        server.server.should_exit = True
        wait_until(lambda: server.engine.stopping)
        if patience > 1:  # time enough to ask
            refused = httpx.post(f"{server.address}/v1/completions", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
            health = httpx.get(f"{server.address}/health")
            assert (health.status_code, health.json()["status"]) == (503, "stopping")
        whole, streamed = (each.result() for each in running)
        if patience < 1:
            assert whole.status_code == 503
            assert "shutting down" in whole.json()["error"]["message"]
            assert "shutting down" in streamed.text
        else:
            assert whole.status_code == 200
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_failure_of_the_batch(model: gpt2onnx.Model) -> None:
    """An error of ONNX Runtime ends what runs, not the server; until it happens again and again."""
    broken, error = ControlledModel(model), BackendError("the network's output is not a number")
    with serving(broken) as server:
        before = server.text(temperature=0)
        for _ in range(2):
            broken.error = error
            assert server.complete().status_code == 500
            broken.error = None
            assert server.text(temperature=0) == before
        broken.error = error
        for _ in range(3):
            assert server.complete().status_code == 500
        wait_until(lambda: server.engine.failure is not None)
        assert server.client.get("/health").status_code == 503
        assert server.complete().status_code == 503


def test_crash_of_the_thread(model: gpt2onnx.Model, caplog: pytest.LogCaptureFixture) -> None:
    broken = ControlledModel(model)
    with serving(broken) as server:
        assert server.client.get("/health").status_code == 200
        broken.error = ZeroDivisionError("a bug")
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
    with serving(model, joules=iter((1.5, 2.5)).__next__) as server:
        server.text("The old king", max_tokens=7, temperature=0)
        assert server.metric("joules_total") == 1.5
        page = server.client.get("/metrics").text
        assert 'model="tales"' in page
        named = {sample.name: sample for family in text_string_to_metric_families(page) for sample in family.samples}
        expected = {"joules_total": 4, "prompt_tokens_total": 3, "completion_tokens_total": 7, "queue_seconds_count": 1,
                    "first_token_seconds_count": 1, "request_seconds_count": 1, "token_gap_seconds_count": 6,
                    "batch_rows_sum": 6}  # fmt: skip
        assert {name: named[f"gpt2onnx_{name}"].value for name in expected} == expected
        # vLLM's names beside ours.
        for name, value in {
            "generation_tokens_total": 7, "prompt_tokens_total": 3, "time_to_first_token_seconds_count": 1,
            "inter_token_latency_seconds_count": 6, "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
        }.items():  # fmt: skip
            sample = named[f"vllm:{name}"]
            assert (sample.value, sample.labels["model_name"]) == (value, "tales")
