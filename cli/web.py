"""gpt2onnx web"""

from pathlib import Path

import click

from . import console
from .model_options import exported


@click.command("web")
@click.argument("bundle")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--npm",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="A node_modules with the packages of web/npm/package-lock.json; by default npm fetches them once, into the cache.",
)
@click.option("--force", is_flag=True, help="Replace an earlier web folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the size of each file as JSON.")
@console.verbosity
def command(bundle: str, out: Path, npm: Path | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Write BUNDLE to the folder OUT, which generates in the browser.

    Any server of static files can hand it out; after the first visit it works without a network. A bundle keeps
    its precision. A source that isn't a bundle, such as `tales` or `gpt2`, is exported in int8 first, which
    takes a quarter of fp32's download and is as fast.

    \b
    Examples:
      gpt2onnx web tales ./site
      gpt2onnx web ./gpt2-fp32 ./site --force
      python -m http.server --directory ./site
    """
    from ..models.bundle import Bundle
    from ..web.folder import write

    sizes = write(Bundle.open(exported(bundle, "int8")), out, npm=npm, force=force)
    if as_json:
        console.print_json({"folder": str(out), "files": sizes})
    elif not quiet:
        model = sum(size for name, size in sizes.items() if name.startswith("model/"))
        click.echo(
            f"{out}: {model / 1e6:,.1f} MB of model, {(sum(sizes.values()) - model) / 1e6:,.1f} MB of page and runtime\n"
            f"Try it: python -m http.server --directory {out}"
        )
