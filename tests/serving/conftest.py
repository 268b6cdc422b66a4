"""The model that servers serve, and the page in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from support.checkpoints import MakeCheckpoint
from support.serving import Running, serving

import gpt2onnx
from gpt2onnx.serving.http.guard import Admission

if TYPE_CHECKING:
    from support.pages import OpenPage


@pytest.fixture(scope="module")
def model(tales_bundle: Path) -> gpt2onnx.Model:
    """The embedded model, for one engine's thread at a time."""
    return gpt2onnx.load(tales_bundle, threads=1)


@pytest.fixture(scope="module")
def server(model: gpt2onnx.Model) -> Iterator[Running]:
    """Serves the embedded model, few sequences at a time."""
    with serving(model, max_batch=6, chat_template="turns") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes sockets at the end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def bytes_server(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serves a random model that writes single bytes, few of which make a character; asks for a key."""
    from support.pages import KEY

    bundle = gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("bytes") / "bundle").folder
    with serving(gpt2onnx.load(bundle, threads=1), admission=Admission(keys=[KEY.encode()])) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture
def open_page(browser: Any, server: Running) -> Iterator[OpenPage]:
    """Opens the page with settings; at the end of the test nothing may have gone wrong in it unnoticed."""
    from support.pages import WIDE

    problems: list[str] = []
    contexts = []

    def open_(settings: str = "", at: Running = server, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text))
        page.goto(f"{at.address}/#{settings}")
        return page

    yield open_
    for context in contexts:
        context.close()
    # That the browser logs of each request that is refused.
    assert [problem for problem in problems if not problem.startswith("Failed to load resource")] == []
