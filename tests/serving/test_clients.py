"""What clients of other servers send and expect: names, fields, methods, forms of bodies, places to listen."""

from __future__ import annotations

import gzip
import json
import signal
import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.commands import CommandLine, start, wait_until
from support.serving import Running, connect, serving
from support.systems import posix

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.serving.http.guard import Admission
from gpt2onnx.serving.http.server import origin_of

JSON = {"content-type": "application/json"}


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


# Fields


def test_fields_of_vllm_and_llama_cpp(server: Running, model: gpt2onnx.Model) -> None:
    plain = {"temperature": 0, "max_tokens": 12}
    text = server.text(**plain)
    assert server.text(temperature=0, n_predict=12) == text
    pointed = {"seed": 1.0, "logprobs": 2.0, "prompt_lookup": 2.0, "num_beams": 1.0, "stop_token_ids": [8190.0],
               "truncate_prompt_tokens": 100.0, "prompt_logprobs": 0.0, "logit_bias": {"8190": -1.0}}  # fmt: skip
    assert server.text(temperature=0, max_tokens=12.0, **pointed) == text
    assert server.text([float(token) for token in model.tokenizer.encode("Once upon a time")], **plain) == text
    assert server.text(n_predict=0) == ""
    ids = model.tokenizer.encode(text)
    (ended,) = server.complete(**plain, stop_token_ids=[ids[3]]).json()["choices"]
    assert ended["finish_reason"] == "stop"
    assert model.tokenizer.encode(ended["text"]) in (ids[: ids.index(ids[3]) + 1], ids[: ids.index(ids[3])])
    later = server.complete(**plain, stop_token_ids=[ids[3]], min_tokens=8).json()
    assert later["usage"]["completion_tokens"] >= 8
    # Its own end token, made likely by the bias, is passed over.
    end = model.generation_config.eos_token_ids[0]
    biased = plain | {"sequence_bias": [[[end], 100.0]]}
    assert server.complete(**biased).json()["usage"]["completion_tokens"] == 1
    assert server.complete(**biased, ignore_eos=True).json()["usage"]["completion_tokens"] == 12
    prompt = "The old king said that once upon a time"
    last = model.tokenizer.encode(prompt)[-4:]
    assert server.text(prompt, **plain, truncate_prompt_tokens=4) == server.text(last, **plain)
    stopped = server.choice(**plain, stop=text[8:11], include_stop_str_in_output=True)
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[8:11]) + 3], "stop")
    body = {"prompt": "Once upon a time", "stream": True, "stop": text[8:11], "include_stop_str_in_output": True}
    events = server.client.post("/v1/completions", json=plain | body).text.split("data: ")[1:-1]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == stopped["text"]
    named = server.choice(**plain, logprobs=0, return_tokens_as_token_ids=True)["logprobs"]["tokens"]
    assert named == [f"token_id:{token}" for token in ids]
    beams = server.complete(**plain, n=3, use_beam_search=True).json()["choices"]
    expected = model.generate("Once upon a time", num_beams=3, num_return_sequences=3, max_new_tokens=12)
    assert [choice["text"] for choice in beams] == [sequence.text for sequence in expected.sequences]
    # Fewer texts fit the grammar than there are beams: the rest are empty, and each choice is there.
    few = server.complete([[1, 2], [3]], max_tokens=4, n=3, use_beam_search=True, regex="a|b").json()["choices"]
    assert [choice["index"] for choice in few] == list(range(6))
    assert [sorted(choice["text"] for choice in few[part : part + 3]) for part in (0, 3)] == [["", "a", "b"]] * 2
    assert {choice["finish_reason"] for choice in few} == {"stop"}
    for nothing in (
        {"suffix": ""}, {"suffix": None}, {"stop": None}, {"stop": ""}, {"stop": []}, {"temperature": 0.0, "model": ""},
        {"prediction": None, "unheard_of": None},
    ):  # fmt: skip
        assert server.text(**plain | nothing) == text


def test_biases_and_penalties(server: Running, tales_model: gpt2onnx.Model) -> None:
    plain = {"temperature": 0, "max_tokens": 12}
    first = tales_model.generate("Once upon a time", max_new_tokens=1).sequences[0].token_ids[0]
    assert server.text(**plain, logit_bias={}) == server.text(**plain)
    banned = server.complete(**plain, logit_bias={str(first): -100}).json()
    assert (
        banned["choices"][0]["text"]
        == tales_model.generate("Once upon a time", max_new_tokens=12, bad_words_ids=[[first]]).text
    )
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    expected = tales_model.generate("Once upon a time", max_new_tokens=12, **penalties)
    assert server.text(**plain, **penalties) == expected.text


