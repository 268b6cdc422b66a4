"""The server, with OpenAI's own client and against the runtime: shapes, texts, streams, errors."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import openai
import pytest
from support.serving import Running

import gpt2onnx

PROMPT = "Once upon a time"


def alone(tales_model: gpt2onnx.Model, **options: Any) -> list[str]:
    """The texts that the runtime gives without a server."""
    options = {"prompts": PROMPT, "max_new_tokens": 16} | options
    return [sequence.text for sequence in tales_model.generate(**options).sequences]


def test_completion(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    completion = client.completions.create(model="tales", prompt=PROMPT, temperature=0)
    assert completion.id.startswith("cmpl-")
    assert (completion.object, completion.model) == ("text_completion", "tales")
    (choice,) = completion.choices
    (expected,) = alone(tales_model)
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == (expected, 0, "length", None)
    assert completion.usage is not None
    counts = completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens
    assert counts == (4, 16, 20)


STRATEGIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0}, {}),
    ({"extra_body": {"do_sample": False}}, {}),
    ({"temperature": 0.7, "top_p": 0.9, "seed": 1, "n": 3},
     {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 1, "num_return_sequences": 3}),
    # OpenAI's defaults: sampling from the whole vocabulary at temperature 1, 16 tokens.
    ({"seed": -1}, {"do_sample": True, "top_k": 0, "seed": 2**32 - 1}),
    ({"seed": 7, "extra_body": {"top_k": 5, "min_p": 0.05, "typical_p": 0.9}},
     {"do_sample": True, "top_k": 5, "min_p": 0.05, "typical_p": 0.9, "seed": 7}),
    ({"n": 2, "extra_body": {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2}},
     {"num_return_sequences": 2, "num_beams": 4, "length_penalty": 0.5, "early_stopping": True, "no_repeat_ngram_size": 2}),
    ({"n": 2, "extra_body": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}},
     {"num_return_sequences": 2, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
    ({"extra_body": {"penalty_alpha": 0.6, "top_k": 4}}, {"penalty_alpha": 0.6, "top_k": 4}),
    ({"temperature": 0, "extra_body": {"guidance_scale": 2.0, "negative_prompt": "Sadly"}},
     {"guidance_scale": 2.0, "negative_prompt": "Sadly"}),
    ({"seed": 3, "extra_body": {"num_beams": 3, "do_sample": True}}, {"num_beams": 3, "do_sample": True, "top_k": 0, "seed": 3}),
    ({"temperature": 0, "max_tokens": 40, "stop": [" and", "king"]}, {"max_new_tokens": 40, "stop": [" and", "king"]}),
    ({"temperature": 0, "extra_body": {"repetition_penalty": 1.3, "suppress_tokens": [5, 6], "bad_words_ids": [[7, 8], [9]],
                                       "min_new_tokens": 3, "prompt_lookup": 4}},
     {"repetition_penalty": 1.3, "suppress_tokens": [5, 6], "bad_words_ids": [[7, 8], [9]], "min_new_tokens": 3}),
    ({"temperature": 0, "extra_body": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2,
                                       "sequence_bias": [[[262], -3], [[263, 264], 1.5]], "begin_suppress_tokens": [262],
                                       "forced_eos_token_id": 300, "exponential_decay_length_penalty": [4, 1.2]}},
     {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2, "sequence_bias": [[[262], -3], [[263, 264], 1.5]],
      "begin_suppress_tokens": [262], "forced_eos_token_id": 300, "exponential_decay_length_penalty": [4, 1.2]}),
    ({"seed": 2, "extra_body": {"top_h": 0.7, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "renormalize_logits": True}},
     {"do_sample": True, "seed": 2, "top_k": 0, "top_h": 0.7, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
      "renormalize_logits": True}),
    ({"temperature": 0, "extra_body": {"forced_eos_token_id": 8191, "skip_special_tokens": False}},
     {"forced_eos_token_id": 8191, "skip_special_tokens": False}),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "options"), STRATEGIES, ids=[str(index) for index in range(len(STRATEGIES))])
@pytest.mark.parametrize("stream", [False, True])
def test_strategies(
    client: openai.OpenAI, tales_model: gpt2onnx.Model, asked: dict[str, Any], options: dict[str, Any], stream: bool
) -> None:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    answer = client.completions.create(model="tales", prompt=PROMPT, stream=stream, **asked)
    for part in answer if stream else [answer]:
        for choice in part.choices:
            assert choice.index not in reasons, "a choice goes on after its end"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert [texts[index] for index in sorted(texts)] == alone(tales_model, **options)
    assert set(reasons) == set(texts)


def test_streamed_choices_end_once(client: openai.OpenAI) -> None:
    """Also those that end before others do."""
    asked: dict[str, Any] = {"model": "tales", "n": 4, "seed": 1, "stop": ".", "max_tokens": 60, "stream": True}
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    for events in (
        client.completions.create(prompt=PROMPT, **asked),
        client.chat.completions.create(messages=messages, **asked),
    ):
        choices = [choice for event in events for choice in event.choices]
        ends = [number for number, choice in enumerate(choices) if choice.finish_reason is not None]
        assert sorted(choices[number].index for number in ends) == list(range(4))
        assert ends[-1] - ends[0] > 10, "they end at once"
        for number in ends:
            assert choices[number].index not in [choice.index for choice in choices[number + 1 :]]


def test_streamed_prompts_in_parts(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    """Each choice has the prompt's log probabilities, also those that run in a later part."""
    pieces = [tales_model.tokenizer.piece(token) for token in tales_model.tokenizer.encode(PROMPT)]
    asked: dict[str, Any] = {"n": 8, "max_tokens": 0, "echo": True, "logprobs": 0, "stream": True}
    found: list[list[str]] = [[] for _ in range(8)]
    for event in client.completions.create(model="tales", prompt=PROMPT, **asked):
        for choice in event.choices:
            assert choice.logprobs is not None
            found[choice.index] += choice.logprobs.tokens or []
    assert found == [pieces] * 8


