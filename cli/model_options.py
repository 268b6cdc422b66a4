"""What commands that use a model share: how it is named, and what it runs on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..runtime.generator import Model

model_option = click.option(
    "-m",
    "--model",
    default="tales",
    show_default=True,
    help="A bundle, or a source that is exported once into the cache.",
)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device and --threads, which arrive as `device` and `threads`."""
    command = click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Threads of one operator (default: the cores of this process, fewer for very small models).",
    )(command)
    return click.option("--device", default="cpu", show_default=True, help="cpu or auto.")(command)


def load(model: str, device: str, threads: int | None) -> "Model":
    """Loads a model; its packages are imported only now, after the options have been read."""
    from gpt2onnx.loading import load

    return load(model, device=device, threads=threads)
