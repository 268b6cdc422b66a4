"""Conversations: templates as transformers renders them, answers as completions of them, with OpenAI's own client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
from support.golden import Golden
from support.serving import Running, serving
from support.tokenizer_files import gpt2_in_transformers
from support.versions import skip_with_transformers_4

import gpt2onnx
from gpt2onnx.errors import BundleError, OptionError, PromptError
from gpt2onnx.models.bundle import TOKENIZER, TOKENIZER_CONFIG
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.serving.chat_template import BUILT_IN, ChatTemplate

TALK = [
    {"role": "user", "content": "Once upon a time"},
    {"role": "assistant", "content": " there was a king."},
    {"role": "user", "content": " One day"},
]
END = "<|endoftext|>"

TEMPLATES = {
    **BUILT_IN,
    "roles": (
        "{%- for message in messages %}\n    {%- if loop.index0 % 2 == 0 and message.role != 'user' %}\n"
        "        {{- raise_exception('turns alternate') }}\n    {%- endif %}\n"
        "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}\n"
        "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "json": "{% for message in messages %}{{ message | tojson }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ bos_token }}",
    "tabs": "{% for message in messages %}\n  {% set ns = namespace(first=loop.first) %}\n\t{{ ns.first }}: {{ message.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, golden: Golden) -> None:
    template = ChatTemplate(TEMPLATES[name], {"eos_token": END, "bos_token": END})
    for messages in (TALK, TALK[:1], [{"role": "user", "content": "Ünï <b>\"'& \n x "}]):
        expected = golden.answer(
            [name, messages],
            lambda messages=messages: gpt2_in_transformers().apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
            ),
        )
        assert template.render(messages) == expected


def test_a_template_that_refuses() -> None:
    with pytest.raises(PromptError, match="refuses these messages: turns alternate"):
        ChatTemplate(TEMPLATES["roles"], {}).render(TALK[1:])
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(PromptError, match="refuses these messages: maximum recursion depth"):
        ChatTemplate(endless, {}).render(TALK)


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}", "{{ 1 / 0 }}"],
)  # fmt: skip
def test_a_template_reaches_nothing(source: str) -> None:
    with pytest.raises(PromptError, match="refuses these messages"):
        ChatTemplate(source, {}).render(TALK)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert ChatTemplate.of_bundle(tmp_path) is None
    config = {
        "eos_token": {"content": "!"},
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}],
    }
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(config))
    own = ChatTemplate.of_bundle(tmp_path)
    assert own is not None
    assert own.render(TALK) == "!"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.of_bundle(tmp_path).render(TALK) == "file"  # type: ignore[union-attr]
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.of_bundle(tmp_path, str(tmp_path / "mine.jinja")).render(TALK) == "mine"  # type: ignore[union-attr]
    assert ChatTemplate.of_bundle(tmp_path, "turns").render(TALK[:1]) == "Once upon a time!"  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="name a file, or turns"):
        ChatTemplate.of_bundle(tmp_path, "missing")
    for source, reason in (
        ("{% if", "the chat template can't"),
        ("{{ '%s' % (10**9999) }}", "the chat template can't"),
        ("\xff", "can't"),
    ):
        (tmp_path / "chat_template.jinja").write_text(source, encoding="latin-1")
        with pytest.raises(BundleError, match=f"{reason} be read|{reason} read"):
            ChatTemplate.of_bundle(tmp_path)


FILES: dict[str, dict[str, Any]] = {
    "tokens of the class": {"tokenizer_config.json": {"model_max_length": 1024}},
    "tokens of the older file": {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"eos_token": "!", "bos_token": {"content": "?"}},
    },
    "a tokenizer that begins texts": {"tokenizer_config.json": {}},
}


@pytest.mark.parametrize("name", FILES)
def test_a_conversation_has_the_tokens_of_transformers(name: str, tmp_path: Path, golden: Golden) -> None:
    skip_with_transformers_4("files of tokenizers mean something else")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(FOLDER, checkpoint)
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}{{ pad_token }}"
    )
    for file, content in FILES[name].items():
        extra = {"chat_template": template} if file == TOKENIZER_CONFIG else {}
        (checkpoint / file).write_text(json.dumps(content | extra))
    if name == "a tokenizer that begins texts":
        tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / TOKENIZER))
        end = (END, tokenizer.token_to_id(END))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[end])
        tokenizer.save(str(checkpoint / TOKENIZER))

    def in_transformers() -> list[int]:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        return list(tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False))

    wanted = golden.answer([name, FILES[name], TALK], in_transformers)
    gpt2onnx.export(checkpoint, tmp_path / "bundle")
    with serving(gpt2onnx.load(tmp_path / "bundle"), chat_template=None) as server:
        assert server.client.post("/tokenize", json={"messages": TALK}).json()["tokens"] == wanted
        answer = server.client.post("/v1/chat/completions", json={"messages": TALK, "max_tokens": 1}).json()
        assert answer["usage"]["prompt_tokens"] == len(wanted)


# The server


@pytest.fixture(scope="module")
def server(model: gpt2onnx.Model) -> Iterator[Running]:
    with serving(model, names=["tales", "other"], max_batch=6, chat_template="turns") as running:
        yield running


PROMPT = f"Once upon a time{END} there was a king.{END} One day{END}"


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.8, "seed": 3, "n": 2}, {"stop": ["."], "seed": 1}]
)
def test_an_answer_is_the_completion_of_the_rendered_prompt(
    options: dict[str, Any], client: openai.OpenAI, server: Running
) -> None:
    wanted = server.complete(PROMPT, max_tokens=20, **options).json()
    chat = client.chat.completions.create(model="tales", messages=TALK, max_completion_tokens=20, **options)  # type: ignore[arg-type]
    assert chat.id.startswith("chatcmpl-")
    assert chat.object == "chat.completion"
    assert [(one.message.role, one.message.content, one.finish_reason) for one in chat.choices] == [
        ("assistant", one["text"], one["finish_reason"]) for one in wanted["choices"]
    ]
    assert chat.usage is not None
    assert chat.usage.model_dump(exclude_none=True) == wanted["usage"]
    texts, reasons, roles = ["", ""], ["", ""], 0
    for event in client.chat.completions.create(
        model="other", messages=TALK, max_tokens=20, stream=True, stream_options={"include_usage": True}, **options
    ):  # type: ignore[arg-type]
        assert event.object == "chat.completion.chunk"
        if not event.choices:
            assert event.usage.model_dump(exclude_none=True) == wanted["usage"]
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
            roles += choice.delta.role == "assistant"
    assert texts[: len(chat.choices)] == [one.message.content for one in chat.choices]
    assert reasons[: len(chat.choices)] == [one.finish_reason for one in chat.choices]
    assert roles == len(chat.choices)


def test_log_probabilities_of_an_answer(client: openai.OpenAI, server: Running) -> None:
    wanted = server.choice(PROMPT, max_tokens=5, temperature=0, logprobs=2)["logprobs"]
    chat = client.chat.completions.create(
        model="tales", messages=TALK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )  # type: ignore[arg-type]
    (choice,) = chat.choices
    assert choice.logprobs is not None
    assert [one.token for one in choice.logprobs.content or ()] == wanted["tokens"]
    assert [one.logprob for one in choice.logprobs.content or ()] == wanted["token_logprobs"]
    for one, top in zip(choice.logprobs.content or (), wanted["top_logprobs"], strict=True):
        assert {each.token: each.logprob for each in one.top_logprobs} == top
        assert bytes(one.bytes or ()).decode() == one.token


def test_content_in_parts_and_the_longest_answer(server: Running, model: gpt2onnx.Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]}]
    first, second = (
        server.client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()
        for messages in (parts, TALK[:1])
    )
    assert first["choices"] == second["choices"]
    # Without a limit, until the end token or the end of the context window.
    ended = second["choices"][0]["finish_reason"] == "stop"
    assert ended or second["usage"]["total_tokens"] == model.config.n_positions + 1


def test_long_conversations_are_cut_on_demand(client: openai.OpenAI, server: Running, model: gpt2onnx.Model) -> None:
    """With and without a length: otherwise there is room for as many tokens as `generate` makes by default."""
    talk, context = TALK * 100, model.config.n_positions
    ids = model.tokenizer.encode(PROMPT * 100)
    body = {"eos_token_id": -1}
    for given, more, kept, new in (
        ({"max_tokens": 9}, {"truncate": "left"}, context - 9, 9),
        ({}, {"truncate": "left"}, context - 64, 64),
        ({"max_tokens": 9}, {"truncate_prompt_tokens": 50}, 50, 9),
        ({}, {"truncate_prompt_tokens": context}, context, 1),
        ({}, {"truncate_prompt_tokens": context, "truncate": "left"}, context - 64, 64),
    ):
        chat = client.chat.completions.create(
            model="tales", messages=talk, temperature=0, extra_body=body | more, **given
        )  # type: ignore[call-overload]
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (kept, new)
        assert chat.choices[0].message.content == server.text(ids[-kept:], temperature=0, max_tokens=new, **body)
    # One that fits stays whole.
    short = server.client.post("/v1/chat/completions", json={"messages": TALK, "truncate": "left"} | body).json()
    assert short["usage"]["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert short["usage"]["total_tokens"] == context


@pytest.mark.parametrize(
    ("fields", "status", "hint"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages.0.content.0.type: input should be 'text'",
        ),
        ({"messages": [{"content": "x"}]}, 400, "messages.0.role: field required"),
        (
            {"messages": [*TALK, {"role": "user", "content": [{"type": "text"}]}]},
            400,
            "messages.3.content.0.text: field",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            400,
            "0.content: input should be a valid string or a valid list",
        ),
        ({"messages": ["x"]}, 400, "messages.0: input should be an object"),
        (
            {"messages": TALK, "response_format": {"type": "xml"}},
            400,
            "response_format.type: input should be 'text', 'json_object' or 'json_schema'",
        ),
        ({"messages": TALK, "response_format": {}}, 400, "response_format.type: field required"),
        ({"messages": TALK, "response_format": {"type": "json_schema"}}, 400, "goes with the field json_schema"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, 400, "tools"),
        (
            {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            400,
            "Invalid type: x",
        ),
        ({"messages": TALK, "structured_outputs": {"regex": "("}}, 400, "unclosed group"),
        ({"messages": TALK, "structured_outputs": {"whitespace": " "}}, 400, "whitespace"),
        ({"messages": TALK, "top_logprobs": 2}, 400, "top_logprobs need logprobs"),
        ({"messages": TALK, "model": "gpt-4"}, 404, "only 'tales', 'other'"),
        ({"messages": TALK * 300}, 400, "context window"),
    ],
)
def test_refused(fields: dict[str, Any], status: int, hint: str, server: Running) -> None:
    response = server.client.post("/v1/chat/completions", json=fields)
    assert response.status_code == status, response.text
    assert hint in response.json()["error"]["message"]


def test_structured_output(server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}

    def text(**fields: Any) -> str:
        body = {"messages": TALK, "temperature": 0, "max_tokens": 40, **fields}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    named = {"name": "thing", "schema": schema, "strict": True}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"json_schema": schema},
    ):
        assert json.loads(text(**fields))["a"] in (1, 2)
    assert text(response_format={"type": "json_object"}, logit_bias={"0": -1}).startswith("{")
    assert text(structured_outputs={"json_object": True}).startswith("{")
    assert text(structured_outputs={"choice": ["red", "blue"]}) in ("red", "blue")
    assert re.fullmatch("[0-9]{3}", text(structured_outputs={"regex": "[0-9]{3}"}))
    assert text(structured_outputs={"grammar": 'start: "a" "b"'}) == "ab"


def test_what_clients_send_and_means_nothing(server: Running) -> None:
    plain = {"messages": TALK, "temperature": 0, "max_tokens": 3}
    more = {
        "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "parallel_tool_calls": True, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "seed": None, "stream": False, "model": "", "cache_prompt": True,
        "prompt_cache_key": "a", "safety_identifier": "b", "stop": "", "n_predict": None, "reasoning_effort": None,
    }  # fmt: skip
    # As openai's package returns its messages, which many programs send back.
    returned = [
        openai.types.chat.ChatCompletionMessage(**TALK[1]).model_dump()
        | {"role": one["role"], "content": one["content"]}
        for one in TALK
    ]  # type: ignore[arg-type]
    assert "refusal" in returned[0]
    answers = [
        server.client.post("/v1/chat/completions", json=plain | fields).json()
        for fields in ({}, more, {"messages": returned}, {"max_tokens": None, "n_predict": 3})
    ]
    assert all(answer["choices"] == answers[0]["choices"] for answer in answers)


def test_a_model_without_a_template(model: gpt2onnx.Model) -> None:
    with serving(model) as server:
        response = server.client.post("/v1/chat/completions", json={"messages": TALK})
        assert response.status_code == 400
        assert "--chat-template" in response.json()["error"]["message"]


def test_tokens_of_texts_and_conversations(server: Running, model: gpt2onnx.Model) -> None:
    for fields, text in (({"prompt": "Once upon"}, "Once upon"), ({"messages": TALK}, PROMPT)):
        found = server.client.post("/tokenize", json=fields | {"return_token_strs": True, "model": "tales"}).json()
        ids = model.tokenizer.encode(text)
        assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), model.config.n_positions)
        assert found["token_strs"] == model.tokenizer.convert_ids_to_tokens(ids)
        assert server.client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": model.tokenizer.decode(ids)}
    end, name = model.tokenizer.eos_token_id, model.tokenizer.eos_token
    assert name is not None
    assert server.client.post("/detokenize", json={"tokens": [*ids, end]}).json() == {"prompt": text + name}
    assert server.client.post("/tokenize", json={}).status_code == 400
    assert server.client.post("/tokenize", json={"prompt": "a", "model": "b"}).status_code == 404
