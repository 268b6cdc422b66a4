"""Several models in one server: each answers by its name, is loaded when it is asked for, and makes room when it is idle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.commands import CommandLine, wait_until
from support.serving import ControlledModel, Running, serving

import gpt2onnx
from gpt2onnx.errors import BackendError
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.serving.http.server import Settings, listen, make_server
from gpt2onnx.serving.pool import Unloaded
from gpt2onnx.serving.responses import ApiError

GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture
def unloaded(tales_int8_bundle: Path) -> Callable[[list[str]], Unloaded]:
    """A model that notes when it is loaded."""

    def make(loads: list[str], name: str = "int8") -> Unloaded:
        def load() -> gpt2onnx.Model:
            loads.append(name)
            return gpt2onnx.load(tales_int8_bundle, threads=1, wide_after=0)

        return Unloaded(Bundle.open(tales_int8_bundle), load)

    return make


def figures(server: Running, name: str) -> dict[str, float]:
    """A metric of vLLM's by model."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"vllm:{name}"]
    assert len({sample.labels["model_name"] for sample in samples}) == len(samples)
    return {sample.labels["model_name"]: sample.value for sample in samples}


def test_models_answer_by_their_names(
    tales_model: gpt2onnx.Model, tales_int8_bundle: Path, unloaded: Callable[[list[str]], Unloaded]
) -> None:
    loads: list[str] = []
    small = gpt2onnx.load(tales_int8_bundle, threads=1, wide_after=0)
    expected = {"tales": tales_model, "int8": small}
    with serving(tales_model, others={"int8": unloaded(loads)}, chat_template="turns") as server:
        listed = server.client.get("/v1/models").json()["data"]
        assert [(one["id"], one["dtype"]) for one in listed] == [("tales", "fp32"), ("int8", "int8")]
        assert server.client.get("/v1/models/int8").json() == listed[1]
        assert [one["device"] for one in listed] == ["cpu", None]
        assert loads == []
        for name in ("int8", "tales", "int8", ""):
            text = server.text("The old king", model=name, **GREEDY)
            assert text == expected[name or "tales"].generate("The old king", max_new_tokens=8).text
        assert loads == ["int8"]
        talk = {"messages": [{"role": "user", "content": "Hello"}], **GREEDY}
        assert server.client.post("/v1/chat/completions", json=talk | {"model": "int8"}).json()["model"] == "int8"
        assert server.client.post("/tokenize", json={"prompt": "a", "model": "int8"}).status_code == 200
        refused = server.complete(model="other")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "only 'tales', 'int8'" in refused.json()["error"]["message"]
        assert server.client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        assert figures(server, "generation_tokens_total") == {"tales": 16, "int8": 24}


def test_the_idle_model_makes_room(tales_model: gpt2onnx.Model, unloaded: Callable[[list[str]], Unloaded]) -> None:
    loads: list[str] = []
    first = unloaded(loads)

    def load_with_room_for_one() -> gpt2onnx.Model:
        if len(server.server.pool.engines) > 1:
            raise BackendError("needs at least 1 GB more")
        return first.load()

    others = {name: Unloaded(first.bundle, load_with_room_for_one) for name in ("a", "b")}
    with serving(tales_model, others=others) as server:
        for name in ("a", "b", "a"):
            assert server.text(model=name, **GREEDY)
        assert len(loads) == 3
        assert len(server.server.pool.engines) == 2
        assert server.text(model="tales", **GREEDY)
        assert figures(server, "request_queue_time_seconds_count") == {"tales": 1, "a": 2, "b": 1}


def test_no_model_is_dropped_while_it_works(
    tales_model: gpt2onnx.Model, unloaded: Callable[[list[str]], Unloaded]
) -> None:
    one = unloaded([])
    slow = Unloaded(one.bundle, lambda: ControlledModel(one.load(), delay=0.05))  # type: ignore[arg-type, return-value]

    def refuse() -> gpt2onnx.Model:
        raise BackendError("needs at least 1 GB more")

    with serving(tales_model, others={"slow": slow, "large": Unloaded(one.bundle, refuse)}) as server:
        body = {"model": "slow", "prompt": "Once", "stream": True, "temperature": 0, "max_tokens": 400}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
            answer = server.complete(model="large")
            # 1 row of the 16 in the batch and the 4 for small requests beside it.
            assert figures(server, "kv_cache_usage_perc") == {"tales": 0, "slow": 1 / 20}
        assert answer.status_code == 503
        assert "'large' can't be loaded: needs at least 1 GB more" in answer.json()["error"]["message"]


def test_a_model_with_a_request_that_is_read_is_not_dropped(
    tales_model: gpt2onnx.Model, unloaded: Callable[[list[str]], Unloaded]
) -> None:
    one = unloaded([])

    def refuse() -> gpt2onnx.Model:
        raise BackendError("needs at least 1 GB more")

    with listen("127.0.0.1", 0) as listener:
        others = {"small": one, "large": Unloaded(one.bundle, refuse)}
        pool = make_server(tales_model, listener, Settings(names=["tales"], others=others)).pool

    async def load_large() -> None:
        with pytest.raises(ApiError, match="'large' can't be loaded"):
            async with pool.use("large"):
                pass

    async def run() -> None:
        async with pool.use("small") as service:
            await load_large()
            assert pool.services == [pool.first, service]
        await load_large()
        assert pool.services == [pool.first]
        assert not service.engine.alive

    asyncio.run(run())


def test_the_other_models_answer_while_one_loads(
    tales_model: gpt2onnx.Model, unloaded: Callable[[list[str]], Unloaded]
) -> None:
    one, begun, end = unloaded([]), threading.Event(), threading.Event()

    def load_slowly() -> gpt2onnx.Model:
        begun.set()
        assert end.wait(60)
        return one.load()

    others = {"int8": one, "slow": Unloaded(one.bundle, load_slowly)}
    with serving(tales_model, others=others) as server, ThreadPoolExecutor(50) as clients:
        expected = server.text(model="int8", **GREEDY)
        # More than there are threads to read requests in.
        slow = [clients.submit(server.text, model="slow", **GREEDY) for _ in range(50)]
        try:
            wait_until(begun.is_set)
            assert server.text(model="int8", **GREEDY) == expected
            assert server.text(model="tales", **GREEDY)
            assert not any(each.done() for each in slow)
        finally:
            end.set()
        assert {each.result() for each in slow} == {expected}


def test_names_on_the_command_line(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line("serve", "-m", f"a={tales_bundle}", "-m", f"a={tales_bundle}", "--port", 0)
    assert (done.code, "two models are called 'a'" in done.err) == (2, True)
    done = command_line("serve", "-m", "a=x", "-m", "b=y", "--served-model-name", "c")
    assert (done.code, "--served-model-name goes with one model" in done.err) == (2, True)
