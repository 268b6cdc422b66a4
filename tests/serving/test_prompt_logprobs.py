"""Log probabilities of prompts in vLLM's form, against PyTorch's of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.golden import Golden
from support.reference import Reference
from support.serving import Running, serving

import gpt2onnx

PROMPT = "Once upon a time there was a café by the sea, and the king’s"  # noqa: RUF001
END = "<|endoftext|>"
CLOSE = 2e-4


def expected(reference: Reference, golden: Golden, ids: list[int], count: int) -> list[dict[str, Any]]:
    """Of each token but the first: its log probability, its rank with and without its near ties, and the likeliest tokens."""

    def torchs() -> list[dict[str, Any]]:
        import torch

        rows = torch.from_numpy(reference.live_logits(np.array(ids)))[:-1].log_softmax(-1)
        return [
            {
                "logprob": float(row[token]),
                "ranks": [1 + int((row > row[token] + CLOSE).sum()), int((row > row[token] - CLOSE).sum())],
                "top": row.topk(count).indices.tolist(),
                "values": row.topk(count).values.tolist(),
            }
            for token, row in zip(ids[1:], rows, strict=True)
        ]

    answer: list[dict[str, Any]] = golden.answer(["prompt", ids, count], torchs)
    return answer


def assert_same(found: list[dict[str, Any] | None], ids: list[int], wanted: list[dict[str, Any]]) -> None:
    assert found[0] is None
    assert len(found) == len(ids)
    for entry, token, theirs in zip(found[1:], ids[1:], wanted, strict=True):
        assert entry is not None
        assert next(iter(entry)) == str(token)
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(theirs["logprob"], abs=CLOSE)
        assert theirs["ranks"][0] <= own["rank"] <= theirs["ranks"][1]
        assert set(entry) == {str(token), *map(str, theirs["top"])}
        for rank, (name, value) in enumerate(zip(theirs["top"], theirs["values"], strict=True), start=1):
            assert entry[str(name)]["rank"] == rank
            assert entry[str(name)]["logprob"] == pytest.approx(value, abs=CLOSE)


def test_each_token_of_the_prompt(
    server: Running, model: gpt2onnx.Model, tales_reference: Reference, golden: Golden
) -> None:
    ids = model.tokenizer.encode(PROMPT)
    texts = golden.answer(["decoded", ids], lambda: [tales_reference.tokenizer().decode([token]) for token in ids])
    assert "\ufffd" in "".join(texts), "a token that is half a letter"
    for count in (0, 3):
        wanted = expected(tales_reference, golden, ids, count)
        found = server.choice(PROMPT, prompt_logprobs=count, max_tokens=2)["prompt_logprobs"]
        assert_same(found, ids, wanted)
        assert [entry[str(token)]["decoded_token"] for entry, token in zip(found[1:], ids[1:], strict=True)] == texts[
            1:
        ]


def test_beside_echoed_log_probabilities(server: Running, model: gpt2onnx.Model) -> None:
    """Each count holds for its own field, and the choices of a prompt have the same."""
    asked = {"max_tokens": 3, "n": 2, "seed": 5, "echo": True}
    alone = server.complete([PROMPT, "A"], **asked, logprobs=1).json()["choices"]
    both = server.complete([PROMPT, "A"], **asked, logprobs=1, prompt_logprobs=4).json()["choices"]
    told = [choice.pop("prompt_logprobs") for choice in both]
    assert both == alone
    assert told[0] == told[1]
    assert told[2] == told[3] == [None]
    ids = model.tokenizer.encode(PROMPT)
    values = both[0]["logprobs"]["token_logprobs"]
    assert [entry[str(token)]["logprob"] for entry, token in zip(told[0][1:], ids[1:], strict=True)] == values[
        1 : len(ids)
    ]


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"best_of": 3, "n": 1}, {"max_tokens": 0}, {"n": 8, "seed": 1}, {"guidance_scale": 2.0}],
)
def test_with_every_strategy(server: Running, options: dict[str, Any]) -> None:
    choices = server.complete(PROMPT, prompt_logprobs=2, **{"max_tokens": 2} | options).json()["choices"]
    plain = server.choice(PROMPT, prompt_logprobs=2, temperature=0, max_tokens=2)["prompt_logprobs"]
    for choice in choices:
        assert choice["prompt_logprobs"] == plain


def test_of_what_is_left_of_the_prompt(
    server: Running, model: gpt2onnx.Model, tales_reference: Reference, golden: Golden
) -> None:
    ids = model.tokenizer.encode(PROMPT)[-5:]
    for prompt in (PROMPT, model.tokenizer.encode(PROMPT)):
        found = server.choice(prompt, prompt_logprobs=1, truncate_prompt_tokens=5)["prompt_logprobs"]
        assert_same(found, ids, expected(tales_reference, golden, ids, 1))


def test_of_a_conversation(server: Running) -> None:
    """Beside the choices, where vLLM has them."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "n": 2}
    chat = server.client.post("/v1/chat/completions", json=body | {"prompt_logprobs": 2}).json()
    assert chat["prompt_logprobs"] == server.choice(PROMPT + END, prompt_logprobs=2)["prompt_logprobs"]
    assert all("prompt_logprobs" not in choice for choice in chat["choices"])
    assert "prompt_logprobs" not in server.client.post("/v1/chat/completions", json=body).json()


@pytest.mark.parametrize(
    "fields", [{"prompt_logprobs": 1, "stream": True}, {"prompt_logprobs": -1}, {"prompt_logprobs": 101}]
)
def test_refused(server: Running, fields: dict[str, Any]) -> None:
    for response in (
        server.complete(**fields),
        server.client.post("/v1/chat/completions", json=fields | {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt_logprobs"


def test_of_a_small_vocabulary(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    bundle = gpt2onnx.export(make_checkpoint(vocab_size=60), tmp_path / "bundle").folder
    with serving(gpt2onnx.load(bundle, threads=1)) as server:
        refused = server.complete([1, 2], prompt_logprobs=61)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
        assert len(server.choice([1, 2], prompt_logprobs=60)["prompt_logprobs"][1]) == 60
