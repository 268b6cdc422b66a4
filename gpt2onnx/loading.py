"""From what a user names to a model that generates: the place where exporter and runtime meet."""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

from gpt2onnx.errors import BundleError, OutputError

from .models import bundle, tales  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from .runtime.generator import Model  # pyright: ignore[reportMissingImports]


def load(model: str | os.PathLike[str] = "tales", *, device: str = "cpu", threads: int | None = None) -> "Model":
    """Loads a model.

    Args:
        model: a bundle folder; or any source that `export` takes, which is then exported once, in fp32,
            into the user's cache (the folder that GPT2ONNX_CACHE names, or else the platform's).
        device: "cpu" or "auto".
        threads: of one operator; by default as many as this process may use, fewer for very small models.

    Raises:
        BundleError, CheckpointError: the model can't be found or used.
        MissingExtraError: it has to be exported first, and the extra `export` isn't installed.
        OptionError: an argument is out of range.
        BackendError: ONNX Runtime can't load the graph.
    """
    from .runtime.generator import Model  # pyright: ignore[reportMissingImports]

    return Model(resolve(model), device=device, threads=threads)


def resolve(model: str | os.PathLike[str]) -> Path:
    """The bundle folder of a model: its own, or that of its export in the user's cache."""
    folder = Path(model)
    if bundle.is_bundle(folder):
        return folder
    source = os.fspath(model)
    target = cache_folder() / _cache_name(source)
    try:
        bundle.Bundle.open(target)
    except BundleError:
        # Only now: the exporter's imports are needless, and may be missing, where the export is there.
        from .exporter.export import export  # pyright: ignore[reportMissingImports]

        try:
            export(source, target, force=True)
        except OutputError:
            if not bundle.is_bundle(target):  # otherwise another process has just made the same
                raise
    return target


def cache_folder() -> Path:
    """Where exports are kept that nobody named a place for."""
    configured = os.environ.get("GPT2ONNX_CACHE")
    return Path(configured) if configured else user_cache_path("gpt2onnx", appauthor=False)


def _cache_name(source: str) -> str:
    """A folder name for a source and, where that lies on this machine, for the state it is in."""
    place = os.fspath(tales.FOLDER) if source == "tales" else os.path.abspath(source)  # noqa: PTH100
    state = [f"format {bundle.FORMAT_VERSION}", source]
    # os.path where pathlib would raise for a name that is too long.
    if os.path.exists(place):  # noqa: PTH110
        # One checkpoint file is read together with what lies beside it.
        folder = Path(place) if os.path.isdir(place) else Path(place).parent  # noqa: PTH112
        state.append(place)
        for path in sorted(folder.iterdir()):
            facts = path.stat()
            state.append(f"{path.name} {facts.st_size} {facts.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(state).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source)[-40:].strip('-.') or 'model'}-{digest[:12]}"
