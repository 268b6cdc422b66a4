"""gpt2onnx serve"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import console
from .model_options import bundle_folder, cache_option, device_options, load, loading_options

if TYPE_CHECKING:
    from ..serving.pool import Unloaded


@click.command("serve")
@click.option(
    "-m",
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]MODEL",
    default=["tales"],
    show_default="tales",
    help="A bundle, or a source that is exported once into the cache. Further ones (-m a=DIR -m b=DIR) are loaded when they are asked for.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one.")
@click.option(
    "--served-model-name",
    "--name",
    "name",
    metavar="NAME...",
    help="Names of the model for clients, several after one another (default: the bundle's or source's own).",
)
@click.argument("more_names", metavar="", nargs=-1)
@click.option(
    "--chat-template",
    metavar="FILE|NAME",
    help="Template of chats, in place of the model's own; turns joins turns by the end token.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Clients have to send a key from this file, which holds one a line.",
)
@click.option(
    "--uds", type=click.Path(path_type=Path), help="Listen on this Unix socket in place of --host and --port."
)
@click.option("--root-path", default="", help="Path under which a proxy hands requests on.")
@click.option("--ssl-certfile", type=click.Path(path_type=Path, exists=True), help="Certificate for TLS, in PEM.")
@click.option(
    "--ssl-keyfile",
    type=click.Path(path_type=Path, exists=True),
    help="Its private key, if it is in a file of its own.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Web pages that may use the server: their origin, or * (repeatable).",
)
@click.option(
    "--allowed-host", "hosts", multiple=True, help="Host name that clients may call without a key (repeatable)."
)
@click.option("--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Most sequences in the batch.")
@click.option("--max-queue", type=click.IntRange(1), default=128, show_default=True, help="Most prompts in the queue.")
@click.option("--max-prompt-tokens", type=click.IntRange(1), help="Longest prompt (default: the context window).")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Largest max_tokens of a request (default: the context window)."
)
@click.option("--max-body", type=click.IntRange(1), default=2**20, show_default=True, help="Largest request, in bytes.")
@click.option(
    "--timeout",
    type=console.FiniteRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option(
    "--shutdown-timeout",
    type=console.FiniteRange(0),
    default=30.0,
    show_default=True,
    help="Seconds for running requests to finish after SIGTERM or Ctrl-C.",
)
@click.option("--energy", is_flag=True, help="Add the machine's energy to /metrics; needs the extra 'energy'.")
@click.option("--log-prompts", is_flag=True, help="Log prompts and texts (default: only numbers).")
@device_options
@cache_option
@console.verbosity
def command(
    host: str, port: int, name: str | None, more_names: tuple[str, ...], chat_template: str | None, uds: Path | None,
    root_path: str, ssl_certfile: Path | None, ssl_keyfile: Path | None, cors_origins: tuple[str, ...], hosts: tuple[str, ...],
    api_key_file: Path | None, max_batch: int, max_queue: int,
    max_prompt_tokens: int | None, max_tokens: int | None, max_body: int, timeout: float, shutdown_timeout: float,
    energy: bool, log_prompts: bool, models: tuple[str, ...], device: str, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Serve models over HTTP, with OpenAI's interfaces for completions and chats.

    Requests join and leave one running batch (continuous batching). The address shows a page to try
    the model; /docs describes the interface. SIGTERM or Ctrl-C finishes the running requests, then ends.
    Requests name one of several models; where memory is short, the one idle for longest makes room.

    \b
    Examples:
      gpt2onnx serve -m tales
      gpt2onnx serve -m tales --port 8080 --max-batch 32 --api-key-file key.txt
      gpt2onnx serve -m small=./gpt2-int8 -m large=./gpt2-large-int4
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
    """
    if more_names and name is None:
        raise click.UsageError(f"unexpected argument {more_names[0]!r}: the model is named by -m")
    if ssl_keyfile is not None and ssl_certfile is None:
        raise click.UsageError("--ssl-keyfile goes with --ssl-certfile")
    (own, model), *others = map(_named, models)
    if others and name is not None:
        raise click.UsageError("--served-model-name goes with one model: name several by -m NAME=MODEL")
    from ..serving.http import server
    from ..serving.http.guard import Admission, is_loopback
    from ..serving.service import Limits

    keys = [] if api_key_file is None else server.read_keys(api_key_file)
    if ssl_certfile is not None:
        server.check_certificate(ssl_certfile, ssl_keyfile)
    settings = server.Settings(
        names=[name, *more_names] if name else [own],
        chat_template=chat_template,
        cors_origins=tuple(map(server.origin_of, cors_origins)),
        root_path=root_path,
        certificate=ssl_certfile,
        private_key=ssl_keyfile,
        max_batch=max_batch,
        max_queue=max_queue,
        limits=Limits(prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seconds=timeout),
        admission=Admission(
            keys=keys, only_local=not keys and is_loopback(host) and uds is None, hosts=hosts, body_bytes=max_body
        ),
        joules=_joules() if energy else None,
        log_prompts=log_prompts,
        shutdown_seconds=shutdown_timeout,
    )
    # Before the model is loaded, which takes longer than to find that the port is taken.
    with server.listen(host, port) if uds is None else server.listen_at(uds) as listener:
        if not is_loopback(host) and not keys and uds is None:
            click.echo(f"warning: anyone who reaches {host} can use this server: give --api-key-file", err=True)
        if log_prompts:
            logging.getLogger("gpt2onnx.serving").setLevel(logging.INFO)
        loaded = load(model, device, threads, wide_after=0)
        settings = replace(settings, others=_on_demand(settings.names, others, device, threads))

        def ready(address: str) -> None:
            if not quiet:
                several = f" and {len(others)} more" if others else ""
                click.echo(f"{settings.names[0]}{several} {'are' if others else 'is'} served at {address}", err=True)

        if server.serve(loaded, listener, settings, ready):
            click.echo("gpt2onnx: a forward pass didn't end, so the server ended without it", err=True)
            os._exit(1)  # Python can't stop it, and would abort if it ended while Python does


def _named(model: str) -> tuple[str, str]:
    """A model's name for clients, and what it is loaded from."""
    name, equals, source = model.partition("=")
    if equals and name and source and Path(name).name == name and not Path(model).exists():
        return name, source
    return Path(model).name, model


def _on_demand(
    taken: Sequence[str], others: Sequence[tuple[str, str]], device: str, threads: int | None
) -> dict[str, "Unloaded"]:
    """Models that are loaded with their first request, by name. Sources are exported now."""
    from gpt2onnx.loading import load as load_model

    from ..models.bundle import Bundle
    from ..serving.pool import Unloaded

    found: dict[str, Unloaded] = {}
    for name, source in others:
        if name in taken or name in found:
            raise click.UsageError(f"two models are called {name!r}: name them by -m NAME=MODEL")
        folder, options = bundle_folder(source), loading_options()
        load = functools.partial(load_model, folder, device=device, threads=threads, wide_after=0, **options)
        found[name] = Unloaded(Bundle.open(folder).with_cache(options.get("cache_dtype", "fp32")), load)
    return found


def _joules() -> Callable[[], float]:
    """A function that returns the machine's energy since its last call, in joules."""
    from ..experiments.energy.power import PowerMeter

    meter = PowerMeter()
    running = meter.start()

    def read() -> float:
        nonlocal running
        before, running = running, meter.start()  # in this order, so that no time is lost
        return before.stop().joules

    return read
