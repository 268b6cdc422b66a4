"""Cache folder, whose content can be made again: exports that nobody named a place for, copies of bundles."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from gpt2onnx.errors import OutputError


def folder() -> Path:
    """The one that GPT2ONNX_CACHE names, or else the platform's; it need not be there.

    Raises:
        OutputError: other users could have put bundles there.
    """
    configured = os.environ.get("GPT2ONNX_CACHE")
    path = Path(configured) if configured else user_cache_path("gpt2onnx", appauthor=False)
    with suppress(FileNotFoundError, NotADirectoryError):
        facts = path.stat()
        if sys.platform != "win32" and (facts.st_uid not in (0, os.geteuid()) or facts.st_mode & 0o002):
            raise OutputError(
                f"other users can write to the cache {path}, so a bundle there may be anyone's:"
                " let GPT2ONNX_CACHE name a folder of your own"
            )
    return path


def made() -> Path:
    """The same, made for this user alone if it isn't there.

    Raises:
        OutputError: other users could have put bundles there, or it can't be made.
    """
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make the cache {path}: {error.strerror}") from error
    return path
