"""Texts of commands: an argument, a file or standard input, in any encoding."""

import codecs
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..runtime.text.text_input import UTF_8, decode, read, undecoded

_STANDARD_INPUT = Path("-")
_ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|([nrt'\"\\]))")
_LETTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class PromptCommand(click.Command):
    """A command whose prompt may begin with "- ", as an item of a list does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [one for one in self.params if isinstance(one, click.Option) and not one.is_flag]
        with_value = {name for option in options for name in option.opts}
        for index, argument in enumerate(args):
            if argument == "--":
                break
            if argument.startswith("- ") and (index == 0 or args[index - 1] not in with_value):
                args = [*args[:index], *args[index + 1 :], "--", argument]
                break
        try:
            return super().parse_args(ctx, list(args))  # click empties the list
        except click.NoSuchOption as error:
            if not any(argument.startswith("-") and " " in argument for argument in args):
                raise
            hint = "put a prompt that begins with a dash behind '--'"
            raise click.UsageError(f"{error.format_message().rstrip('.')}: {hint}", ctx) from error


def encoding_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --encoding, which arrives as `encoding`."""

    def check(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError) as error:
            raise click.BadParameter(f"{value!r} is no encoding such as latin-1 or utf-16") from error
        return codecs.lookup(value).name

    return click.option(
        "--encoding",
        default=UTF_8,
        show_default=True,
        metavar="NAME",
        callback=check,
        help="Encoding of files and standard input, unless a byte order mark names another.",
    )(command)


def argument(text: str, encoding: str) -> str:
    """A text from the command line.

    Raises:
        PromptError: its bytes are of another encoding.
    """
    return text if undecoded(text) is None else decode(os.fsencode(text), "the command line", encoding)


def standard_input(hint: str, encoding: str) -> str:
    """The text on standard input, without the newline that ends its last line: that belongs to the file.

    Raises:
        click.UsageError: with the hint, where standard input is a terminal.
        PromptError: it is of another encoding.
    """
    if sys.stdin.isatty():
        raise click.UsageError(hint)
    return file_text(_STANDARD_INPUT, encoding).removesuffix("\n")


def file_text(path: Path, encoding: str) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        PromptError: it can't be read, is too large, or is of another encoding.
    """
    if path == _STANDARD_INPUT:
        return read(sys.stdin.buffer, "standard input", encoding)
    return read(path, str(path), encoding)


def unescape(text: str) -> str:
    r"""Replaces the escapes \n \r \t \' \" \\ and \xHH, a byte; others stay as they are, as with -e of llama.cpp.

    Raises:
        click.UsageError: the bytes are no UTF-8.
    """
    content = _ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else _LETTERS.get(found[2], found[2]),
        text.encode("utf-8", "surrogatepass"),
    )
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the escapes of {text!r} make no UTF-8: \\xHH is a byte, so é is \\xc3\\xa9") from error