def test_prompts_as_list_and_ids(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    texts = [PROMPT, "The old king", "A"]
    ids = [tales_model.tokenizer.encode(text) for text in texts]
    expected = [
        alone(tales_model, prompts=text, do_sample=True, top_k=0, seed=2, num_return_sequences=2) for text in texts
    ]
    for prompt in (texts, ids):
        completion = client.completions.create(model="tales", prompt=prompt, n=2, seed=2)
        assert [choice.index for choice in completion.choices] == list(range(6))
        assert [choice.text for choice in completion.choices] == list(chain(*expected))
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == sum(map(len, ids))
        assert completion.usage.completion_tokens == 6 * 16
    single = client.completions.create(model="tales", prompt=ids[1], n=2, seed=2)
    assert [choice.text for choice in single.choices] == expected[1]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, tales_model: gpt2onnx.Model, stream: bool) -> None:
    asked: dict[str, Any] = {"max_tokens": 30, "seed": 4, "logprobs": 3, "echo": True, "stream": stream}
    answer = client.completions.create(model="tales", prompt=PROMPT, **asked)
    parts = [part.choices[0] for part in (answer if stream else [answer])]
    text = "".join(part.text for part in parts)
    tokens, values, tops, offsets = (
        list(chain.from_iterable(getattr(part.logprobs, name) for part in parts))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert text.startswith(PROMPT)
    # What the model gives the whole text, in one pass over all of it.
    ids = tales_model.tokenizer.encode(PROMPT)
    result = tales_model.generate(PROMPT, do_sample=True, top_k=0, seed=4, max_new_tokens=30)
    scored = tales_model.score(ids + result.sequences[0].token_ids)
    assert [tales_model.tokenizer.piece(token) for token in scored.token_ids] == tokens
    assert text == "".join(tokens)
    assert values[0] is None
    assert values[1:] == pytest.approx(scored.logprobs, abs=2e-5)
    for token, offset, value, top in zip(tokens, offsets, values, tops, strict=True):
        assert text[offset : offset + len(token)] == token
        if top is None:
            assert value is None
            continue
        assert top[token] == value
        assert 3 <= len(top) <= 4
        assert sorted(top.values(), reverse=True)[:3][-1] >= min(top.values())


@pytest.mark.parametrize("text", ["…é…", "The king was very old, and had no children."])
def test_scoring_without_a_token(server: Running, tales_model: gpt2onnx.Model, text: str) -> None:
    """Tokens that are parts of a character are written as bytes, and offsets count characters."""
    body = server.complete(text, echo=True, logprobs=0, max_tokens=0).json()
    (choice,) = body["choices"]
    assert choice["text"] == text
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(tales_model.score(text).logprobs, abs=2e-5)
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) == len(tales_model.tokenizer.encode(text))
    assert any(token.startswith("bytes:") for token in tokens) == (not text.isascii())
    written = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )
    assert written.decode() == text
    assert choice["logprobs"]["text_offset"][-1] <= len(text) - 1
    assert body["usage"]["completion_tokens"] == 0
    assert server.text(text, max_tokens=0) == ""


