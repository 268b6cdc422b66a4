"""gpt2onnx generate"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..runtime.model import Model
from ..runtime.requests import Prompt, Request, Result
from . import console, energy_options, fleet_options, job, prompt_options
from .generation_options import generation_options, token_ids
from .model_options import cache_option, device_options, draft_options, load, loading_options, model_option


@click.command("generate", cls=prompt_options.PromptCommand)
@click.argument("prompt", required=False)
@model_option
@click.option("--prompt-ids", type=token_ids, help="The prompt as token ids, such as 1,2,3.")
@click.option(
    "--file",
    "prompt_file",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="The prompt as a file; - for standard input.",
)
@prompt_options.encoding_option
@click.option(
    "-e",
    "--escape",
    is_flag=True,
    help=r"""Replace \n, \r, \t, \', \", \\ and \xHH, a byte, in PROMPT and --stop.""",
)
@job.job_options
@click.option(
    "--tokenizer", type=click.Path(), help="Folder of a tokenizer, for a model without one or in place of its own."
)
@fleet_options.fleet_options
@device_options
@cache_option
@draft_options
@click.option(
    "--stream/--no-stream", default=None, help="Print the text as it grows (default: wherever that is possible)."
)
@click.option("--echo/--no-echo", default=None, help="Print the prompt before the text (default: on a terminal).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--energy",
    "energy_file",
    type=click.Path(path_type=Path),
    help="Measure the energy, and append a row with it to a CSV file.",
)
@energy_options.energy_options
@generation_options()
@console.verbosity
def command(
    prompt: str | None, model: str, prompt_ids: list[int] | None, prompt_file: Path | None, encoding: str, escape: bool,
    tokenizer: str | None,
    requests: job.JobOptions | None, fleet: fleet_options.FleetOptions | None, device: str, threads: int | None, stream: bool | None,
    echo: bool | None, as_json: bool, energy_file: Path | None, country: str | None, energy_seconds: float | None, quiet: bool,
    given: dict[str, Any],
) -> None:  # fmt: skip
    """Continue PROMPT, or standard input where there is none.

    An option that isn't given is that of the model's generation_config.json; "none" switches an option off. A sampling
    option (temperature, top-k, top-p, seed and the like) turns sampling on.

    \b
    Examples:
      gpt2onnx generate "Once upon a time"
      gpt2onnx generate "Once upon a time" --temperature 0.8 --seed 1 --max-new-tokens 100
      gpt2onnx generate "Once upon a time" --num-beams 6 --energy emissions.csv --country FRA
      gpt2onnx generate -e "User: hello\\nBot:" --stop "\\n"
      gpt2onnx generate --input requests.jsonl --output results.jsonl --resume
      gpt2onnx generate --input requests.jsonl --output results --engine ray --workers 2
    """
    if sum(each is not None for each in (prompt, prompt_ids, prompt_file, requests)) > 1:
        raise click.UsageError("give one of a prompt, --prompt-ids, --file and --input")
    if stream and as_json:
        raise click.UsageError("--stream and --json exclude each other")
    if energy_file is None and (country is not None or energy_seconds is not None):
        raise click.UsageError("--country and --energy-seconds go with --energy")
    if escape and "stop" in given:
        given["stop"] = [prompt_options.unescape(each) for each in given["stop"] or ()]
    if requests is not None:
        if stream or echo is not None:
            raise click.UsageError("--stream and --echo go with a single prompt, not with --input")
        if energy_seconds is not None:
            raise click.UsageError("--energy-seconds repeats a run: not with --input, which is run once")
        if fleet is not None:
            if energy_file is not None:
                raise click.UsageError("--energy is measured on one machine: not with --engine ray")
            if loading_options():
                raise click.UsageError(
                    "--draft, --draft-model and --cache-dtype are for this machine: not with --engine ray"
                )
            if tokenizer is not None:
                raise click.UsageError(
                    "--tokenizer isn't sent to workers: export the model together with its tokenizer"
                )
            fleet_options.run(
                fleet, model, requests, device=device, threads=threads, given=given, as_json=as_json, quiet=quiet
            )
            return
        job.check_output(requests)
    elif fleet is not None:
        raise click.UsageError("--engine ray goes with --input and --output")
    text_or_ids: Prompt = ""
    if prompt is not None:
        text_or_ids = prompt_options.argument(prompt, encoding)
        text_or_ids = prompt_options.unescape(text_or_ids) if escape else text_or_ids
    elif prompt_ids is not None:
        text_or_ids = prompt_ids
    elif prompt_file is not None:
        text_or_ids = prompt_options.file_text(prompt_file, encoding).removesuffix("\n")
    elif requests is None:
        hint = "give a prompt, --prompt-ids, --file, --input, or text on standard input"
        text_or_ids = prompt_options.standard_input(hint, encoding)

    with ExitStack() as stack:
        tracker = None
        if energy_file is not None:
            # Before the model: a missing package or a file that can't be written is told at once.
            from ..experiments.energy.power import DEFAULT_SECONDS
            from ..experiments.energy.tracker import track_energy

            seconds = DEFAULT_SECONDS if energy_seconds is None else energy_seconds
            tracker = stack.enter_context(track_energy(energy_file, country=country, seconds=seconds))
        # A job's results don't depend on those before, which a resumed one hasn't computed.
        others: dict[str, Any] = {} if requests is None else {"wide_after": 0}
        loaded = load(model, device, threads, tokenizer=tokenizer, **others)
        if requests is not None:
            job.run(loaded, requests, loaded.generation_config.merged(given), tracker, quiet=quiet)
            return
        request = Request(text_or_ids, loaded.generation_config.merged(given))
        started = time.perf_counter()
        if as_json:
            result = _interruptible(loaded, request)
            console.print_json(result.to_dict())
        else:
            result = _print_text(loaded, request, stream, sys.stdout.isatty() if echo is None else echo)
    if console.is_chatty(quiet=quiet):
        click.echo(_summary(result, time.perf_counter() - started), err=True)


