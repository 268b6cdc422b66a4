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
is a bug of gpt2onnx and keeps its traceback. This module imports nothing, so every layer may use it.
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
        super().__init__(f"{purpose} needs the package {package}: pip install 'gpt2onnx[{extra}]'")


class BackendError(Gpt2OnnxError):
    """ONNX Runtime refused to load the graph, offers no such device, or failed in a run."""