def test_usage_with_every_event(server: Running) -> None:
    response = server.complete(
        temperature=0,
        max_tokens=6,
        stream=True,
        stream_options={"continuous_usage_stats": True, "include_usage": True, "include_obfuscation": False},
    )
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_a_high_temperature(server: Running, tales_model: gpt2onnx.Model) -> None:
    expected = tales_model.generate(
        "Once upon a time", do_sample=True, top_k=0, temperature=3.5, seed=1, max_new_tokens=16
    )
    assert server.text(temperature=3.5, seed=1) == expected.text


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [({"n": 15}, [6, 6, 3]), ({"n": 7, "guidance_scale": 2.0, "negative_prompt": "Sadly"}, [3, 3, 1])],
)
def test_more_choices_than_the_batch_holds(
    fields: dict[str, Any], sizes: list[int], server: Running, tales_model: gpt2onnx.Model
) -> None:
    """They run in parts: the first with the seed, the next one with the number after it."""
    fields |= {"eos_token_id": -1}
    options = {name: value for name, value in fields.items() if name != "n"}
    wanted = [
        sequence.text
        for part, size in enumerate(sizes)
        for sequence in tales_model.generate(
            "Once upon a time",
            do_sample=True,
            top_k=0,
            seed=(2**32 - 1 + part) % 2**32,
            num_return_sequences=size,
            max_new_tokens=8,
            **options,
        ).sequences
    ]
    asked = fields | {"seed": 2**32 - 1, "max_tokens": 8}
    body = server.complete(["Once upon a time", "A"], **asked).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(wanted)))
    assert [choice["text"] for choice in body["choices"]][: len(wanted)] == wanted
    assert body["usage"]["completion_tokens"] == 2 * 8 * len(wanted)
    texts = [""] * len(wanted)
    for line in server.complete(**asked, stream=True).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == wanted


