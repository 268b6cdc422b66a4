"""The errors a user can meet, in one tree.

    Gpt2OnnxError
    ├── CheckpointError     the checkpoint can't be found, read, or isn't a GPT-2 that can be exported
    ├── BundleError         the bundle is missing, incomplete, or contradicts its manifest
    ├── PromptError         the prompt is empty, too long, or not in the vocabulary
    ├── OptionError         an option is out of range, or options contradict each other
    ├── OutputError         the target can't be written
    ├── MissingExtraError   a package of an optional extra isn't installed
    └── BackendError        ONNX Runtime refused or failed

Every message is one line that says what is wrong and how to mend it. Anything else that is raised
is a bug of gpt2onnx and keeps its traceback. This module imports nothing of the package, so every layer may use it.
"""

_LONGEST = 2000  # letters


class Gpt2OnnxError(Exception):
    """Root of all errors that a user can meet; the command line catches only this."""

    def __init__(self, message: object = "") -> None:
        # Some messages quote another library's, of any length and many lines.
        line = " ".join(part.strip() for part in str(message).splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


class CheckpointError(Gpt2OnnxError):
    """The checkpoint can't be found, read, or isn't a GPT-2 that can be exported."""


class BundleError(Gpt2OnnxError):
    """The bundle is missing, incomplete, or contradicts its manifest."""


class PromptError(Gpt2OnnxError):
    """The prompt is empty, too long for the context window, or not in the vocabulary.

    Attributes:
        too_long: whether it is the length.
    """

    def __init__(self, message: object = "", *, too_long: bool = False) -> None:
        super().__init__(message)
        self.too_long = too_long


class OptionError(Gpt2OnnxError):
    """An option is out of range, or options contradict each other.

    Attributes:
        option: name of the generation option at fault, if it is one.
    """

    def __init__(self, message: object = "", option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class OutputError(Gpt2OnnxError):
    """The target can't be written."""


class MissingExtraError(Gpt2OnnxError):
    """A package of an optional extra isn't installed."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: {install_command(extra)}")


class BackendError(Gpt2OnnxError):
    """ONNX Runtime refused to load the graph, offers no such device, or failed in a run."""


def install_command(extra: str) -> str:
    """The command that adds an extra, from where the package itself was installed: a clone, a wheel, or the index."""
    import json
    from importlib.metadata import distributions
    from pathlib import Path
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    # PEP 610: pip and uv write where a package came from, unless that was an index. The .egg-info in a clone has no such file.
    written = (each.read_text("direct_url.json") for each in distributions(name="gpt2onnx"))
    origin = json.loads(next(filter(None, written), "{}"))
    url = urlsplit(origin.get("url", ""))
    place = url2pathname(url.path)
    if url.scheme != "file" or not Path(place).exists():
        return f"pip install 'gpt2onnx[{extra}]'"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {editable}'{place}[{extra}]'"
