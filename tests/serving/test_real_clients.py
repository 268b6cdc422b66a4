"""The server and the clients that people have, each in a process of its own (`make peers`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support import peers
from support.commands import wait_until
from support.serving import Running, serving

import gpt2onnx

PROMPT = "Once upon a time"
TOKENS = 12

# Each prints its version, and the answers as a whole and from a stream.
OPENAI = """
import json, sys
from importlib.metadata import version
from openai import OpenAI
url, name, prompt, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
common = {"model": name, "max_tokens": tokens, "temperature": 0}
messages = [{"role": "user", "content": prompt}]
chunks = client.chat.completions.create(messages=messages, stream=True, **common)
answers = {
    "chat": client.chat.completions.create(messages=messages, **common).choices[0].message.content,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    "plain": client.completions.create(prompt=prompt, **common).choices[0].text,
}
print("openai", version("openai"))
print(json.dumps(answers))
"""
LITELLM = """
import json, sys
from importlib.metadata import version
import litellm
url, name, prompt, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
common = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": tokens, "temperature": 0}
messages = [{"role": "user", "content": prompt}]
chat = litellm.completion(model=f"openai/{name}", messages=messages, **common).choices[0].message.content
chunks = litellm.completion(model=f"openai/{name}", messages=messages, stream=True, **common)
stream = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
plain = litellm.text_completion(model=f"text-completion-openai/{name}", prompt=prompt, **common).choices[0].text
print("litellm", version("litellm"))
print(json.dumps({"chat": chat, "stream": stream, "plain": plain}))
"""
LANGCHAIN = """
import json, sys
from importlib.metadata import version
from langchain_openai import ChatOpenAI, OpenAI
url, name, prompt, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
common = {"model": name, "base_url": f"{url}/v1", "api_key": "none", "max_tokens": tokens, "temperature": 0}
model = ChatOpenAI(**common)
answers = {"chat": model.invoke(prompt).content, "stream": "".join(chunk.content for chunk in model.stream(prompt))}
print("langchain-openai", version("langchain-openai"))
print(json.dumps(answers | {"plain": OpenAI(**common).invoke(prompt)}))
"""
LLM = """
import json, os, subprocess, sys
from importlib.metadata import version
from pathlib import Path
url, name, prompt, tokens = sys.argv[1:5]
Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(
    f"- model_id: {name}\\n  model_name: {name}\\n  api_base: {url}/v1\\n  api_key_name: none\\n"
)
command = [sys.executable, "-m", "llm", "-m", name, "--key", "none", "-o", "max_tokens", tokens, "-o", "temperature", "0", prompt]
whole, stream = (
    subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout.removesuffix("\\n")
    for more in (["--no-stream"], [])
)
print("llm", version("llm"))
print(json.dumps({"chat": whole, "stream": stream}))
"""
LM_EVAL = """
import json, sys
from importlib.metadata import version
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
url, folder, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
requests = [
    Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=0, metadata=("story", index, 1))
    for index, pair in enumerate(pairs)
]
served = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions", model="tales", tokenizer=folder, tokenizer_backend="huggingface", max_length=512
)
found = {"served": served.loglikelihood(requests), "theirs": HFLM(pretrained=folder, device="cpu", dtype="float32").loglikelihood(requests)}
print("lm-eval", version("lm-eval"))
print(json.dumps({name: [list(each) for each in answers] for name, answers in found.items()}))
"""
GUIDELLM = """
import json, subprocess, sys
from importlib.metadata import version
url, folder, form, report, requests, tokens = sys.argv[1:]
command = [
    sys.executable, "-m", "guidellm", "run", "--disable-console",
    "--backend", f"kind=openai_http,target={url},request_format={form}",
    "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={requests}",
    "--tokenizer", f"kind=huggingface_auto,model={folder}",
    "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={tokens}", "--output", f"kind=json,path={report}",
]
subprocess.run(command, check=True, stdout=sys.stderr)
metrics = json.load(open(report))["benchmarks"][0]["metrics"]
print("guidellm", version("guidellm"))
print(json.dumps({"requests": metrics["request_totals"], "tokens": metrics["output_token_count"]["successful"]["total_sum"]}))
"""
CLIENTS = {"openai": OPENAI, "litellm": LITELLM, "langchain-openai": LANGCHAIN, "llm": LLM}

# DialoGPT's, as its tokenizer_config.json has it.
DIALOGUE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tales_bundle: Path) -> Iterator[Running]:
    with serving(gpt2onnx.load(tales_bundle, threads=1), names=["tales"], chat_template="turns") as running:
        yield running


@pytest.fixture(scope="module")
def dialogue(tales_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A bundle whose chat template came with the checkpoint, as DialoGPT's does."""
    folder = tmp_path_factory.mktemp("dialogue")
    checkpoint = shutil.copytree(tales_checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns("training"))
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": DIALOGUE}))
    bundle = gpt2onnx.export(checkpoint, folder / "bundle").folder
    with serving(gpt2onnx.load(bundle, threads=1), names=["dialogue"]) as running:
        yield running


