"""The group of commands: finds them, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 an error of gpt2onnx's error tree, 2 wrong usage, 130 interrupted.
"""

import atexit
import gc
import importlib
import io
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from gpt2onnx.errors import Gpt2OnnxError

# Each command's module is imported only when it runs, so that none waits for another's imports.
COMMANDS = {
    "export": "Export a GPT-2 checkpoint to an ONNX bundle.",
    "generate": "Continue a prompt, or a file of prompts.",
    "parity": "Compare a bundle with PyTorch.",
    "verify": "Check a bundle's files and graph.",
    "inspect": "Show a model's layers, parameters, memory and reports.",
    "tokens": "Show the tokens of a text.",
    "next": "Show how the next token is drawn.",
    "eval": "Measure the loss and perplexity of a text.",
    "sweep": "Compare decoding strategies.",
    "bench": "Measure a model's speed and memory.",
    "serve": "Serve a model over HTTP.",
    "web": "Write a model as a folder that a browser runs.",
    "devices": "Tell what models can run on here.",
    "pack": "Pack a bundle into one file.",
    "unpack": "Unpack a bundle that was packed.",
}

_LONGEST_MESSAGE = 1000  # letters


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            from difflib import get_close_matches  # only now: it takes milliseconds

            if close := get_close_matches(cmd_name, COMMANDS, 1):
                ctx.fail(f"there is no command {cmd_name!r}: did you mean {close[0]!r}?")
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpt2onnx")
def commands() -> None:
    """GPT-2 on any machine, without PyTorch.

    \b
    Example:
      gpt2onnx generate "Once upon a time"
    """


def program() -> None:
    """The installed program: `main`, whose memory is left to the kernel. Python would free a model in 0.15 s at the end."""
    code = 1

    def leave() -> None:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        main()
    except SystemExit as ending:
        code = int(ending.code or 0)
        raise


def main() -> None:
    """Runs the command line and exits."""
    # Most of what a start imports stays: looking through it again and again takes a twelfth of the time to the first token.
    gc.set_threshold(100_000)
    # A polite kill lets a command remove what is unfinished, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _prepare_streams()
        result = commands.main(prog_name="gpt2onnx", standalone_mode=False)
        sys.stdout.flush()
        # --help and the like return an exit code, too.
        sys.exit(result if isinstance(result, int) else 0)
    except click.UsageError as error:
        if error.ctx is not None and not sys.argv[1:]:  # click's complaint is the whole help
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(2)
        help_hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        _fail(f"{' '.join(error.format_message().split())}{help_hint}", 2, "UsageError")
    except click.ClickException as error:  # of a check that has failed; its report has been printed
        _fail(error.format_message(), error.exit_code, None)
    except Gpt2OnnxError as error:
        _fail(str(error), 1, type(error).__name__)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130, "Interrupted")
    except ImportError as error:
        cause = _root(error)
        if isinstance(cause, KeyboardInterrupt):
            _fail("interrupted", 130, "Interrupted")
        _fail(f"a package can't be loaded, though it is installed; is there enough memory? {cause}", 1, "BackendError")
    except BrokenPipeError:
        # Whoever read the output has left.
        _drop_output()
        sys.exit(1)
    except MemoryError as error:
        _fail(f"there is not enough memory: {error}".removesuffix(": "), 1, "MemoryError")
    except OSError as error:
        _drop_output()
        if not _working_folder_exists():
            _fail("the folder that this was started in has been deleted: change to another", 1, "OutputError")
        place = "standard output" if error.filename is None else error.filename
        _fail(f"can't read or write {place}: {error.strerror or error}", 1, "OutputError")


def _root(error: BaseException) -> BaseException:
    """The error that all others came from."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _working_folder_exists() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _prepare_streams() -> None:
    """Standard streams that are always there, and can write any text."""
    for name in ("stdin", "stdout", "stderr"):
        # A program may be started without them; the next file to be opened would take their place.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Half of a surrogate pair in a name or text, or a letter that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Discards unwritten output: Python would complain once more when it closes standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int, kind: str | None) -> None:
    """Prints the message in one line, with --json also as JSON on standard output, and exits.

    It has no control characters: names from a file mustn't steer the terminal.
    """
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    line = line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…"
    click.echo(f"gpt2onnx: {line}", err=True)
    if kind is not None and "--json" in sys.argv:
        click.echo(json.dumps({"error": {"message": line, "kind": kind}}))
    sys.exit(code)
