"""gpt2onnx verify"""

import json
from pathlib import Path

import click

from . import console


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@console.verbosity
def command(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Check BUNDLE: every file's size and hash, and that its graph loads.

    Exit code 1 when anything is wrong.

    \b
    Example:
      gpt2onnx verify ./tales
    """
    from ..models.bundle import Bundle
    from ..runtime.session import Session

    opened = Bundle.open(bundle)
    opened.verify()
    Session(opened)
    manifest = opened.manifest
    size = sum(record.size for record in manifest.files.values())
    if as_json:
        parity = None if manifest.parity is None else manifest.parity["passed"]
        facts = {"bundle": str(bundle), "files": len(manifest.files), "bytes": size, "parity": parity, "ok": True}
        click.echo(json.dumps(facts))
    elif not quiet:
        click.echo(
            f"{bundle}: {len(manifest.files)} files, {size / 1e6:,.1f} MB, as the manifest says; the graph loads"
        )
        if manifest.parity is not None:
            passed = "passed" if manifest.parity["passed"] else "FAILED"
            click.echo(f"parity with {manifest.parity['reference']}: {passed}")
