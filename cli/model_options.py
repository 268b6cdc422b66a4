"""Options of commands that use a model: its name, its device, its cache and its drafts."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import console

if TYPE_CHECKING:
    from ..runtime.model import Model

model_option = click.option(
    "-m",
    "--model",
    default="tales",
    show_default=True,
    help="A bundle, or a source that is exported once into the cache.",
)


_VERIFY = "gpt2onnx.verify"
_LOADING = "gpt2onnx.loading"


def _remember(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta.setdefault(_LOADING, {})[parameter.name] = value


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device and --threads, which arrive as `device` and `threads`, and --verify, which `load` heeds."""

    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        ctx.meta[_VERIFY] = value

    command = click.option(
        "--verify",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Compare every byte of the bundle with its manifest before it is loaded.",
    )(command)
    command = click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Threads of one operator (default: the cores this process may use, fewer for very small models).",
    )(command)
    return click.option(
        "--device",
        default="cpu",
        show_default=True,
        help="cpu, cuda, another execution provider, or auto: cuda where it works, else cpu; see 'gpt2onnx devices'.",
    )(command)


cache_option = click.option(
    "--cache-dtype",
    type=click.Choice(["fp32", "int8"]),
    expose_value=False,
    callback=_remember,
    help="Precision of the KV cache on the CPU (default: fp32). int8 takes a quarter of the memory, and with AVX-512"
    " steps of long texts and large batches are faster; the text can change.",
)


def draft_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --draft and --draft-model, which `load` heeds."""
    command = click.option(
        "--draft-model",
        metavar="MODEL",
        expose_value=False,
        callback=_remember,
        help="A smaller model of the same vocabulary, which drafts tokens in place of the twin; see --draft.",
    )(command)
    return click.option(
        "--draft",
        type=click.Choice(["auto", "none", "lookup", "twin"]),
        expose_value=False,
        callback=_remember,
        help="Source of drafts, next tokens that one forward pass verifies together: the text so far (lookup), the bundle's network"
        " in 8 bits (twin), or the twin where there is one and it pays (auto, the default). In fp32 the text stays the same but for"
        " ties to the sixth digit. In fp16, int8 and int4, and with a cache in int8, several tokens in a pass round differently from"
        " one, which may decide a near tie.",
    )(command)


def loading_options() -> dict[str, Any]:
    """The given options for cache and drafts, as arguments of `gpt2onnx.load`."""
    return dict(click.get_current_context().meta.get(_LOADING, {}))


def load(model: str, device: str, threads: int | None, **others: Any) -> "Model":
    """Loads a model as `gpt2onnx.load` does; its packages are imported only now, after the options have been read."""
    from gpt2onnx.loading import load

    return load(bundle_folder(model), device=device, threads=threads, **loading_options(), **others)


def exported(model: str, dtype: str = "fp32") -> Path:
    """The folder of a model's bundle; if it has to be exported first, with a progress bar."""
    from gpt2onnx.loading import resolve

    quiet = bool(click.get_current_context().params.get("quiet"))
    int8_cache = loading_options().get("cache_dtype") == "int8"
    with console.progress_bar(f"Exporting {model}", quiet=quiet, late=True) as progress:
        return resolve(model, dtype, progress, int8_cache=int8_cache)


def bundle_folder(model: str) -> Path:
    """The folder of a model's bundle, after the check that --verify asks for."""
    from ..models.bundle import Bundle

    folder = exported(model)
    context = click.get_current_context()
    if context.meta.get(_VERIFY):
        with console.progress_bar(f"Checking {folder}", quiet=bool(context.params.get("quiet"))) as progress:
            Bundle.open(folder).verify(progress)
    return folder