def test_logprobs_of_beams(server: Running, tales_model: gpt2onnx.Model) -> None:
    body = server.complete("Once", logprobs=1, n=2, num_beams=3, max_tokens=6).json()
    sequences = tales_model.generate("Once", num_beams=3, num_return_sequences=2, max_new_tokens=6).sequences
    for choice, sequence in zip(body["choices"], sequences, strict=True):
        assert choice["text"] == sequence.text
        own = tales_model.score(sequence.token_ids, prompt="Once").logprobs
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=2e-4)


def test_a_stop_string_may_begin_in_the_prompt(server: Running) -> None:
    whole = server.choice("Once upon", temperature=0, max_tokens=12)["text"]
    cut = server.choice("Once upon", temperature=0, max_tokens=12, stop="upon" + whole[:7])
    assert (cut["text"], cut["finish_reason"]) == ("", "stop")


def test_logprobs_end_where_the_text_does(server: Running, tales_model: gpt2onnx.Model) -> None:
    whole = server.choice(temperature=0, max_tokens=30, logprobs=0)
    for stop in (whole["text"][9:14], whole["text"][20:23]):
        cut = server.choice(temperature=0, max_tokens=30, logprobs=0, stop=stop)
        assert cut["text"] == whole["text"][: whole["text"].index(stop)]
        assert cut["finish_reason"] == "stop"
        count = len(cut["logprobs"]["tokens"])
        assert cut["logprobs"]["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"][:count], abs=1e-5)
        assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
        assert "".join(cut["logprobs"]["tokens"]).startswith(cut["text"])
    # An end token belongs to the choice, though not to its text.
    (third,) = tales_model.tokenizer.encode(whole["logprobs"]["tokens"][2])
    end = server.choice(temperature=0, logprobs=0, eos_token_id=third)
    assert (end["finish_reason"], end["logprobs"]["tokens"]) == ("stop", whole["logprobs"]["tokens"][:3])


