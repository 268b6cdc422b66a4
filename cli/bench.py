"""gpt2onnx bench"""

import time
from typing import TYPE_CHECKING, Any

import click

from ..models.tables import aligned, table
from . import console
from .model_options import cache_option, device_options, exported, load, model_option

if TYPE_CHECKING:
    from ..experiments.benchmark import Benchmark, Spread


@click.command("bench")
@model_option
@click.option("--prompt-tokens", type=int, default=32, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", type=int, default=128, show_default=True, help="Length of each continuation.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Prompts decoded together.")
@click.option("--repetitions", type=int, default=5, show_default=True, help="Runs that count, after one to warm up.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random prompts.")
@device_options
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@console.verbosity
def command(model: str, device: str, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure decoding speed, memory, and the share of the machine's read bandwidth that decoding uses.

    Prompts are random tokens, all of one length. Decoding is greedy, without an end token, in the loop that all
    commands use. "of the bandwidth": the share of the machine's read bandwidth that it takes to read all weights once
    a token. The bandwidth is measured between the runs. Without drafts nothing can be above 100 %; with a twin one
    reading serves several tokens, so it may be more.

    \b
    Examples:
      gpt2onnx bench
      gpt2onnx bench -m ./gpt2-int8 --prompt-tokens 512 --new-tokens 64
      gpt2onnx bench -m ./gpt2-int8 --batch-size 16 --threads 2 --json
    """
    from ..experiments.benchmark import benchmark
    from ..experiments.machine import describe, setting

    folder = exported(model)  # exports a source before loading is timed
    started = time.perf_counter()
    loaded = load(str(folder), device, threads)
    seconds = time.perf_counter() - started
    with console.progress_bar(f"Timing {model}", "runs", quiet=quiet) as progress:
        result = benchmark(loaded, progress=progress, **options)
    facts: dict[str, Any] = {"model": model} | setting(loaded) | {"load_seconds": seconds} | describe()
    if as_json:
        console.print_json(facts | result.to_dict())
        return
    if not quiet:
        click.echo(_heading(facts, result))
    click.echo(_figures(facts, result))


def _heading(facts: dict[str, Any], result: "Benchmark") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cache = ", cache in int8" if facts["cache_dtype"] == "int8" else ""
    return (
        f"{facts['model']} ({facts['dtype']}{cache}) on {facts['device']}, {facts['threads']} threads: prompts of"
        f" {result.prompt_tokens} tokens, {result.new_tokens} new, batch {result.batch_size}\n"
        f"{facts['processor']}, {facts['cores']} cores, {facts['system']}\n{versions}\n"
    )


def _figures(facts: dict[str, Any], result: "Benchmark") -> str:
    rows = [
        ["prefill", *_spread(result.prefill, ",.1f"), "tokens/s"],
        ["time to first token", *_spread(result.time_to_first_token, ",.2f", 1e3), "ms"],
    ]
    if result.decode is not None:
        rows.append(["decode", *_spread(result.decode, ",.1f"), "tokens/s"])
    blocks = [table([f"{result.repetitions} runs", "median", "least", "most", ""], rows)]
    facts_rows: list[list[str]] = []
    if result.seconds_per_token is not None:
        each = result.seconds_per_token
        times = f"p50 {1e3 * each.p50:,.2f}, p90 {1e3 * each.p90:,.2f}, p99 {1e3 * each.p99:,.2f}, most {1e3 * each.most:,.2f}"
        facts_rows.append(["token to token", f"{times} ms"])
    facts_rows.append(["load", f"{facts['load_seconds']:.2f} s"])
    used = result.memory
    sizes = {
        "resident": used.resident, "of it in files": used.file, "peak": used.peak, "key-value cache": result.cache_bytes,
    }  # fmt: skip
    known = [f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items() if size is not None]
    facts_rows.append(["memory", ", ".join(known)])
    if result.bandwidth is not None:
        read = result.bandwidth
        facts_rows.append(
            [
                "bandwidth",
                f"{read.bytes_per_second / 1e9:,.1f} GB/s measured; weights of {read.weights / 1e6:,.1f} MB a step take"
                f" {read.weights_share:.0%} of the bandwidth",
            ]
        )
    blocks.append(aligned(facts_rows))
    return "\n\n".join(blocks)


def _spread(figure: "Spread", form: str, factor: float = 1.0) -> list[str]:
    return [format(factor * value, form) for value in (figure.median, figure.least, figure.most)]
