"""The interface over HTTP: OpenAI's completions, and what operators look at."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpt2onnx.errors import MissingExtraError

try:
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse
    from fastapi.security import HTTPBearer
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError("Serving", "fastapi", "serve") from error

from . import reference
from .api_error import ApiError
from .call import Bell, Call
from .completions import Service
from .engine import QueueFullError, UnavailableError
from .guard import Admission, Guard
from .metrics import Metrics
from .protocol import Completion, CompletionRequest, ErrorBody, Health, ServedModel, ServedModels
from .sent import to_json
from .stream import EventStream, Left, watched

PAGE = Path(__file__).parent / "page"

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong, or doesn't fit into the context window."},
    401: {"description": "The API key is missing or wrong."},
    403: {"description": "The server was called by a name that isn't this machine's."},
    404: {"description": "There is no such model."},
    408: {"description": "The request came too slowly."},
    413: {"description": "The request is too large."},
    415: {"description": "The request isn't JSON."},
    429: {"description": "Too many requests are waiting; Retry-After says when to try again."},
    500: {"description": "The server has failed."},
    503: {"description": "The server is shutting down, or its model has failed."},
    504: {"description": "The request wasn't done in time."},
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] | {"model": ErrorBody} for status in statuses}


class JsonResponse(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def make_app(service: Service, metrics: Metrics, admission: Admission) -> Guard:
    """The application, behind its guard.

    Args:
        service: makes the completions.
        metrics: what /metrics shows.
        admission: who may send what.
    """
    bells: list[Bell] = []

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        bells.append(Bell())
        service.engine.start()
        yield

    app = FastAPI(
        title="gpt2onnx",
        version=version("gpt2onnx"),
        summary=f"OpenAI's completions interface to {service.name}.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    # Said here for the document; the guard does it.
    key = [Depends(HTTPBearer(auto_error=False))] if admission.keys else []
    entry = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "gpt2onnx",
        "context_length": service.model.config.n_positions,
        "vocab_size": service.model.config.vocab_size,
        "dtype": service.model.bundle.manifest.dtype,
        "device": service.model.session.device,
        "energy": service.power is not None,
    }

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=_errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
        | {
            200: {
                "description": "The completions; with stream, events that each hold a part.",
                "content": {"text/event-stream": {}},
            }
        },
        summary="Continue prompts",
        dependencies=key,
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        call = await asyncio.to_thread(service.prepare, body, bells[0].ring)
        deadline = time.monotonic() + service.limits.seconds
        try:
            call.submit()
        except QueueFullError as error:
            raise ApiError(429, str(error), headers={"retry-after": str(error.seconds)}) from error
        except UnavailableError as error:
            raise ApiError(503, str(error), headers={"retry-after": "5"}) from error
        if body.stream:
            return EventStream(call, deadline, metrics)
        try:
            return await _whole(call, request, deadline)
        except Left:
            metrics.abandoned.labels("client").inc()
            return Response(status_code=499)  # nobody reads it
        except TimeoutError as error:
            metrics.abandoned.labels("timeout").inc()
            raise call.too_late() from error
        finally:
            call.close()

    @app.get(
        "/v1/models",
        response_model=ServedModels,
        responses=_errors(401, 403),
        summary="List the model",
        dependencies=key,
    )
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [entry]})

    @app.get(
        "/v1/models/{model:path}",
        response_model=ServedModel,
        responses=_errors(401, 403, 404),
        summary="Describe the model",
        dependencies=key,
    )
    async def model(model: str) -> Response:
        if model != service.name:
            raise ApiError(404, f"the model {model!r} isn't served, only {service.name!r}", "model", "model_not_found")
        return JsonResponse(entry)

    @app.get(
        "/health",
        response_model=Health,
        responses=_errors(403) | {503: {"model": Health, "description": "It takes no requests."}},
        summary="Tell whether requests are taken",
    )
    async def health() -> Response:
        engine = service.engine
        status = "failed" if engine.failure is not None else "stopping" if engine.stopping else "ok"
        content = {"status": status, "running": engine.running, "waiting": engine.waiting}
        return JsonResponse(content, status_code=200 if status == "ok" else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses=_errors(401, 403) | {200: {"content": {"text/plain": {}}}},
        summary="Figures for Prometheus",
        dependencies=key,
    )
    async def figures() -> Response:
        metrics.running.set(service.engine.running)
        metrics.waiting.set(service.engine.waiting)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(reference.page(app.openapi()), media_type="text/html; charset=utf-8", headers=reference.HEADERS)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JsonResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JsonResponse(_explained(error).body, 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = {404: f"there is no {request.url.path}", 405: f"{request.url.path} doesn't take {request.method}"}
        text = message.get(error.status_code, str(error.detail))
        return JsonResponse(ApiError(error.status_code, text).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JsonResponse(ApiError(500, "the server has failed: its log says why").body, 500)

    # Each by its name: a folder mounted at / would answer for all paths and methods that aren't here.
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_api_route(path, _sender(file), methods=["GET", "HEAD"], include_in_schema=False)
    return Guard(app, admission, metrics)


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return send


async def _whole(call: Call, request: Request, deadline: float) -> Response:
    """The completions, once all are done.

    Raises:
        ApiError: one of them has failed.
        Left: the client has.
        TimeoutError: the deadline is over.
    """
    async with watched(request.receive, call.news) as client:
        while not call.done:
            await client.wait(deadline)
    if (failure := call.failure()) is not None:
        raise failure
    choices = list(call.take())
    return JsonResponse(call.record(choices, call.usage))


def _explained(error: RequestValidationError) -> ApiError:
    """What is wrong with a request's body, in one line."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    field = place[0] if place and place[0] in CompletionRequest.model_fields else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {'.'.join(place)!r}", ".".join(place), "unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the request isn't JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if field is None:
        return ApiError(400, 'the request isn\'t a JSON object such as {"prompt": "Once upon a time"}')
    if field == "prompt":
        return ApiError(
            400, "prompt must be a text, a list of texts, a list of token ids, or a list of such lists", field
        )
    if not (description := CompletionRequest.model_fields[field].description or "").startswith("Not supported"):
        description = first["msg"][:1].lower() + first["msg"][1:]
    code = "unsupported_parameter" if description.startswith("Not supported") else None
    return ApiError(400, f"{field}: {description}", field, code)
