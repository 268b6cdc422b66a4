"""gpt2onnx serve"""

import logging
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
    help="Clients have to send the key in this file; any of them, where it has several lines.",
)
@click.option(
    "--max-batch", type=click.IntRange(1), default=16, show_default=True, help="Sequences that are decoded together."
)
@click.option("--max-queue", type=click.IntRange(1), default=128, show_default=True, help="Prompts that wait for room.")
@click.option("--max-prompt-tokens", type=click.IntRange(1), help="Of one prompt (default: the context window).")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Most that a request may ask for (default: the context window)."
)
@click.option(
    "--max-body", type=click.IntRange(1), default=2**20, show_default=True, help="Bytes that a request may have."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds until a request has to be done.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that requests get to finish after SIGTERM or Ctrl-C.",
)
@click.option("--energy", is_flag=True, help="Measure the energy; needs the extra 'energy'.")
@click.option("--country", metavar="ISO3", help="With --energy: whose electricity it is, such as FRA.")
@click.option("--log-prompts", is_flag=True, help="Log prompts and texts, which otherwise never happens.")
@device_options
@console.verbosity
def command(
    host: str, port: int, name: str | None, api_key_file: Path | None, max_batch: int, max_queue: int,
    max_prompt_tokens: int | None, max_tokens: int | None, max_body: int, timeout: float, shutdown_timeout: float,
    energy: bool, country: str | None, log_prompts: bool, model: str, device: str, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Serve a model over HTTP, with OpenAI's completions interface.

    Requests join and leave one running batch. The address shows a page to try the model; /docs
    describes the interface. SIGTERM or Ctrl-C finishes what runs, and ends.

    \b
    Examples:
      gpt2onnx serve -m tales
      gpt2onnx serve -m tales --port 8080 --max-batch 32 --api-key-file key.txt
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
    """
    if country is not None and not energy:
        raise click.UsageError("--country goes with --energy")
    from ..serving import server
    from ..serving.completions import Limits
    from ..serving.guard import Admission

    keys = [] if api_key_file is None else server.read_keys(api_key_file)
    settings = server.Settings(
        name=name or Path(model).name,
        max_batch=max_batch,
        max_queue=max_queue,
        limits=Limits(prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, seconds=timeout),
        admission=Admission(keys=keys, only_local=not keys and not server.is_open(host), body_bytes=max_body),
        energy=energy,
        country=country,
        log_prompts=log_prompts,
        shutdown_seconds=shutdown_timeout,
    )
    # Before the model: an address that isn't free is said at once.
    with server.listen(host, port) as listener:
        if server.is_open(host) and not keys:
            click.echo(f"warning: whoever reaches {host} can use this server: give --api-key-file", err=True)
        if log_prompts:
            logging.getLogger("gpt2onnx.serving").setLevel(logging.INFO)
        loaded = load(model, device, threads, wide_after=0)

        def ready(address: str) -> None:
            if not quiet:
                click.echo(f"{settings.name} is served at {address}", err=True)

        server.serve(loaded, listener, settings, ready)
