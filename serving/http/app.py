"""Application: routes of OpenAI's completions interface, health, metrics, reference and page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ...models.messages import shown
from ..call import Call
from ..chat import prepare_chat
from ..completions import prepare, text_of, tokens_of
from ..engine import QueueFullError, UnavailableError
from ..metrics import Metrics
from ..pool import Pool
from ..protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Health,
    ServedModel,
    ServedModels,
    ServerVersion,
    Text,
    TokenizeRequest,
    Tokens,
)
from ..responses import ApiError, JsonResponse
from ..service import Service
from . import reference
from .guard import KEY_NEEDED, Admission, Guard
from .stream import EventStream, whole

_LONGEST_NAME = 80  # letters of an unknown field that an error names
_MOST_ERRORS = 100  # of a body that are looked at: a list of numbers has one for each
_INPUT = "Input should be "  # so pydantic's messages on types begin
_PAGE = Path(__file__).parents[1] / "page"

_ERRORS = {
    400: "The request is wrong, or doesn't fit into the context window.",
    401: "The API key is missing or wrong.",
    403: "The Host header isn't a name of this machine.",
    404: "There is no such model.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body isn't JSON.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server has failed.",
    503: "The server is shutting down, has no memory for the request, or its model has failed.",
    504: "The request wasn't done in time.",
}
_Routes = dict[int | str, dict[str, Any]]


def make_app(pool: Pool, metrics: Metrics, admission: Admission) -> Guard:
    """Builds the application behind its guard."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pool.first.notifier.open()
        pool.first.engine.start()
        yield

    app = FastAPI(
        title="gpt2onnx",
        version=version("gpt2onnx"),
        summary=f"OpenAI's completions interface to {pool.first.name}.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to a host that the client names
    )
    _add_completions(app, pool, metrics)
    _add_tokenizer(app, pool)
    _add_models(app, pool)
    _add_operation(app, pool, metrics)
    _add_pages(app)
    _add_errors(app)
    vocabulary = max(pool.bundle(name).config.vocab_size for name in pool.names)
    app.openapi = lambda: reference.document(app, vocabulary, KEY_NEEDED if admission.keys else ())  # type: ignore[method-assign]
    return Guard(app, admission, metrics)


def _add_completions(app: FastAPI, pool: Pool, metrics: Metrics) -> None:
    success = {"description": "The completions; with stream, events.", "content": {"text/event-stream": {}}}
    responses = _errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504) | {200: success}

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=responses,
        summary="Continue prompts",
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(lambda service: prepare(service, body), body.model, request)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=responses,
        summary="Answer in a conversation",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await answer(lambda service: prepare_chat(service, body), body.model, request)

    async def answer(begin: Callable[[Service], Call], model: str | None, request: Request) -> Response:
        async with pool.use(model) as service:
            call = await asyncio.to_thread(begin, service)
            call.submit(request.client.host if request.client else "")
        if call.body.stream:
            return EventStream(call, metrics)
        try:
            return await whole(call, request)
        finally:
            call.close()


def _add_tokenizer(app: FastAPI, pool: Pool) -> None:
    """vLLM's routes."""

    @app.post(
        "/tokenize",
        response_model=Tokens,
        responses=_errors(400, 401, 403, 404, 408, 413, 415),
        summary="Give the tokens of a text",
    )
    async def tokenize(body: TokenizeRequest) -> Response:
        async with pool.use(body.model) as service:
            return JsonResponse(await asyncio.to_thread(tokens_of, service, body))

    @app.post(
        "/detokenize",
        response_model=Text,
        responses=_errors(400, 401, 403, 404, 408, 413, 415),
        summary="Give the text of tokens",
    )
    async def detokenize(body: DetokenizeRequest) -> Response:
        async with pool.use(body.model) as service:
            return JsonResponse(await asyncio.to_thread(text_of, service, body))


def _add_models(app: FastAPI, pool: Pool) -> None:
    def facts(name: str) -> dict[str, Any]:
        bundle = pool.bundle(name)
        return {
            "id": name,
            "object": "model",
            "created": pool.first.created,
            "owned_by": "gpt2onnx",
            "context_length": bundle.config.n_positions,
            "max_model_len": bundle.config.n_positions,
            "vocab_size": bundle.config.vocab_size,
            "dtype": bundle.manifest.dtype,
            "device": pool.device(name),
        }

    @app.get(
        "/v1/models",
        response_model=ServedModels,
        responses=_errors(401, 403),
        summary="List the models",
    )
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [facts(name) for name in pool.names]})

    _add_probes(app, models, "/v1/models")

    @app.get(
        "/v1/models/{model:path}",
        response_model=ServedModel,
        responses=_errors(401, 403, 404),
        summary="Describe a model",
    )
    async def model(model: str) -> Response:
        if not model:
            raise ApiError(404, "name a model: /v1/models lists them", "model", "model_not_found")
        return JsonResponse(facts(model))


