"""Server: socket, signals, and the order of start and shutdown."""

import asyncio
import codecs
import contextlib
import errno
import gc
import logging
import os
import re
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gpt2onnx.errors import OptionError

from ...models.limits import BODIES, HEADER_SECONDS, IDLE_SECONDS, KEY_FILE, WRITE_SECONDS
from ...models.messages import shown
from ...runtime.model import Model
from ..chat_template import ChatTemplate
from ..engine import Engine
from ..metrics import Metrics
from ..pool import Pool, Unloaded
from ..service import Limits, Notifier, Service
from .app import make_app
from .connections import OncePerSecond, TimedConnection, Waiting, most
from .guard import Admission

_log = logging.getLogger(__name__)
_TICK_SECONDS = 0.02  # between two looks whether the last request is done
_JOIN_SECONDS = 5  # for the last step of the batch
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?/?")
_PORTS = {"http": "80", "https": "443"}  # that browsers leave out
_BACKLOG = 2048  # uvicorn's default
# Connections that asyncio accepts in a row. Between two rows the server cuts off old ones, so that new ones find a descriptor.
_ACCEPTED_AT_ONCE = 8
# Python's default, 5 ms, lets the event loop's thread hold the engine's up for longer than a step takes.
_SWITCH_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server.

    Attributes:
        names: the first model's, for clients; responses have the first of them.
        others: further models, by their names.
        chat_template: template of chats in place of the models' own: a file, or "turns".
        cors_origins: web pages that may use the server from a browser; "*" for all.
        root_path: of the server behind a proxy.
        certificate, private_key: files for TLS; None: plain HTTP.
        joules: the machine's energy since its last call, in joules; None: energy isn't measured.
        header_seconds: time for a request's headers to arrive.
        write_seconds: time for a client to read a full write buffer.
        shutdown_seconds: time for running requests to finish.
        bodies: most bytes of bodies that haven't arrived as a whole, if that is room for two.
    """

    names: Sequence[str]
    others: Mapping[str, Unloaded] = field(default_factory=dict)
    chat_template: str | None = None
    cors_origins: Sequence[str] = ()
    root_path: str = ""
    certificate: Path | None = None
    private_key: Path | None = None
    max_batch: int = 16
    max_queue: int = 128
    limits: Limits = field(default_factory=Limits)
    admission: Admission = field(default_factory=Admission)
    joules: Callable[[], float] | None = None
    log_prompts: bool = False
    header_seconds: float = HEADER_SECONDS
    write_seconds: float = WRITE_SECONDS
    shutdown_seconds: float = 30.0
    connections: int = field(default_factory=most)
    bodies: int = BODIES


def listen(host: str, port: int) -> socket.socket:
    """Opens the server's socket. Clients that connect before `serve` is ready wait for it.

    Raises:
        OptionError: there is no such address, or another process has it.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sets TCP_NODELAY only where the protocol is named.
        server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # On Windows, it would let two servers share a port.
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


@contextlib.contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """Opens a Unix socket in place of an address, and removes it at the end.

    Raises:
        OptionError: another process listens there, or it can't be made.
    """
    if sys.platform == "win32":
        raise OptionError("Windows has no Unix sockets for servers: give --host and --port")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
                contextlib.suppress(ConnectionRefusedError),
            ):
                client.connect(str(path))
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()  # of a server that was killed
        server.bind(str(path))
        server.listen(_BACKLOG)
        made = path.stat()
    except OSError as error:
        server.close()
        raise OptionError(f"can't listen on {path}: {error.strerror or error}") from error
    try:
        with server:
            yield server
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), made):
                path.unlink()


