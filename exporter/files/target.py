"""The folder that a bundle is written to: what may be replaced there."""

import os
from pathlib import Path

from gpt2onnx.errors import BundleError, OutputError

from ...models import bundle
from ...models.bundle import Manifest, is_bundle
from ...models.files import files_in

# Of a bundle whose manifest can't be read.
_USUAL_FILES = frozenset(
    {bundle.CONFIG, bundle.GENERATION_CONFIG, bundle.GENAI_CONFIG, bundle.TOKENIZER, bundle.TOKENIZER_CONFIG}
    | {bundle.CHAT_TEMPLATE, bundle.SPECIAL_TOKENS, bundle.ADDED_TOKENS, bundle.GRAPH, bundle.WEIGHTS}
    | {bundle.RAGGED_GRAPH, bundle.SECOND_GRAPH, bundle.SECOND_GRAPH_WEIGHTS, bundle.TWIN_GRAPH, bundle.TWIN_WEIGHTS}
    | {*bundle.INT8_CACHE_GRAPHS.values()}
)


def check_target(folder: Path, *, force: bool) -> None:
    """Checks that a bundle may be written to a folder.

    Nothing may be there, or an empty folder. With `force`, a bundle may be there, but no file besides its own: such a
    file would be lost, be it the user's notes or the very checkpoint that is exported.

    Raises:
        OutputError: something else is there.
    """
    if not os.path.lexists(folder):  # pathlib raises for a name that is too long
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder: choose another target")
    if not is_bundle(folder):
        if any(folder.iterdir()):
            raise OutputError(f"{folder} exists and is not a bundle: choose another target")
        return
    if not force:
        raise OutputError(f"{folder} already holds a bundle: choose another target, or replace it with --force")
    try:
        own = {bundle.MANIFEST, *Manifest.read(folder).files}
    except BundleError:
        own = {bundle.MANIFEST, *_USUAL_FILES}
    try:
        others = sorted({path.relative_to(folder).as_posix() for path in files_in(folder)} - own)
    except OSError as error:
        raise OutputError(f"can't read {error.filename}: {error.strerror}") from error
    if others:
        raise OutputError(
            f"{folder} also holds {others[0]}, which is no part of the bundle: move it elsewhere, or choose another target"
        )