def _add_operation(app: FastAPI, pool: Pool, metrics: Metrics) -> None:
    @app.get(
        "/health",
        response_model=Health,
        responses=_errors(403) | {503: {"model": Health, "description": "The server takes no requests."}},
        summary="Tell whether requests are taken",
    )
    async def health() -> Response:
        engines = pool.engines
        status = "failed" if any(engine.failure is not None for engine in engines) else "ok"
        if status == "ok" and pool.first.engine.stopping:
            status = "stopping"
        running, waiting = (sum(getattr(engine, name) for engine in engines) for name in ("running", "waiting"))
        content = {"status": status, "running": running, "waiting": waiting}
        return JsonResponse(content, 200 if status == "ok" else 503)

    _add_probes(app, health, "/health", "/ping", "/healthz")

    @app.get("/version", response_model=ServerVersion, responses=_errors(403), summary="Tell the server's version")
    async def about() -> Response:
        return JsonResponse({"version": version("gpt2onnx")})

    _add_probes(app, about, "/version")

    @app.get(
        "/metrics",
        response_class=Response,
        responses=_errors(401, 403) | {200: {"content": {"text/plain": {}}}},
        summary="Metrics in Prometheus' format",
    )
    async def figures() -> Response:
        engines = {service.name: service.engine for service in pool.services}
        for name, own in metrics.models.items():
            engine = engines.get(name)  # None: the model was dropped
            own.running.set(engine.running if engine else 0)
            own.waiting.set(engine.waiting if engine else 0)
            own.cache_use.set(engine.cache_use if engine else 0)
        page = await asyncio.to_thread(metrics.page)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_probes(app: FastAPI, answer: Callable[[], Coroutine[Any, Any, Response]], *paths: str) -> None:
    """Lets load balancers ask for the head alone, and under other names."""
    for path in paths:
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    for path in paths[1:]:
        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)


def _add_pages(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(reference.page(app.openapi()), media_type="text/html; charset=utf-8")

    # One route a file: a folder mounted at / would answer for all other paths and methods.
    for file in _PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)


def _sender(file: Path) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def send() -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return send


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Response:
        return ApiError(429, str(error), headers={"retry-after": str(error.seconds)}).response()

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> Response:
        return ApiError(503, str(error), headers={"retry-after": "5"}).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if isinstance(reason := error.__cause__, UnicodeDecodeError):  # FastAPI's own words don't say where
            place = f"byte {reason.start} of the body, {reason.object[reason.start]:#04x},"
            return ApiError(400, f"{place} is not UTF-8").response()
        path, method = request.url.path, request.method
        known = ", ".join(route.path for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema)
        message = {404: f"there is no {path}, only {known}: see /docs", 405: f"{path} doesn't take {method}: see /docs"}
        text = message.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, text, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server has failed: see its log").response()


def _errors(*statuses: int) -> _Routes:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _invalid(error: RequestValidationError) -> ApiError:
    """A body that isn't a CompletionRequest, in one line."""
    # A field of several types fails once for each; what is wrong inside the right one says more than its type.
    found = [(_place(each, error.body), each) for each in error.errors()[:_MOST_ERRORS]]
    place, first = min(found, key=lambda each: (each[1]["type"].endswith("_type"), -each[0].count(".")))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {shown(place)}", place[:_LONGEST_NAME], "unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the request isn't JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    name = place.partition(".")[0]
    bodies = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
    field = next((body.model_fields[name] for body in bodies if name in body.model_fields), None)
    if field is None:
        return ApiError(400, 'the request isn\'t a JSON object such as {"prompt": "Once upon a time"}', name or None)
    if name == "prompt":
        message = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists"
        return ApiError(400, message, name)
    if name in CompletionRequest.UNSUPPORTED:
        return ApiError(400, f"{name}: {field.description}", name, "unsupported_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    if _wanted(first) is not None:
        message = "input should be " + " or ".join(
            wanted for where, each in found if where == place and (wanted := _wanted(each)) is not None
        )
    written = place[:_LONGEST_NAME].encode("unicode_escape").decode()  # keys may be any text
    return ApiError(400, f"{written}: {message}", name)


def _place(error: dict[str, Any], body: Any) -> str:
    """Where a body is wrong, such as messages.0.role. pydantic's own places also name the alternatives that it has tried."""
    place, rest = [], error["loc"][1:]
    for number, part in enumerate(rest, start=1):
        body = body if isinstance(body, dict | list) else {}
        inside = isinstance(part, int) and 0 <= part < len(body) if isinstance(body, list) else part in body
        if inside:
            body = body[part]
        elif number < len(rest) or error["type"] != "missing":
            continue
        place.append(str(part))
    return ".".join(place)


def _wanted(error: dict[str, Any]) -> str | None:
    """The type or values that one alternative of a field takes; None for an error of another kind."""
    if error["type"] in ("dict_type", "model_attributes_type"):
        return "an object"
    of_type = error["type"] == "literal_error" or error["type"].endswith("_type")
    return error["msg"].removeprefix(_INPUT) if of_type and error["msg"].startswith(_INPUT) else None