def address_of(listener: socket.socket, scheme: str) -> str:
    """A server's address for clients."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def read_keys(path: Path) -> list[bytes]:
    """Reads API keys, one a line.

    Raises:
        OptionError: the file can't be read, or holds no key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(KEY_FILE + 1)
            readable = sys.platform != "win32" and os.fstat(file.fileno()).st_mode & 0o077
    except OSError as error:
        raise OptionError(f"can't read {path}: {error.strerror}") from error
    if len(content) > KEY_FILE:
        raise OptionError(f"{path} has more than {KEY_FILE:,} bytes: is it another file?")
    if readable:
        _log.warning("other users can read %s, which holds API keys: chmod 600 %s", path, path)
    keys = [line.strip() for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if not keys:
        raise OptionError(f"{path} holds no API key: write one a line into it")
    return keys


def origin_of(text: str) -> str:
    """A web page's origin as browsers send it.

    Raises:
        OptionError: it is none.
    """
    if text in ("*", "null"):  # all, and that of files
        return text
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise OptionError(
            f"{shown(text)} is no origin: give a page's scheme, host and port, as in http://localhost:3000"
        )
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + ("" if port in (None, _PORTS.get(scheme)) else f":{port}")


def check_certificate(certificate: Path, private_key: Path | None) -> None:
    """Raises OptionError if TLS can't be spoken with a certificate and its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise OptionError(
            f"can't use {certificate} for TLS: {reason}; it has to be PEM, with its private key"
        ) from error


def serve(model: Model, listener: socket.socket, settings: Settings, ready: Callable[[str], None]) -> bool:
    """Serves a model until SIGINT or SIGTERM, or until a forward pass doesn't end.

    Args:
        listener: from `listen`.
        ready: called with the server's address once it takes requests.

    Returns:
        Whether the model's thread is still in a forward pass, so that Python can't end in order.
    """
    server = make_server(model, listener, settings, ready)
    OncePerSecond().install()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # The garbage collector then skips all objects so far, which live until the end.
    gc.collect()
    gc.freeze()
    server.run([listener])
    return any(engine.alive for engine in server.pool.engines)


def make_server(
    model: Model, listener: socket.socket, settings: Settings, ready: Callable[[str], None] = lambda address: None
) -> "Server":
    """Builds the server of `serve`; the caller runs it."""
    metrics, notifier = Metrics(settings.joules), Notifier()

    def serve_model(names: Sequence[str], model: Model) -> Service:
        measured = metrics.of(names[0], model)
        engine = Engine(model, max_batch=settings.max_batch, max_queue=settings.max_queue, metrics=measured)
        return Service(
            names=names,
            model=model,
            engine=engine,
            limits=settings.limits,
            log_prompts=settings.log_prompts,
            chat_template=ChatTemplate.of_bundle(model.bundle.folder, settings.chat_template),
            notifier=notifier,
        )

    pool = Pool(serve_model(settings.names, model), settings.others, serve_model)
    app: ASGIApp = make_app(pool, metrics, settings.admission)
    if settings.cors_origins:  # outside of the guard: browsers send no key with the request that asks for leave
        app = CORSMiddleware(app, settings.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
    waiting = Waiting(settings.connections, max(settings.bodies, 2 * settings.admission.body_bytes))
    config = uvicorn.Config(
        app,
        http=partial(  # type: ignore[arg-type]
            TimedConnection,
            header_seconds=settings.header_seconds,
            write_seconds=settings.write_seconds,
            waiting=waiting,
        ),
        backlog=_ACCEPTED_AT_ONCE,
        ws="none",
        lifespan="on",
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 5,
        root_path=settings.root_path,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
    )
    address = address_of(listener, "http" if settings.certificate is None else "https")
    return Server(config, pool, waiting, settings.shutdown_seconds, lambda: ready(address))


class Server(uvicorn.Server):
    """uvicorn's server, which also ends the engines: running requests finish, then the threads.

    Args:
        pool: the models; the first one's engine is started by the application.
        waiting: the connections that wait for their clients.
        shutdown_seconds: time for running requests to finish.
        ready: called once the server listens.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        pool: Pool,
        waiting: Waiting,
        shutdown_seconds: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.pool, self._waiting = pool, waiting
        self._shutdown_seconds, self._ready = shutdown_seconds, ready

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Starts to listen, and calls `ready`."""
        await super().startup(None if sockets is None else list(sockets))
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio has told the system how many it accepts at once
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Looks whether it is time to end, ten times a second."""
        return any(engine.fail_if_stuck() for engine in self.pool.engines) or await super().on_tick(counter)

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Refuses new requests; ends once the others are answered, or with errors after `shutdown_seconds`.

        Until then it listens, so that /health and new requests get their 503.
        """
        engines = self.pool.engines
        for engine in engines:
            engine.close()
        loop = asyncio.get_running_loop()
        timer, deadline = loop.call_later(self._shutdown_seconds, self._abandon), loop.time() + self._shutdown_seconds
        while any(each.running or each.waiting for each in engines) and not self.force_exit and loop.time() < deadline:
            await asyncio.sleep(_TICK_SECONDS)
        self._waiting.cut_bodies()
        await super().shutdown(None if sockets is None else list(sockets))
        if self.force_exit:  # uvicorn then skips the application's end, and logs a trace
            await self.lifespan.shutdown()
        timer.cancel()
        self._abandon()
        for engine in engines:
            if not self.force_exit and engine.failure is None:
                await asyncio.to_thread(engine.join, min(_JOIN_SECONDS, self._shutdown_seconds))

    def _abandon(self) -> None:
        for engine in self.pool.engines:
            engine.abandon()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Lets the process end normally on SIGINT and SIGTERM: uvicorn would raise them again."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shuts down; at once on a second Ctrl-C."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            self._abandon()