def expected(model: gpt2onnx.Model) -> dict[str, str]:
    """The texts that the model gives without a server, for each kind of answer."""
    end = model.tokenizer.decode(model.generation_config.eos_token_ids, skip_special_tokens=False)
    chat, plain = (model.generate(prompt, max_new_tokens=TOKENS).text for prompt in (PROMPT + end, PROMPT))
    return {"chat": chat, "stream": chat, "plain": plain}


@pytest.mark.parametrize("served", ["tales", "dialogue"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_the_model_s_text(
    client: str, served: str, server: Running, dialogue: Running, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    interpreter = peers.clients()
    address = {"tales": server, "dialogue": dialogue}[served].address
    answers = peers.run_python(
        CLIENTS[client], address, served, PROMPT, TOKENS, interpreter=interpreter, LLM_USER_PATH=str(tmp_path)
    )
    # llm prints a text without the spaces around it.
    assert {name: text.strip() for name, text in answers.items()} == {
        name: text.strip() for name, text in expected(tales_model).items() if name in answers
    }


def test_open_webui_gets_the_models_texts(
    server: Running, dialogue: Running, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    """A server of its own, with both models as its connections: it lists them and chats, as its page does."""
    program = peers.open_webui().with_name("open-webui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "DATA_DIR": str(tmp_path), "WEBUI_SECRET_KEY": "0" * 64, "ENABLE_OLLAMA_API": "false", "RAG_EMBEDDING_ENGINE": "openai",
        "OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OPENAI_API_KEYS": "none;none",
        "OPENAI_API_BASE_URLS": f"{server.address}/v1;{dialogue.address}/v1",
    }  # fmt: skip
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | settings, cwd=tmp_path, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_until(lambda: process.poll() is not None or answers(client), 600)
            print("open-webui", client.get("/api/version").json()["version"])
            account = {"name": "a", "email": "a@example.com", "password": "a-long-password-1"}
            token = client.post("/api/v1/auths/signup", json=account).json()["token"]
            client.headers["Authorization"] = f"Bearer {token}"
            assert {model["id"] for model in client.get("/api/models").json()["data"]} == {"tales", "dialogue"}
            for name in ("tales", "dialogue"):
                body = {
                    "model": name, "messages": [{"role": "user", "content": PROMPT}], "features": {"web_search": False}, "variables": {},
                    "params": {"temperature": 0, "max_tokens": TOKENS, "seed": 1, "stop": ["<stop>"], "top_p": 0.9, "frequency_penalty": 0},
                }  # fmt: skip
                whole = client.post("/api/chat/completions", json=body | {"stream": False})
                assert whole.json()["choices"][0]["message"]["content"] == expected(tales_model)["chat"], whole.text
                more = {"stream": True, "stream_options": {"include_usage": True}}
                events = client.post("/api/chat/completions", json=body | more).text.split("data: ")[1:]
                parts = [json.loads(event) for event in events if not event.startswith("[DONE]")]
                text = "".join(choice["delta"].get("content", "") for part in parts for choice in part["choices"])
                assert text == expected(tales_model)["stream"]
                assert parts[-1]["usage"]["completion_tokens"] == TOKENS
    finally:
        process.terminate()
        process.wait(60)


def answers(client: httpx.Client) -> bool:
    """Whether a server is there."""
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


@pytest.mark.parametrize("form", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_loses_no_request(form: str, server: Running, tales_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    found = peers.run_python(
        GUIDELLM, server.address, tales_bundle, form, report, 20, TOKENS, interpreter=peers.guidellm()
    )
    assert found["requests"] == {"successful": 20, "errored": 0, "incomplete": 0, "total": 20}
    assert found["tokens"] == 20 * TOKENS  # it asks for texts that go on after an end token


def test_lm_eval_measures_what_its_own_model_gives(server: Running, tales_checkpoint: Path) -> None:
    interpreter = peers.lm_eval()
    pairs = [
        ["Once upon a time there was a", " king"],
        ["Once upon a time there was a", " poor woodcutter who had three daughters"],
        ["The old king", " said: 'My dear son, go out into the world.'"],
    ]
    found = peers.run_python(LM_EVAL, server.address, tales_checkpoint, json.dumps(pairs), interpreter=interpreter)
    for (ours, greedy), (theirs, their_greedy) in zip(found["served"], found["theirs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert greedy == their_greedy
