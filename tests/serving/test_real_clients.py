"""The server and the clients that people have, each in a process of its own (`make peers`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import peers
from support.serving import Running, serving

import gpt2onnx

PROMPT = "Once upon a time"
TOKENS = 12

# Each prints its version, and the answers as a whole and from a stream.
LITELLM = """
import json, sys
from importlib.metadata import version
import litellm
url, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
common = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": tokens, "temperature": 0}
messages = [{"role": "user", "content": prompt}]
chat = litellm.completion(model="openai/tales", messages=messages, **common).choices[0].message.content
chunks = litellm.completion(model="openai/tales", messages=messages, stream=True, **common)
stream = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
plain = litellm.text_completion(model="text-completion-openai/tales", prompt=prompt, **common).choices[0].text
print("litellm", version("litellm"))
print(json.dumps({"chat": chat, "stream": stream, "plain": plain}))
"""
LANGCHAIN = """
import json, sys
from importlib.metadata import version
from langchain_openai import ChatOpenAI, OpenAI
url, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
common = {"model": "tales", "base_url": f"{url}/v1", "api_key": "none", "max_tokens": tokens, "temperature": 0}
model = ChatOpenAI(**common)
answers = {"chat": model.invoke(prompt).content, "stream": "".join(chunk.content for chunk in model.stream(prompt))}
print("langchain-openai", version("langchain-openai"))
print(json.dumps(answers | {"plain": OpenAI(**common).invoke(prompt)}))
"""
LLM = """
import json, os, subprocess, sys
from importlib.metadata import version
from pathlib import Path
url, prompt, tokens = sys.argv[1:4]
Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(
    f"- model_id: tales\\n  model_name: tales\\n  api_base: {url}/v1\\n  api_key_name: none\\n"
)
command = [sys.executable, "-m", "llm", "-m", "tales", "--key", "none", "-o", "max_tokens", tokens, "-o", "temperature", "0", prompt]
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
CLIENTS = {"litellm": LITELLM, "langchain-openai": LANGCHAIN, "llm": LLM}


@pytest.fixture(scope="module")
def server(model: gpt2onnx.Model) -> Iterator[Running]:
    with serving(model, chat_template="turns") as running:
        yield running


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_the_model_s_text(client: str, server: Running, model: gpt2onnx.Model, tmp_path: Path) -> None:
    interpreter = peers.clients()
    end = model.tokenizer.decode(model.generation_config.eos_token_ids, skip_special_tokens=False)
    expected = {
        name: model.generate(prompt, max_new_tokens=TOKENS).text
        for name, prompt in {"chat": PROMPT + end, "stream": PROMPT + end, "plain": PROMPT}.items()
    }
    answers = peers.run_python(
        CLIENTS[client], server.address, PROMPT, TOKENS, interpreter=interpreter, LLM_USER_PATH=str(tmp_path)
    )
    # llm prints a text without the spaces around it.
    assert {name: text.strip() for name, text in answers.items()} == {
        name: text.strip() for name, text in expected.items() if name in answers
    }


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
