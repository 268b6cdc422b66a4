"""The server's process: its socket, its signals, and the order in which things start and end."""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gpt2onnx.errors import MissingExtraError, OptionError

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError("Serving", "uvicorn", "serve") from error

from ..runtime.model import Model
from .app import make_app
from .completions import Limits, Service
from .engine import Engine
from .guard import Admission, is_loopback
from .metrics import Metrics
from .power import Power

_HEADER_SECONDS = 30.0
_KEPT_ALIVE = 30  # seconds without a request
_BACKLOG = 2048
# Python's default lets a thread that handles clients keep the one that owns the model waiting for longer than a step takes.
_SWITCH_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve.

    Attributes:
        name: of the model, for clients.
        max_batch: sequences that run together.
        max_queue: prompts that wait for room among them.
        limits: of a request.
        admission: who may send what.
        energy: whether it is measured.
        country: whose electricity it is; see `track_energy`.
        log_prompts: log what is asked and answered.
        shutdown_seconds: what runs gets so long to finish.
    """

    name: str
    max_batch: int = 16
    max_queue: int = 128
    limits: Limits = field(default_factory=Limits)
    admission: Admission = field(default_factory=Admission)
    energy: bool = False
    country: str | None = None
    log_prompts: bool = False
    shutdown_seconds: float = 30.0


def listen(host: str, port: int) -> socket.socket:
    """A socket for clients; those that come before `serve` is ready wait for it.

    Raises:
        OptionError: there is no such address, or somebody else has it.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol named, as only then asyncio sends small packets at once (TCP_NODELAY).
        server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # On Windows it would let two servers have one port.
            if sys.platform != "win32":
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen(_BACKLOG)
        except BaseException:
            server.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"can't listen on {host} port {port}: {reason}") from error
    return server


def read_keys(path: Path) -> list[bytes]:
    """API keys, one a line.

    Raises:
        OptionError: the file can't be read, or holds none.
    """
    try:
        keys = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise OptionError(f"can't read {path}: {error.strerror}") from error
    if not keys:
        raise OptionError(f"{path} holds no API key: write one into it, in a line of its own")
    return keys


def serve(
    model: Model, listener: socket.socket, settings: Settings, ready: Callable[[str], None], *, signals: bool = True
) -> None:
    """Serves a model until a signal says to stop.

    Args:
        model: what is served.
        listener: from `listen`.
        settings: how.
        ready: is called with the server's address, once it can be reached.
        signals: heed SIGINT and SIGTERM; only the main thread can.
    """
    server = make_server(model, listener, settings, ready, signals=signals)
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What is there now stays, so looking through it again and again for garbage is a waste.
    gc.collect()
    gc.freeze()
    server.run([listener])


def make_server(
    model: Model,
    listener: socket.socket,
    settings: Settings,
    ready: Callable[[str], None] = lambda address: None,
    *,
    signals: bool = False,
) -> "Server":
    """The server of `serve`, not yet running."""
    metrics = Metrics()
    metrics.describe(settings.name, model)
    power = Power(metrics, settings.country) if settings.energy else None
    engine = Engine(model, max_batch=settings.max_batch, max_queue=settings.max_queue, metrics=metrics, power=power)
    service = Service(settings.name, model, engine, settings.limits, power, log_prompts=settings.log_prompts)
    config = uvicorn.Config(
        make_app(service, metrics, settings.admission),
        http=_Protocol,
        backlog=_BACKLOG,
        ws="none",
        lifespan="on",
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEPT_ALIVE,
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 5,
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return Server(config, engine, power, settings.shutdown_seconds, lambda: ready(address), signals=signals)


class Server(uvicorn.Server):
    """A server that finishes what runs before it ends; made by `make_server`."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        power: Power | None,
        patience: float,
        ready: Callable[[], None],
        *,
        signals: bool,
    ) -> None:
        super().__init__(config)
        self.engine = engine
        self._power, self._patience, self._ready, self._signals = power, patience, ready, signals

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Starts to listen, and says so."""
        await super().startup(None if sockets is None else list(sockets))
        if self._power is not None:
            self._power.start()
        self._ready()

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Refuses new requests, and ends when those there are have been answered or the patience is over."""
        self.engine.close()
        impatience = asyncio.get_running_loop().call_later(self._patience, self.engine.abandon)
        await super().shutdown(None if sockets is None else list(sockets))
        impatience.cancel()
        self.engine.abandon()
        if not self.force_exit:
            await asyncio.to_thread(self.engine.join, 5)
        if self._power is not None:
            self._power.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ends normally on SIGINT and SIGTERM, where uvicorn would raise them once more."""

        def heed(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)
            if self.force_exit:
                self.engine.abandon()

        before = (
            {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)} if self._signals else {}
        )
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """A connection whose headers have to come in time, and which the application can cut."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = self.app_state | {"abort": transport.abort}
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_waiting()  # the time between requests is uvicorn's own

    def _await_headers(self) -> None:
        """Headers in parts don't get more time than headers at once."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def is_open(host: str) -> bool:
    """Whether others than this machine can reach an address to listen on."""
    return not is_loopback(host)
