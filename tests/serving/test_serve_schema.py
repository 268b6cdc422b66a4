"""Requests made from the server's own OpenAPI document, valid and invalid ones: schemathesis looks for what it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from support.checkpoints import MakeCheckpoint
from support.serving import Running, serving

import gpt2onnx

# What the schema allows is refused as well where options contradict each other or don't suit the model. A body, right or wrong, may
# be larger than the server takes.
CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {
            "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "413"]},
            "negative_data_rejection": {"expected-statuses": ["400", "404", "413"]},
        }
    }
)


@pytest.fixture(scope="module")
def server(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bundle = gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("bundle") / "tiny").folder
    with serving(gpt2onnx.load(bundle, threads=1), names=["tiny"], max_batch=4, chat_template="turns") as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "mode", "examples"),
    [
        ("POST", "/v1/completions", GenerationMode.POSITIVE, 40),
        ("POST", "/v1/completions", GenerationMode.NEGATIVE, 40),
        ("POST", "/v1/chat/completions", GenerationMode.POSITIVE, 25),
        ("POST", "/v1/chat/completions", GenerationMode.NEGATIVE, 25),
        ("POST", "/tokenize", GenerationMode.POSITIVE, 15),
        ("POST", "/detokenize", GenerationMode.POSITIVE, 15),
        ("GET", "/version", GenerationMode.POSITIVE, 1),
        ("GET", "/v1/models", GenerationMode.POSITIVE, 1),
        ("GET", "/v1/models/{model}", GenerationMode.POSITIVE, 15),
        ("GET", "/health", GenerationMode.POSITIVE, 1),
        ("GET", "/metrics", GenerationMode.POSITIVE, 1),
    ],
)
def test_interface_keeps_to_its_schema(
    server: Running, method: str, path: str, mode: GenerationMode, examples: int
) -> None:
    """Status, content type, headers and body are those of the document; wrong requests are refused, right ones aren't."""
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json", config=CONFIG)
    statuses = set()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call()
        case.validate_response(response)
        statuses.add(response.status_code)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
        assert server.engine.failure is None

    check()
    if method == "POST":
        assert (200 in statuses) == (mode is GenerationMode.POSITIVE), statuses
    server.wait_for_idle()


def test_what_the_document_says(server: Running) -> None:
    """No status that isn't sent, and no token beyond the vocabulary. Ranges of numbers, in the schema's own words."""
    document = server.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    for name, least in (("n", 1), ("max_tokens", 0), ("top_k", 0), ("seed", -(2**63)), ("logprobs", 0)):
        assert fields[name]["anyOf"][0]["minimum"] == least
    assert not any(
        "422" in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )
    assert "ValidationError" not in str(document)
    largest = server.client.get("/v1/models").json()["data"][0]["vocab_size"] - 1
    kinds = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    (ids,) = [kind["items"] for kind in kinds if kind.get("items", {}).get("type") == "integer"]
    assert (ids["minimum"], ids["maximum"]) == (0, largest)
    assert server.complete([largest], max_tokens=1).status_code == 200
    assert server.complete([largest + 1], max_tokens=1).status_code == 400
    for tokens, status in (([largest], 200), ([largest + 1], 400)):
        assert server.client.post("/detokenize", json={"tokens": tokens}).status_code == status
