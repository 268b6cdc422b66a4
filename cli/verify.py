"""gpt2onnx verify"""

from pathlib import Path

import click

from gpt2onnx.errors import BundleError, OptionError

from . import console


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@console.verbosity
def command(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Check BUNDLE: the hashes of its files, and that graph, configuration and tokenizer fit together.

    Exit code 1 if anything is wrong.

    \b
    Example:
      gpt2onnx verify ./tales
    """
    from ..models.bundle import GENERATION_CONFIG, RAGGED_GRAPH, TOKENIZER, Bundle
    from ..models.config import read_json
    from ..runtime.engine.graphs import runs_ragged
    from ..runtime.engine.runner import Runner
    from ..runtime.options import GenerationConfig
    from ..runtime.text.tokenizer import Tokenizer

    opened = Bundle.open(bundle)
    # The bar stays while the graphs are loaded.
    with console.progress_bar(f"Checking {bundle}", quiet=quiet) as progress:
        opened.verify(progress)
        tokenizer = Tokenizer(bundle / TOKENIZER)
        tokenizer.check(opened.config.vocab_size, thorough=True)
        try:
            GenerationConfig.from_file_content(read_json(bundle / GENERATION_CONFIG))
        except OptionError as error:
            raise BundleError(f"{bundle / GENERATION_CONFIG}: {error}") from error
        Runner(opened)
        if RAGGED_GRAPH in opened.manifest.files:  # the runtime's own graph; the other one is for interchange
            Runner(opened.without(RAGGED_GRAPH))
        if opened.has_twin:
            Runner(opened, twin=True)
        if opened.has_int8_cache and runs_ragged():
            for twin in {False, opened.has_twin}:
                Runner(opened.with_cache("int8"), twin=twin)
    if not tokenizer.reads_any_text:
        click.echo("warning: the tokenizer has no token for unknown words: a text with one is an error", err=True)
    manifest = opened.manifest
    size = sum(record.size for record in manifest.files.values())
    if as_json:
        parity = None if manifest.parity is None else manifest.parity.get("passed")
        facts = {"bundle": str(bundle), "files": len(manifest.files), "bytes": size, "parity": parity, "ok": True}
        console.print_json(facts)
    elif not quiet:
        click.echo(f"{bundle}: {len(manifest.files)} files, {size / 1e6:,.1f} MB, as in the manifest; the graph loads")
        if manifest.parity is not None:
            passed = "passed" if manifest.parity.get("passed") else "FAILED"
            click.echo(f"parity with {manifest.parity.get('reference')}: {passed}")
