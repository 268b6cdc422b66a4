"""gpt2onnx parity"""

import json
from pathlib import Path
from typing import Any

import click

from . import console


@click.command("parity")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--adapter", metavar="DIR", help="The adapter of peft that was merged into SOURCE.")
@click.option(
    "--suite",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="Number of requests whose tokens are compared.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@console.verbosity
def command(
    bundle: Path, source: str, revision: str | None, adapter: str | None, suite: str, as_json: bool, quiet: bool
) -> None:
    """Compare BUNDLE with SOURCE run by PyTorch: weights, logits, and tokens of every strategy.

    Needs the extra `optimum` (torch and transformers). Exit code 1 when a check fails.

    \b
    Example:
      gpt2onnx parity ./tales tales --suite full
    """
    from ..exporter.checkpoint.checkpoint import Checkpoint
    from ..exporter.validate.parity import check
    from ..models.bundle import Bundle

    n_head = Bundle.open(bundle).config.n_head  # for a source that doesn't tell
    checkpoint = Checkpoint.open(source, revision, n_head, adapter)
    with console.progress_bar("Comparing with PyTorch", "requests", quiet=quiet) as progress:
        report = check(bundle, checkpoint, suite, progress)
    if as_json:
        console.print_json(report, indent=2)
    elif not quiet:
        click.echo(table(report))
    check_passed(report)


def check_passed(report: dict[str, Any]) -> None:
    """Ends the command with exit code 1, and names the checks, if one has failed."""
    if not report["passed"]:
        failed = [name for name, part in report.items() if isinstance(part, dict) and part.get("passed") is False]
        raise click.ClickException(f"parity with {report['reference']} failed: {', '.join(failed)}")


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"against {report['reference']}"]
    if weights := report.get("weights"):
        lines.append(f"  weights             {_weights(weights)}   {_verdict(weights)}")
    if rounded := report.get("rounded"):
        lines.append(
            f"  in PyTorch          {rounded['positions']:4} positions   difference {rounded['difference']:.1e}"
            f" (allowed {rounded['allowed']:.1e})   {_verdict(rounded)}"
        )
    for name in (each for each in ("whole", "cached", "ragged", "interchange", "wide") if each in report):
        figures = report[name]
        lines.append(
            f"  logits, {name:11} {figures['positions']:4} positions   difference {figures['difference']:.1e}"
            f" (allowed {figures['allowed']:.1e})   KL {figures['kl']:.1e}"
            f"   same top token {figures['top1_agreement']:.2%}   {_verdict(figures)}"
        )
    tokens = report["tokens"]
    lines.append(f"  tokens              {tokens['cases']} cases, {tokens['equal']} equal   {_verdict(tokens)}")
    lines += [f"  {note}" for note in tokens["notes"]]
    # Older reports have no such entry.
    lines += [f"  {count} cases left out: {reason}" for reason, count in tokens.get("left_out", {}).items()]
    if not tokens.get("passed", True):
        lines.append(f"  first difference: {json.dumps(tokens['first_difference'])}")
    if loss := report.get("loss"):
        lines.append(
            f"  the loss of {report['precision']}: KL {loss['kl']:.1e}, same top token {loss['top1_agreement']:.2%}"
            " (on prompts of random tokens)"
        )
    return "\n".join(lines)


def _weights(figures: dict[str, Any]) -> str:
    text = f"{figures['tensors']} tensors"
    if figures["quantized"]:
        text += f", {figures['quantized']} quantised, off by at most {figures['most_steps']:.2f} steps in any block"
    if figures["calibrated"]:
        text += ", calibrated"
    if not figures["passed"]:
        text += f" (worst: {', '.join(figures['unequal'][:3]) or figures['furthest']})"
    return text


def _verdict(figures: dict[str, Any]) -> str:
    return {True: "ok", False: "FAILED", None: "(not judged)"}[figures.get("passed")]
