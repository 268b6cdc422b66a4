"""gpt2onnx pack"""

from pathlib import Path

import click

from . import console


@click.command("pack")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print size, sha256 and content of the archive as JSON.")
@console.verbosity
def command(bundle: Path, archive: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Pack BUNDLE into ARCHIVE, one .tar.gz.

    The bundle is verified first. The same bundle gives the same bytes, whenever and wherever it is packed.

    \b
    Examples:
      gpt2onnx pack ./tales tales.tar.gz
      gpt2onnx pack ./tales tales.tar.gz --force --json
    """
    from ..exporter.files.archive import pack

    with console.progress_bar(f"Packing {bundle}", quiet=quiet) as progress:
        made = pack(bundle, archive, force=force, progress=progress)
    content = {name: record.size for name, record in made.content.items()}
    if as_json:
        facts = {"archive": str(archive), "bundle": str(bundle), "bytes": made.size, "sha256": made.sha256}
        console.print_json(facts | {"content": content})
    elif not quiet:
        click.echo(
            f"{archive}: {len(content)} files, {sum(content.values()) / 1e6:,.1f} MB"
            f" in {made.size / 1e6:,.1f} MB, sha256 {made.sha256}"
        )
