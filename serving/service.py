"""Service: the served model, its engine and its limits, as every request needs them."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..models import limits
from ..models.bundle import GENERATION_CONFIG
from ..models.config import read_json
from ..runtime.model import Model
from ..runtime.options import DEFAULT_NEW_TOKENS, GenerationConfig
from .chat_template import ChatTemplate
from .engine import Engine


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request.

    Attributes:
        prompt_tokens: most tokens of a prompt; None for the context window.
        max_tokens: largest `max_tokens`; None for the context window.
        seconds: time until it has to be done.
    """

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    seconds: float = 600.0


class Notifier:
    """Sets asyncio events from other threads; one wake-up of the event loop serves all events that wait for it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[asyncio.Event] = deque()
        self._pending = False

    def open(self) -> None:
        """Takes the running event loop as the one to wake."""
        self._loop = asyncio.get_running_loop()

    def set(self, event: asyncio.Event) -> None:
        """Sets an event soon; for any thread."""
        self._events.append(event)
        if not self._pending and self._loop is not None:
            self._pending = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        self._pending = False
        while self._events:
            self._events.popleft().set()


@dataclass(frozen=True, kw_only=True)
class Service:
    """The served model.

    Attributes:
        names: the model's, for clients; responses have the first.
        model: only its tokenizer and options; its network belongs to the engine's thread.
        log_prompts: log prompts and texts; otherwise only counts.
        chat_template: makes prompts of conversations; None if the model has none.
        created: start of the service, in seconds since 1970.
        notifier: wakes the event loop for the engine's news.
    """

    names: Sequence[str]
    model: Model
    engine: Engine
    limits: Limits
    log_prompts: bool = False
    chat_template: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    notifier: Notifier = field(default_factory=Notifier)

    @property
    def name(self) -> str:
        """The model's first name."""
        return self.names[0]

    def prompt_ids(
        self, prompt: str | list[int], options: GenerationConfig, kept: int | None
    ) -> tuple[list[int], bool]:
        """The tokens of a prompt, and whether `kept` has cut it.

        Args:
            options: may ask for `truncate`.
            kept: most of the last ones that stay; None for all.

        Raises:
            PromptError: the prompt is too long, or not in the vocabulary.
            OptionError: `truncate` leaves nothing of it.
        """
        context, cut = self.model.config.n_positions, False
        if kept is not None and kept <= context:
            if isinstance(prompt, str):  # no more of it than can matter: to encode megabytes takes seconds
                prompt = self.model.tokenizer.encode(prompt[-limits.LETTERS_PER_TOKEN * context :])
            prompt, cut = prompt[-kept:], len(prompt) > kept
        return list(map(int, self.model.prompt_ids(prompt, options))), cut

    def longest_answer(self, prompt: list[int], options: GenerationConfig, kept: int | None) -> int:
        """Tokens that the context window and the limits leave for an answer; the other arguments are those of `prompt_ids`.

        Where `truncate` drops tokens of the prompt, they are as many as an answer has by default.

        Raises:
            PromptError: the prompt is too long.
        """
        context = self.model.config.n_positions
        most = self.limits.max_tokens or context + 1
        cut = options.truncate != "none"
        room = max(1, min(DEFAULT_NEW_TOKENS, most, context // 2))
        tokens = len(self.prompt_ids(prompt, options.replaced(max_new_tokens=room), kept)[0])
        left = context - tokens + (not cut)  # the last token needs no position, but `truncate` counts it
        return max(1, min(left, most))

    @cached_property
    def bundled_options(self) -> dict[str, Any]:
        """The bundle's generation_config.json."""
        return dict(read_json(self.model.bundle.folder / GENERATION_CONFIG))
