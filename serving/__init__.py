"""An HTTP server of OpenAI's interfaces for completions and chats, with continuous batching.

A request's way: `http.guard` (may it be answered?) -> `http.app` (route, body validated by `protocol`) -> `completions.prepare`
(options and token ids; `chat.prepare_chat` renders a conversation before) -> `call.Call` -> `engine.Engine` (the one thread that
runs the model). New tokens come back through `call` and `answer` into one JSON response or a stream of events (`http.stream`).
"""

from importlib.util import find_spec

from gpt2onnx.errors import MissingExtraError

for _package in ("fastapi", "jinja2", "prometheus_client", "uvicorn"):
    if find_spec(_package) is None:
        raise MissingExtraError("Serving", _package.replace("_", "-"), "serve")
