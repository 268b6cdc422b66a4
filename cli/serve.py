"""gpt2onnx serve"""

import logging
from collections.abc import Callable
from pathlib import Path

import click

from . import console
from .model_options import device_options, load, model_option


@click.command("serve")
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any free one.")
@click.option("--name", help="The model's name for clients (default: the bundle's or source's own).")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Clients have to send a key from this file, which holds one a line.",
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
@console.verbosity
def command(
    host: str, port: int, name: str | None, api_key_file: Path | None, max_batch: int, max_queue: int,
    max_prompt_tokens: int | None, max_tokens: int | None, max_body: int, timeout: float, shutdown_timeout: float,
    energy: bool, log_prompts: bool, model: str, device: str, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Serve a model over HTTP, with OpenAI's completions interface.

    Requests join and leave one running batch (continuous batching). The address shows a page to try
    the model; /docs describes the interface. SIGTERM or Ctrl-C finishes the running requests, then ends.

    \b
    Examples:
      gpt2onnx serve -m tales
      gpt2onnx serve -m tales --port 8080 --max-batch 32 --api-key-file key.txt
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
    """
    from ..serving import server
    from ..serving.guard import Admission, is_loopback
    from ..serving.service import Limits

    keys = [] if api_key_file is None else server.read_keys(api_key_file)
    settings = server.Settings(
        name=name or Path(model).name,
        max_batch=max_batch,
        max_queue=max_queue,
        limits=Limits(prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seconds=timeout),
        admission=Admission(keys=keys, only_local=not keys and is_loopback(host), body_bytes=max_body),
        joules=_joules() if energy else None,
        log_prompts=log_prompts,
        shutdown_seconds=shutdown_timeout,
    )
    # Before the model is loaded, which takes longer than to find that the port is taken.
    with server.listen(host, port) as listener:
        if not is_loopback(host) and not keys:
            click.echo(f"warning: anyone who reaches {host} can use this server: give --api-key-file", err=True)
        if log_prompts:
            logging.getLogger("gpt2onnx.serving").setLevel(logging.INFO)
        loaded = load(model, device, threads, wide_after=0)

        def ready(address: str) -> None:
            if not quiet:
                click.echo(f"{settings.name} is served at {address}", err=True)

        server.serve(loaded, listener, settings, ready)


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
