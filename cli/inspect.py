"""gpt2onnx inspect"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..models.tables import aligned, table
from . import console
from . import parity as parity_report

_UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)  # what figures of another form raise

if TYPE_CHECKING:
    from ..models.bundle import Bundle, Manifest
    from ..models.config import GPT2Config
    from ..models.inspection import Layer


@click.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@console.verbosity
def command(model: str, as_json: bool, quiet: bool) -> None:
    """Show layers, parameters and memory of MODEL, and the bundle's files and reports.

    MODEL is a bundle, or any source. Nothing is exported: a source that hasn't been exported has no bundle to show.

    \b
    Examples:
      gpt2onnx inspect tales
      gpt2onnx inspect ./gpt2-int8 --json
    """
    from gpt2onnx.loading import look_up

    from ..models.bundle import Bundle
    from ..models.inspection import layers, summary
    from ..models.precision import DTYPES, memory

    found = look_up(model)
    bundle = found if isinstance(found, Bundle) else None
    config = found.config if isinstance(found, Bundle) else found
    network = layers(config)
    memories = {dtype: memory(config, dtype) for dtype in DTYPES}
    if as_json:
        record = {
            "model": model,
            "config": asdict(config) | {"n_inner": config.inner_size},
            "parameters": network.parameters,
            "components": {layer.name: layer.parameters for layer in network.layers},
            "tied": config.tie_word_embeddings,
            "layers": network.to_dict()["layers"],
            "memory": {dtype: asdict(each) for dtype, each in memories.items()},
            "bundle": None if bundle is None else {"folder": str(bundle.folder), **asdict(bundle.manifest)},
        }
        console.print_json(record)
        return
    positions = config.n_positions
    rows = [
        [dtype, _bytes(each.weights), _bytes(each.cache_per_token), _bytes(each.cache_full)]
        for dtype, each in memories.items()
    ]
    blocks = [] if quiet else [f"{model}: {summary(config)}"]
    blocks += [
        _tree(network, config),
        table(["memory", "weights", "KV cache a token", f"KV cache of {positions:,}"], rows),
    ]
    blocks += [] if bundle is None else _bundle(bundle)
    click.echo("\n\n".join(blocks))


def _tree(network: "Layer", config: "GPT2Config") -> str:
    tied = "\nThe head is tied: it multiplies by wte.weight, which is stored and counted once."
    return repr(network) + tied * config.tie_word_embeddings


def _bundle(bundle: "Bundle") -> list[str]:
    """The bundle's own facts: origin, files, reports."""
    manifest = bundle.manifest
    blocks = "" if manifest.block_size is None else f", blocks of {manifest.block_size}"
    facts = [
        ["bundle", str(bundle.folder)],
        ["source", f"{manifest.source}, sha256 {manifest.source_sha256}"],
        ["precision", f"{manifest.dtype}{blocks}"],
        ["graph", manifest.graph],
        ["written by", f"gpt2onnx {manifest.gpt2onnx}, bundle format {manifest.format_version}"],
    ]
    files = [[name, f"{record.size:,}"] for name, record in sorted(manifest.files.items())]
    files.append(["total", f"{sum(record.size for record in manifest.files.values()):,}"])
    return [aligned(facts), table(["file", "bytes"], files), _reports(manifest)]


def _reports(manifest: "Manifest") -> str:
    parity, quality = manifest.parity, manifest.quality
    lines = ["parity: not checked" if parity is None else _parity(parity)]
    if quality is not None:
        lines.append(quality_lines(quality))
    elif manifest.dtype in ("int8", "int4"):
        lines.append("quality: not measured")
    return "\n".join(lines)


def _parity(parity: dict[str, Any]) -> str:
    try:
        return f"parity {parity_report.table(parity)}"
    except _UNREADABLE:  # a report of another version has other figures
        return f"parity with {parity.get('reference', 'what the report does not name')}: {'passed' if parity.get('passed') else 'FAILED'}"


def quality_lines(quality: dict[str, Any]) -> str:
    """A manifest's loss against fp32, for a person: a line for each text."""
    try:
        return "\n".join(
            f"quality against fp32, over {each['tokens']:,} tokens of {each['text']}: KL {each['kl']:.2e} nats,"
            f" perplexity {each['perplexity']:.4f} (fp32 {each['reference_perplexity']:.4f})"
            for each in (quality, *quality.get("texts", ()))
        )
    except _UNREADABLE:
        return "quality: in a report that this version can't read"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} B"