def test_best_of(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    """The n of best_of that are likeliest by token, best first."""
    completion = client.completions.create(model="tales", prompt=PROMPT, n=2, best_of=5, seed=6)
    made = tales_model.generate(
        PROMPT, do_sample=True, top_k=0, seed=6, max_new_tokens=16, num_return_sequences=5, logprobs=0
    ).sequences
    mean = {one.text: sum(each.logprob for each in one.logprobs) / len(one.logprobs) for one in made}
    assert [choice.text for choice in completion.choices] == sorted(mean, key=mean.__getitem__, reverse=True)[:2]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5 * 16


def test_long_prompts_are_cut_on_demand(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    prompt = "The king went into the wood. " * 100
    (expected,) = tales_model.generate(prompt, truncate="left", max_new_tokens=16).sequences
    asked: dict[str, Any] = {"model": "tales", "prompt": prompt, "temperature": 0}
    completion = client.completions.create(**asked, extra_body={"truncate": "left"})
    assert completion.choices[0].text == expected.text
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 512 - 16
    echoed = client.completions.create(**asked, echo=True, logprobs=0, extra_body={"truncate": "left"}).choices[0]
    assert prompt.endswith(echoed.text.removesuffix(expected.text))
    assert echoed.logprobs is not None
    assert "".join(echoed.logprobs.tokens or ()) == echoed.text
    last = tales_model.tokenizer.encode(prompt)[-7:]
    (expected,) = tales_model.generate(last, max_new_tokens=16).sequences
    kept = client.completions.create(**asked, echo=True, extra_body={"truncate_prompt_tokens": 7})
    assert kept.choices[0].text == tales_model.tokenizer.decode(last) + expected.text
    assert kept.usage is not None
    assert kept.usage.prompt_tokens == 7
    special = {"model": "tales", "prompt": "The<|endoftext|>The", "echo": True, "max_tokens": 0}
    for count in (3, 4):  # as many tokens as it has, and more
        echoed = client.completions.create(**special, extra_body={"truncate_prompt_tokens": count}).choices[0]
        assert echoed.text == special["prompt"]
    with pytest.raises(openai.BadRequestError, match="context window"):
        client.completions.create(**asked, extra_body={"truncate_prompt_tokens": 513})
    with pytest.raises(openai.BadRequestError, match="context window") as refused:
        client.completions.create(**asked)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_special_tokens_have_a_place_in_the_text(client: openai.OpenAI) -> None:
    """Where they are kept; otherwise they have none."""
    asked: dict[str, Any] = {
        "model": "tales",
        "prompt": [8191, 704],
        "temperature": 0,
        "max_tokens": 2,
        "logprobs": 0,
        "echo": True,
    }
    kept, skipped = (
        client.completions.create(**asked, extra_body={"skip_special_tokens": skip}).choices[0]
        for skip in (False, True)
    )
    assert kept.logprobs is not None
    assert skipped.logprobs is not None
    assert kept.text == "<|endoftext|>" + skipped.text
    assert (kept.logprobs.text_offset or [])[:2] == [0, 13]
    assert (skipped.logprobs.text_offset or [])[:2] == [0, 0]
    # A text that names one is echoed as it is.
    text = "The<|endoftext|>The old<|endoftext|>"
    (echoed,) = client.completions.create(**asked | {"prompt": text}).choices
    assert echoed.text.startswith(text)
    assert echoed.logprobs is not None
    for token, offset in zip(echoed.logprobs.tokens or [], echoed.logprobs.text_offset or [], strict=True):
        assert echoed.text[offset:].startswith(token)


def test_greedy_copies(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    for n, best_of in ((3, 3), (1, 2)):
        completion = client.completions.create(model="tales", prompt=PROMPT, temperature=0, n=n, best_of=best_of)
        assert [choice.text for choice in completion.choices] == alone(tales_model) * n


def test_empty_prompt_is_the_end_of_text(client: openai.OpenAI, tales_model: gpt2onnx.Model) -> None:
    end = list(tales_model.generation_config.eos_token_ids)
    expected = alone(tales_model, prompts=end)
    for prompt in (None, "", end):
        assert [client.completions.create(model="tales", prompt=prompt, temperature=0).choices[0].text] == expected


def test_events(server: Running) -> None:
    response = server.complete(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    assert all(set(part) == {"id", "object", "created", "model", "choices", "usage"} for part in parts)
    assert len({part["id"] for part in parts}) == 1
    assert all(part["usage"] is None for part in parts[:-1])
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20}


def test_models(client: openai.OpenAI, server: Running) -> None:
    (entry,) = client.models.list().data
    assert (entry.id, entry.object, entry.owned_by) == ("tales", "model", "gpt2onnx")
    assert client.models.retrieve("tales") == entry
    with pytest.raises(openai.NotFoundError, match="isn't served"):
        client.models.retrieve("davinci")
    assert server.client.get("/v1/models/").status_code == 404


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": "davinci"}, "isn't served", "model"),
    ({"top_p": 1.5}, "top_p", "top_p"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"temperature": "0.5"}, "temperature", "temperature"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens"),
    ({"max_tokens": 16.5}, "max_tokens", "max_tokens"),
    ({"stop": [""]}, "stop", "stop"),
    ({"n": 0}, "n:", "n"),
    ({"n": 1000}, "167 parts, 167 for each prompt, are above the server's limit of 128", "n"),
    ({"num_beams": 7}, "num_beams needs 7 sequences at once, above the server's limit of 6", "num_beams"),
    ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1}, "can't be divided", "num_beam_groups"),
    ({"num_beams": 4, "guidance_scale": 2}, "num_beams needs 8 sequences", "num_beams"),
    ({"penalty_alpha": 0.6, "top_k": 7}, "top_k needs 7 sequences", "top_k"),
    ({"guidance_scale": 2, "negative_prompt": [5] * 600}, "negative_prompt: the prompt has", "negative_prompt"),
    ({"n": 3, "num_beams": 2}, "n 3 is more", "n"),
    ({"n": 3, "best_of": 2}, "best_of", "best_of"),
    ({"best_of": 2, "stream": True}, "best_of", "best_of"),
    ({"stream_options": {"include_usage": True}}, "stream", "stream_options"),
    ({"bad_words_ids": [[9999]]}, "bad_words_ids", "bad_words_ids"),
    ({"logit_bias": {"five": 1}}, 'logit_bias.five: keys are token ids, as in {"50256": -100}', "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "keys are token ids", "logit_bias"),
    ({"logit_bias": {"99999999999": 1}}, "keys are token ids", "logit_bias"),
    ({"logit_bias": {"5": 1e31}}, "logit_bias.5: input should be less", "logit_bias"),
    ({"eos_token_id": "a"}, "eos_token_id: input should be a valid integer or a valid list", "eos_token_id"),
    ({"eos_token_id": [1, "a"]}, "eos_token_id.1: input should be a valid integer", "eos_token_id"),
    ({"stop": ["a", ""]}, "stop.1: string should have", "stop"),
    ({"metadata": {"a\nb" * 1000: 5}}, "metadata.a\\nb", "metadata"),
    ({"logit_bias": {"9999": 1}}, "logit_bias holds 9999", "logit_bias"),
    ({"logprobs": 9000}, "logprobs", "logprobs"),
    ({"choice": [" a~"], "suppress_tokens": [93]}, "leave no token that choice allows", "choice"),  # known only later
    ({"suffix": "end"}, "Not supported", "suffix"),
    ({"max_new_tokens": 3}, "unknown field 'max_new_tokens'", "max_new_tokens"),
    ({"messages": []}, "unknown field 'messages'", "messages"),
    ({"prompt": 3}, "prompt must be", "prompt"),
    ({"prompt": []}, "prompt must be", "prompt"),
    ({"prompt": [1, "two"]}, "prompt must be", "prompt"),
    ({"prompt": [True]}, "prompt must be", "prompt"),
    ({"prompt": [8192]}, "8192 is no token id", "prompt"),
    ({"max_tokens": 600}, "context window", "max_tokens"),
    ({"prompt": "a " * 600}, "context window", "prompt"),
    ({"prompt": "a " * 600, "stream": True}, "context window", "prompt"),  # before it begins
    ({"prompt": ["one", "a " * 600]}, "context window", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message", "param"), WRONG, ids=[str(sorted(fields)) for fields, _, _ in WRONG])
def test_wrong_requests(server: Running, fields: dict[str, Any], message: str, param: str | None) -> None:
    response = server.complete(**fields)
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param
    if "context window" in message:
        assert error["code"] == "context_length_exceeded"
    assert error["type"] == ("not_found_error" if param == "model" else "invalid_request_error")


def test_malformed_requests(server: Running) -> None:
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b'"text"', b"\xff", b'{"prompt": NaN}', b'{"temperature": NaN}', b"[" * 100_000):
        response = server.client.post("/v1/completions", content=content, headers=json_type)
        assert response.status_code == 400, (content[:20], response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
    started = time.perf_counter()
    response = server.client.post("/v1/completions", json={"prompt": [-1] * 200_000})
    assert (response.status_code, time.perf_counter() - started < 5) == (400, True), (
        "errors cost as many looks as there are"
    )
    for headers in ({}, {"content-type": "text/plain"}):
        response = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == 415
    wrong_method = server.client.get("/v1/completions")
    assert wrong_method.status_code == 405
    assert "error" in wrong_method.json()
    for path in ("/v1/responses", "/v1/embeddings", "/v1/images/generations"):
        missing = server.client.post(path, json={"input": "a"})
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        assert f"there is no {path}, only /v1/completions, /v1/chat/completions" in missing.json()["error"]["message"]
    # Half of a surrogate pair is no letter: what is read is what is echoed.
    response = server.client.post("/v1/completions", content=rb'{"prompt": "a\ud800", "echo": true}', headers=json_type)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"].startswith("a?")


def test_same_text_in_any_company(server: Running, tales_model: gpt2onnx.Model) -> None:
    """Clients that come at random times, with all strategies, get what they would get alone."""
    random_ = random.Random(1)
    long = " ".join(["The old king had three sons, and the youngest was called Simpleton."] * 12)
    work = []
    for index in range(2 * len(STRATEGIES)):
        asked, options = STRATEGIES[index % len(STRATEGIES)]
        prompt = random_.choice([PROMPT, "The old king", long[: random_.randrange(20, len(long))]])
        fields = asked | asked.get("extra_body", {}) | {"max_tokens": random_.randrange(1, 40)}
        fields.pop("extra_body", None)
        work.append((prompt, fields, options | {"max_new_tokens": fields["max_tokens"]}, random_.random() * 1.5))
    stop = threading.Event()

    def ask(prompt: str, fields: dict[str, Any], delay: float) -> list[str]:
        stop.wait(delay)
        return [choice["text"] for choice in server.complete(prompt, **fields).json()["choices"]]

    with ThreadPoolExecutor(len(work)) as pool:
        answers = [pool.submit(ask, prompt, fields, delay) for prompt, fields, _, delay in work]
    for index, ((prompt, _, options, _), answer) in enumerate(zip(work, answers, strict=True)):
        assert answer.result() == alone(tales_model, prompts=prompt, **options), f"request {index}"
    assert server.metric("batch_rows_sum") / server.metric("batch_rows_count") > 1.5, "nothing ran together"