def test_best_of_more_than_the_batch_holds(server: Running) -> None:
    asked = {"max_tokens": 8, "seed": 1, "logprobs": 0}
    made = server.complete(n=15, **asked).json()["choices"]
    mean = {one["text"]: sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"]) for one in made}
    best = server.complete(n=8, best_of=15, **asked, echo=True).json()["choices"]
    ranked = sorted(mean, key=mean.__getitem__, reverse=True)[:8]
    assert [choice["text"] for choice in best] == ["Once upon a time" + text for text in ranked]
    assert all(choice["logprobs"]["token_logprobs"][0] is None for choice in best)


def test_limits_are_named(server: Running) -> None:
    assert "16" in message(server.complete(stop=["a"] * 50))
    assert message(server.complete(suffix="x")).startswith("suffix: ")
    huge = server.complete(**{"x" * 900_000: 1})
    assert huge.status_code == 400
    assert len(huge.content) < 1000


def test_offsets_behind_half_a_letter(server: Running, model: gpt2onnx.Model) -> None:
    ids = [model.tokenizer.encode(letter)[0] for letter in "abc"]
    half = next(token for token in range(model.config.vocab_size) if model.tokenizer.token_bytes(token) == b"\xf0")
    echoed = server.choice([ids[0], half, ids[1], ids[2]], echo=True, logprobs=0, max_tokens=0)
    assert echoed["text"] == "a\ufffdbc"
    assert echoed["logprobs"]["text_offset"] == [0, 1, 2, 3]


# Bodies, methods and headers


def test_bodies_that_are_not_plain_utf_8(server: Running) -> None:
    body = b'{"prompt": "a"}'
    zipped = server.client.post(
        "/v1/completions", content=gzip.compress(body), headers=JSON | {"content-encoding": "gzip"}
    )
    assert zipped.status_code == 415
    assert "without Content-Encoding" in message(zipped)
    latin = server.client.post("/v1/completions", content=b'{"prompt": "\xe9t\xe9"}', headers=JSON)
    assert (latin.status_code, message(latin)) == (400, "byte 12 of the body, 0xe9, is not UTF-8")


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ping", "/version", "/v1/models"])
def test_probes(path: str, server: Running) -> None:
    head = server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert server.client.get(path).status_code == 200


def test_ids_of_requests(server: Running) -> None:
    assert server.client.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    first, second = (server.client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_version_and_length_for_clients(server: Running, model: gpt2onnx.Model) -> None:
    assert server.client.get("/version").json() == {"version": gpt2onnx.__version__}
    (entry,) = server.client.get("/v1/models").json()["data"]
    assert entry["max_model_len"] == model.config.n_positions


def test_pages_of_other_origins(model: gpt2onnx.Model) -> None:
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    admission = Admission(keys=[b"key"], only_local=False)
    with serving(model, cors_origins=["https://a.example"], admission=admission) as server:
        allowed = server.client.options("/v1/completions", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
        refused = server.client.options("/v1/completions", headers=asked | {"origin": "https://b.example"})
        assert refused.status_code == 400
        answer = server.client.get("/v1/models", headers={"origin": "https://a.example", "authorization": "Bearer key"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
    with serving(model) as server:
        assert "access-control-allow-origin" not in server.client.get("/health", headers=asked).headers


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTPS://A.example:443", "https://a.example"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://a.example:443", "http://a.example:443"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_origins_as_browsers_send_them(given: str, sent: str) -> None:
    assert origin_of(given) == sent


@pytest.mark.parametrize(
    "text", ["foo", "", "localhost:3000", "http://", "http://a/b", "//a", "http://a:b", "http://a@b", "https://*.a.b"]
)
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(OptionError, match="is no origin: give a page's scheme, host and port"):
        origin_of(text)


def test_names_of_the_machine(model: gpt2onnx.Model) -> None:
    with serving(model, admission=Admission(hosts=["Host.docker.internal"])) as server:
        for host, status in (
            ("host.docker.internal", 200),
            ("HOST.Docker.internal:80", 200),
            ("host.docker.internal:8000", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ):
            assert server.client.get("/health", headers={"host": host}).status_code == status


def test_behind_a_proxy_s_path(model: gpt2onnx.Model) -> None:
    """Keys are asked for, and requests counted, by the path that the proxy hands on."""
    with serving(model, root_path="/api", admission=Admission(keys=[b"key"])) as server:
        for path in ("/v1/models", "/metrics"):
            assert server.client.get(path).status_code == 401
        server.client.headers["authorization"] = "Bearer key"
        assert server.complete(max_tokens=1).status_code == 200
        assert server.client.get("/openapi.json").json()["servers"] == [{"url": "/api"}]
        assert server.metric("http_requests_total") == 1
    for root, target in (("/", "v1/models"), ("/v", "1/models"), ("/v1", "/models"), ("/m", "etrics")):
        with serving(model, root_path=root, admission=Admission(keys=[b"key"])) as server, ExitStack() as opened:
            request = f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            status = connect(server.address, opened, request.encode()).makefile("rb").readline().split()[1]
            assert status in (b"401", b"404"), (root, target)


# Places to listen


@posix
def test_unix_socket_names_and_template(tales_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    place = tmp_path / "socket"
    command = ["serve", "-m", str(tales_bundle), "--uds", str(place), "--chat-template", "turns", "--root-path", "/api"]
    names = ["--served-model-name", "a", "b"]
    process = start(*command, *names)
    try:
        wait_until(place.exists, 60)
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(place)), base_url="http://localhost", timeout=60
        ) as client:
            assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["a", "b"]
            chat = client.post(
                "/v1/chat/completions",
                json={"model": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
            )
            assert (chat.status_code, chat.json()["model"]) == (200, "a")
        second = command_line(*command)
        assert (second.code, second.err.count("\n")) == (1, 1)
        assert "can't listen on" in second.err
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == f"a is served at unix:{place}\n"
    assert not place.exists()


@posix
def test_tls(tales_bundle: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl can't make a certificate here")
    process = start("serve", "-m", tales_bundle, "--port", 0, "--ssl-certfile", certificate, "--ssl-keyfile", key)
    try:
        assert process.stderr is not None
        address = process.stderr.readline().rpartition(" ")[2].strip()
        assert address.startswith("https://127.0.0.1:")
        assert (
            httpx.get(f"{address}/health", verify=ssl.create_default_context(cafile=str(certificate))).status_code
            == 200
        )
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_certificate_that_is_none(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    done = command_line("serve", "-m", tales_bundle, "--port", 0, "--ssl-certfile", tmp_path / "cert.pem")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"can't use {tmp_path / 'cert.pem'} for TLS" in done.err
