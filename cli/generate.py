"""gpt2onnx generate"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gpt2onnx.errors import OutputError, PromptError

from ..runtime import jobs
from ..runtime.jsontext import to_line
from ..runtime.model import BATCH_SIZE, Model
from ..runtime.requests import Request, Result
from . import console, energy_options, fleet_options
from .generation_options import generation_options, token_ids
from .model_options import device_options, draft_options, drafts, load, model_option

if TYPE_CHECKING:
    from ..experiments.energy.tracker import EnergyTracker


@click.command("generate")
@click.argument("prompt", required=False)
@model_option
@click.option("--prompt-ids", type=token_ids, help="The prompt as token ids, such as 1,2,3.")
@click.option("--input", "input_name", type=click.Path(), help="Requests, one JSON object a line.")
@click.option(
    "--output",
    "output_name",
    type=click.Path(),
    help="With --input: where the results go (default: standard output).",
)
@click.option("--resume", is_flag=True, help="With --output: go on where an interrupted job stopped.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=BATCH_SIZE,
    show_default=True,
    help="With --input: requests decoded together.",
)
@fleet_options.fleet_options
@device_options
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
    prompt: str | None, model: str, prompt_ids: list[int] | None, input_name: str | None, output_name: str | None,
    resume: bool, batch_size: int, fleet: fleet_options.FleetOptions | None, device: str, threads: int | None,
    stream: bool | None, echo: bool | None,
    as_json: bool, energy_file: Path | None, country: str | None, energy_seconds: float | None, quiet: bool, given: dict[str, Any],
) -> None:  # fmt: skip
    """Continue PROMPT, or standard input where there is none.

    An option that isn't given is that of the model's generation_config.json; "none" switches an option off. A sampling
    option (temperature, top-k, top-p, seed and the like) turns sampling on.

    \b
    Examples:
      gpt2onnx generate "Once upon a time"
      gpt2onnx generate "Once upon a time" --temperature 0.8 --seed 1 --max-new-tokens 100
      gpt2onnx generate "Once upon a time" --num-beams 6 --energy emissions.csv --country FRA
      gpt2onnx generate --input requests.jsonl --output results.jsonl --resume
      gpt2onnx generate --input requests.jsonl --output results --engine ray --workers 2
    """
    input_file = None if input_name is None else Path(input_name)
    output_file = None if output_name is None else Path(output_name)
    if input_file is None and (output_file is not None or resume):
        raise click.UsageError("--output and --resume go with --input")
    if resume and output_file is None:
        raise click.UsageError("--resume goes with --output")
    if input_file is not None and (prompt is not None or prompt_ids is not None):
        raise click.UsageError("--input takes the place of a prompt")
    if prompt is not None and prompt_ids is not None:
        raise click.UsageError("give a prompt or --prompt-ids, not both")
    if input_file is not None and (stream or echo is not None):
        raise click.UsageError("--stream and --echo go with a single prompt, not with --input")
    if stream and as_json:
        raise click.UsageError("--stream and --json exclude each other")
    if energy_file is None and (country is not None or energy_seconds is not None):
        raise click.UsageError("--country and --energy-seconds go with --energy")
    if input_file is not None and energy_seconds is not None:
        raise click.UsageError("--energy-seconds repeats a run: not with --input, which is run once")
    if fleet is not None:
        if input_name is None or output_name is None:
            raise click.UsageError("--engine ray goes with --input and --output")
        if energy_file is not None:
            raise click.UsageError("--energy is measured on one machine: not with --engine ray")
        if drafts():
            raise click.UsageError("--draft and --draft-model are for this machine: not with --engine ray")
        fleet_options.run(
            fleet, model, input_name, output_name, resume=resume, batch_size=batch_size, device=device, threads=threads,
            given=given, as_json=as_json, quiet=quiet,
        )  # fmt: skip
        return
    text_or_ids = prompt if prompt is not None else prompt_ids
    if text_or_ids is None:
        text_or_ids = (
            ""
            if input_file is not None
            else console.standard_input("give a prompt, --prompt-ids, --input, or text on standard input")
        )

    with ExitStack() as stack:
        tracker = None
        if energy_file is not None:
            # Before the model: a missing package or a file that can't be written is told at once.
            from ..experiments.energy.tracker import track_energy

            settings = energy_options.settings(country, energy_seconds)
            tracker = stack.enter_context(track_energy(energy_file, **settings))
        # A job's results don't depend on those before, which a resumed one hasn't computed.
        loaded = load(model, device, threads, **({} if input_file is None else {"wide_after": 0}))
        if input_file is not None:
            _run_job(loaded, input_file, output_file, resume, batch_size, quiet, given, tracker)
            return
        request = Request(text_or_ids, loaded.options(given))
        started = time.perf_counter()
        if as_json:
            result = _interruptible(loaded, request)
            click.echo(to_line(result.to_dict()))
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
    """Prints the continuation as it grows or, where that is impossible or not wanted, at once."""
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


def _run_job(
    model: Model, input_file: Path, output_file: Path | None, resume: bool, batch_size: int, quiet: bool, given: dict[str, Any],
    tracker: "EnergyTracker | None",
) -> None:  # fmt: skip
    """Carries out a file of requests; each result is written as soon as those before it are."""
    options = model.options(given)
    try:
        lines: IO[str] = input_file.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PromptError(f"can't read {input_file}: {error.strerror}") from error
    # Closing what can't be written fails once more, so the files are closed inside.
    try:
        with ExitStack() as stack:
            stack.enter_context(lines)
            if output_file is not None and output_file.exists() and output_file.samefile(input_file):
                raise OutputError(f"{output_file} is the input, too: choose another output")
            output = _open_output(output_file, lines if resume else None)
            if output_file is not None:
                stack.enter_context(output)
            advance = stack.enter_context(console.line_progress(input_file.name, quiet=quiet))
            records = jobs.run(model, lines, options, batch_size)
            for record in records if tracker is None else tracker.job(model, options, records):
                output.write(to_line(record) + "\n")
                output.flush()
                advance(1, record.get("usage", {}).get("completion_tokens", 0))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"can't write {output_file or 'standard output'}: {error.strerror}") from error


def _open_output(path: Path | None, done: IO[str] | None) -> IO[str]:
    """Opens the output; to resume, behind its last whole line, with as many requests skipped in the input `done`."""
    if path is None:
        return sys.stdout
    if done is None or not path.exists():
        if path.is_file() and not _holds_results(path):
            raise OutputError(f"{path} exists and doesn't hold results: choose another output")
        return path.open("w", encoding="utf-8")
    requests = filter(str.strip, iter(done.readline, ""))
    end = 0
    with path.open("r+b") as output:
        for line in output:
            if not line.endswith(b"\n"):
                break
            request = next(requests, None)
            if request is None or jobs.identity(request) != jobs.identity(line.decode("utf-8", "replace")):
                raise OutputError(
                    f"{path} holds results of other requests: choose another output, or leave out --resume"
                )
            end += len(line)
        output.truncate(end)
    return path.open("a", encoding="utf-8")


def _holds_results(path: Path) -> bool:
    """Whether a file may be overwritten: it is empty, or begins with a result."""
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    return not first.strip() or first.startswith((b'{"id": ', b'{"error": '))