def _summary(result: Result, seconds: float) -> str:
    tokens, energy = result.usage["completion_tokens"], result.energy
    if energy is None:
        return f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s)"
    text = f"{tokens} tokens in {result.seconds:.2f} s ({tokens / result.seconds:,.0f} tokens/s)"
    if energy.joules_per_token is not None:
        text += f", {energy.joules_per_token:.3g} J/token over {energy.runs:,} runs"
    return text if energy.reliable else f"{text}, too short to rely on"


def _can_stream(request: Request) -> bool:
    return request.options.num_beams == 1 and request.options.num_return_sequences == 1


def _interruptible(model: Model, request: Request) -> Result:
    """The result; after Ctrl-C what there is of it, where decoding goes token by token."""
    if not _can_stream(request):
        return _complete(model, request)
    stream = model.open_stream(request)
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        stream.close()
    return stream.result


def _complete(model: Model, request: Request) -> Result:
    return model.answer([request.prompt], request.options)[0]


def _print_text(model: Model, request: Request, stream: bool | None, echo: bool) -> Result:
    """Prints the continuation as it grows or, where that is impossible or not wanted, at once; tokens that have no text as ids."""
    if model.tokenizer.missing:
        result = _complete(model, request)
        before = result.prompt_ids if echo else []
        click.echo("\n---\n".join(",".join(map(str, before + one.token_ids)) for one in result.sequences))
        return result
    if stream or (stream is None and _can_stream(request)):
        pieces = model.open_stream(request)
        if echo:
            click.echo(pieces.result.prompt, nl=False)
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            pieces.close()
        click.echo()
        return pieces.result
    result = _complete(model, request)
    prompt = result.prompt if echo else ""
    click.echo("\n---\n".join(prompt + sequence.text for sequence in result.sequences))
    return result
