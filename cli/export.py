"""gpt2onnx export"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import console
from . import parity as parity_report
from .inspect import quality_lines


@click.command("export")
@click.argument("source")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    default="fp32",
    show_default=True,
    help="Precision of the weights.",
)
@click.option("--pure", is_flag=True, help="With int4: every matrix in 4 bits; by default some have 8.")
@click.option(
    "--graph",
    type=click.Choice(["fused", "portable"]),
    default="fused",
    show_default=True,
    help="portable: optimum's graph of standard operators, for execution providers without ONNX Runtime's own.",
)
@click.option(
    "--block-size",
    type=int,
    help="With int8 or int4: number of weights that share a scale, in all matrices (16 to 256, a power of two).",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help="With int8 or int4: round the weights so that outputs change least, on texts that the fp32 model writes"
    " (by default up to 200 million weights).",
)
@click.option(
    "--quality/--no-quality",
    default=None,
    help="With int8 or int4: compare with fp32 and put the figures into the manifest"
    " (by default up to 200 million weights).",
)
@click.option(
    "--quality-text",
    "quality_texts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="With int8 or int4: a text to compare on as well (repeatable).",
)
@click.option(
    "--twin/--no-twin",
    default=None,
    help="With fp32 or fp16: add the network in 8 bits, which drafts tokens for the full one to verify"
    " (by default from 20 million weights on).",
)
@click.option(
    "--int8-cache/--no-int8-cache",
    default=None,
    help="Add graphs for a KV cache in 8 bits, see 'generate --cache-dtype'; not with fp16 or --graph portable"
    " (by default up to 200 million weights).",
)
@click.option(
    "--parity/--no-parity",
    default=None,
    help="Compare with PyTorch and put the report into the manifest"
    " (by default up to 200 million weights, if PyTorch is installed).",
)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option(
    "--n-head",
    type=click.IntRange(1),
    help="Attention heads, for weights without a configuration (by default of 64 each).",
)
@click.option("--adapter", metavar="DIR", help="An adapter of peft to merge into SOURCE: LoRA, rsLoRA, DoRA, IA3.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@console.verbosity
def command(source: str, bundle: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Export SOURCE to the folder BUNDLE.

    SOURCE is the embedded model `tales`, a checkpoint folder or file, a Hugging Face id, or an adapter of
    peft, whose configuration names its base. A bundle that fails the comparison with PyTorch is kept; its
    manifest says so, and the exit code is 1.

    \b
    Examples:
      gpt2onnx export tales ./tales
      gpt2onnx export gpt2 ./gpt2-int8 --dtype int8
      gpt2onnx export gpt2 ./tuned --adapter ./my-lora
      gpt2onnx export gpt2 ./gpt2-int4 --dtype int4 --quality-text mine.txt
    """
    # Read when NumPy is imported. Calibration takes half the processor time with one OpenBLAS thread on a busy machine, and
    # its results don't depend on the number of cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ..exporter.export import export

    with console.progress_bar(f"Exporting {source}", quiet=quiet) as progress:
        made = export(source, bundle, progress=progress, **options)
    if as_json:
        console.print_json(asdict(made.manifest), indent=2)
    else:
        size = sum(record.size for record in made.manifest.files.values())
        click.echo(f"{bundle}: {source} in {made.manifest.dtype}, {size / 1e6:,.1f} MB")
        if made.manifest.quality is not None and not quiet:
            click.echo(quality_lines(made.manifest.quality))
        if made.manifest.parity is not None and not quiet:
            click.echo(parity_report.table(made.manifest.parity))
    if made.manifest.parity is not None:
        parity_report.check_passed(made.manifest.parity)
