"""gpt2onnx tokens"""

import click

from ..models.tables import table
from . import console, prompt_options
from .model_options import exported, model_option


@click.command("tokens", cls=prompt_options.PromptCommand)
@click.argument("text", required=False)
@prompt_options.encoding_option
@model_option
@click.option("--json", "as_json", is_flag=True, help="Print the tokens as JSON.")
@console.verbosity
def command(text: str | None, encoding: str, model: str, as_json: bool, quiet: bool) -> None:
    """Show the tokens of TEXT, or of standard input without TEXT: ids and pieces.

    A piece that isn't whole characters is shown as its bytes: b'\\xf0\\x9f'. "start" and "end" are the token's
    characters in the text, "entry" its spelling in the vocabulary.

    \b
    Examples:
      gpt2onnx tokens "Once upon a time"
      echo "Once upon a time" | gpt2onnx tokens --json
    """
    from ..models.bundle import TOKENIZER
    from ..runtime.text.tokenizer import Tokenizer

    if text is None:
        text = prompt_options.standard_input("give a text, or one on standard input", encoding)
    else:
        text = prompt_options.argument(text, encoding)
    tokenizer = Tokenizer(exported(model) / TOKENIZER)
    ids, spans = tokenizer.encode_with_spans(text)
    if as_json:
        tokens = [
            {
                "id": token,
                "entry": tokenizer.convert_ids_to_tokens(token),
                "piece": piece if isinstance(piece := tokenizer.piece(token), str) else None,
                "bytes": tokenizer.token_bytes(token).hex(),
                "start": start,
                "end": end,
            }
            for token, (start, end) in zip(ids, spans, strict=True)
        ]
        console.print_json({"text": text, "ids": ids, "tokens": tokens})
        return
    rows = [
        [repr(tokenizer.piece(token)), tokenizer.convert_ids_to_tokens(token) or "", str(token), str(start), str(end)]
        for token, (start, end) in zip(ids, spans, strict=True)
    ]
    click.echo(table(["piece", "entry", "id", "start", "end"], rows, left=2))
    if not quiet:
        size = len(text.encode("utf-8", "replace"))
        each = f", {size / len(rows):.2f} bytes a token" if rows else ""
        click.echo(f"{len(rows)} tokens, {len(text)} characters, {size} bytes{each}")
