"""Chat templates: turns of a conversation to the text of a prompt, rendered by jinja2 as transformers renders them.

https://huggingface.co/docs/transformers/chat_templating_writing
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpt2onnx.errors import BundleError, OptionError, PromptError

from ..models import limits
from ..models.bundle import CHAT_TEMPLATE, TOKENIZER_CONFIG
from ..models.messages import one_line
from ..runtime.text import special_tokens

# Templates by name, for models that were trained without one.
BUILT_IN = {
    # DialoGPT's training data: each turn, whoever's it is, ends with the end token.
    "turns": "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}",
}

Message = Mapping[str, Any]


class ChatTemplate:
    """The template of a model.

    Args:
        source: of the template, in jinja2.
        tokens: special tokens by their role, such as "eos_token".

    Raises:
        OptionError: the template is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        # Like transformers' environment; nothing in it can reach beyond its values.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # it computes what depends on constants alone
            raise OptionError(f"the chat template can't be read: {one_line(error)}") from error
        self._tokens = dict(tokens)

    @classmethod
    def of_bundle(cls, folder: Path, named: str | None = None) -> "ChatTemplate | None":
        """The template that is named, or else the bundle's own; None if there is neither.

        Args:
            named: one of BUILT_IN, or a file.

        Raises:
            OptionError: the named one can't be read.
            BundleError: the bundle's own can't be read.
        """
        config = special_tokens.settings_of(folder / TOKENIZER_CONFIG)
        tokens = special_tokens.in_folder(folder, config)
        if named is not None:
            return cls(BUILT_IN[named] if named in BUILT_IN else _read(named), tokens)
        source = config.get("chat_template")
        if (folder / CHAT_TEMPLATE).is_file():
            try:
                source = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise BundleError(f"can't read {folder / CHAT_TEMPLATE}: {one_line(error)}") from error
        elif isinstance(source, list):  # several, for different uses
            by_name = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = by_name.get("default")
        if not isinstance(source, str):
            return None
        try:
            return cls(source, tokens)
        except OptionError as error:
            raise BundleError(f"{folder}: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that a conversation makes.

        Raises:
            PromptError: the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program
            raise PromptError(f"the chat template refuses these messages: {one_line(error)}") from error


def _read(named: str) -> str:
    try:
        with Path(named).open("rb") as file:
            content = file.read(limits.TEMPLATE + 1)
        if len(content) > limits.TEMPLATE:
            raise ValueError(f"it has more than {limits.TEMPLATE:,} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(BUILT_IN)
        raise OptionError(f"no chat template {named!r}: name a file, or {known} ({one_line(error)})") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # transformers' templates ask for the local time
