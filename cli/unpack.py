"""gpt2onnx unpack"""

from pathlib import Path

import click

from ..models import limits
from . import console


@click.command("unpack")
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an existing bundle, if the folder holds no other file.")
@click.option(
    "--max-size",
    type=console.FiniteRange(0),
    default=limits.ARCHIVE_CONTENT / 1e9,
    show_default=True,
    help="Most gigabytes that are unpacked.",
)
@click.option("--json", "as_json", is_flag=True, help="Print facts about the bundle as JSON.")
@console.verbosity
def command(archive: Path, bundle: Path, force: bool, max_size: float, as_json: bool, quiet: bool) -> None:
    """Unpack ARCHIVE, made by 'gpt2onnx pack', to the folder DIR.

    The hash of every file is compared with the manifest before the folder appears. Nothing else is taken
    from the archive: no links, and no paths that leave the folder.

    \b
    Examples:
      gpt2onnx unpack tales.tar.gz ./tales
      gpt2onnx unpack tales.tar.gz ./tales --force --json
    """
    from ..exporter.files.archive import unpack

    with console.progress_bar(f"Unpacking {archive}", quiet=quiet) as progress:
        made = unpack(archive, bundle, force=force, max_size=int(max_size * 1e9), progress=progress)
    manifest = made.manifest
    size = sum(record.size for record in manifest.files.values())
    if as_json:
        facts = {"bundle": str(bundle), "archive": str(archive), "files": len(manifest.files), "bytes": size}
        console.print_json(facts | {"source": manifest.source, "dtype": manifest.dtype})
    elif not quiet:
        click.echo(
            f"{bundle}: {manifest.source} in {manifest.dtype}, {len(manifest.files)} files, {size / 1e6:,.1f} MB"
        )
