"""Evaluation of a text: cross-entropy, perplexity and bits per byte, over windows of its tokens.

A window passes `context` tokens through the network and predicts the token after each of them. Windows that lie end to
end thus predict every token but the first, once. These are the windows of the data loaders in Sebastian Raschka's "Build
a Large Language Model (From Scratch)", chapters 2 and 5, whose figures are means over batches. With a stride below the
context, windows overlap, and only tokens that no earlier window has predicted count, as in transformers' guide to
perplexity (https://huggingface.co/docs/transformers/perplexity). There a window of `max_length` tokens predicts those
within it: a context of max_length - 1 here.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpt2onnx.errors import OptionError, PromptError

from ..models import limits
from ..runtime.host.progress import Progress, or_notebook_bar
from ..runtime.model import Model

DropLast = Literal["none", "train", "all"]


@dataclass(frozen=True)
class Window:
    """Tokens that pass through the network together, by their indices in the text.

    Attributes:
        begin: first input.
        end: behind the last input; this token is only predicted.
        new: first input whose successor no earlier window has predicted.
    """

    begin: int
    end: int
    new: int


@dataclass(frozen=True)
class Loss:
    """Loss of a model on a text.

    Attributes:
        predicted: number of predicted tokens, which all figures are about.
        predicted_bytes: their size in UTF-8.
        loss: mean cross-entropy, nats per predicted token.
        batch_loss: mean of the batches' means, as a loop over a data loader gives. It differs from `loss` only if
            batches predict different numbers of tokens.
    """

    tokens: int
    predicted: int
    predicted_bytes: int
    windows: int
    batches: int
    loss: float
    batch_loss: float

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; infinite beyond the largest float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per byte of text, comparable between vocabularies.

        NaN if the tokens stand for no text, as special ones may.
        """
        if self.predicted_bytes < 1:
            return math.nan
        return self.loss * self.predicted / (math.log(2) * self.predicted_bytes)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON holds them; null for those that aren't finite."""
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | {name: value if math.isfinite(value) else None for name, value in derived.items()}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses of a text, with the options of `evaluate` that they were measured with.

    Attributes:
        parts: the loss of each part: "text", or with a split "train" and "validation".
    """

    context: int
    stride: int
    batch_size: int
    split: float | None
    keep_short: bool
    drop_last: DropLast
    parts: dict[str, Loss]

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each part."""
        return [{"part": name, **loss.to_dict()} for name, loss in self.parts.items()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"parts": {name: loss.to_dict() for name, loss in self.parts.items()}}


def evaluate(
    model: Model,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    split: float | None = None,
    keep_short: bool = True,
    drop_last: DropLast = "none",
    progress: Progress | None = None,
) -> Evaluation:
    """Measures the loss of a model on a text.

    Args:
        model: predicts.
        text: to be predicted, except its first token.
        context: tokens of a window; by default the model's positions.
        stride: tokens from the start of one window to that of the next; by default `context`: no overlap.
        batch_size: windows of a batch, for `batch_loss` and `drop_last` only: each window passes through the network
            by itself, so neither memory nor any other figure depends on it.
        split: share of the characters, from the start, that makes the part "train"; the rest is "validation".
            Each part is tokenized by itself.
        keep_short: whether a last window of fewer than `context` tokens counts.
        drop_last: parts without a last batch of fewer than `batch_size` windows: "none", "train" or "all".
        progress: called with the tokens predicted and all to predict after each window; a notebook shows a bar by default.

    Raises:
        OptionError: an option is out of range, or leaves nothing to predict.
        PromptError: a part has fewer than two tokens, or tokens that the model doesn't have.
        BackendError: ONNX Runtime failed.
    """
    positions = model.config.n_positions
    context = positions if context is None else _within("context", context, positions)
    stride = context if stride is None else _within("stride", stride, context)
    limits.check_at_least(1, batch_size=batch_size)
    if split is not None and not 0 < split < 1:
        raise OptionError(f"split must be above 0 and below 1, not {split}")
    if drop_last not in ("none", "train", "all"):
        raise OptionError(f"drop_last must be none, train or all, not {drop_last!r}")
    if drop_last == "train" and split is None:
        raise OptionError("drop_last train goes with a split: without one, drop_last all leaves out the last batch")

    texts = {"text": text}
    if split is not None:
        border = int(split * len(text))
        texts = {"train": text[:border], "validation": text[border:]}
    plans = {
        name: _plan(model, name, part, context, stride, keep_short, batch_size if drop_last in ("all", name) else 1)
        for name, part in texts.items()
    }
    total = sum(plan.predicted for plan in plans.values())
    progress = or_notebook_bar(progress, "Evaluating", "tokens")
    done = 0
    parts: dict[str, Loss] = {}
    for name, plan in plans.items():
        sums = []
        for window in plan.windows:
            seen, new = plan.ids[window.begin : window.new + 1], plan.ids[window.new + 1 : window.end + 1]
            sums.append(-math.fsum(model.score(new, prompt=seen).logprobs))
            if progress is not None:
                progress(done + window.end, total)
        done += plan.predicted
        parts[name] = _loss(plan, sums, batch_size)
    return Evaluation(
        context=context,
        stride=stride,
        batch_size=batch_size,
        split=split,
        keep_short=keep_short,
        drop_last=drop_last,
        parts=parts,
    )


def _within(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise OptionError(f"{name} must be between 1 and {most}, not {value}")
    return value


@dataclass(frozen=True)
class _Plan:
    """The windows of a text.

    Attributes:
        ids: the text's tokens.
        windows: those that count.
        predicted_bytes: size of the predicted tokens in UTF-8.
    """

    ids: list[int]
    windows: list[Window]
    predicted_bytes: int

    @property
    def predicted(self) -> int:
        """Number of predicted tokens: from the second one to that behind the last window."""
        return self.windows[-1].end


def _plan(model: Model, name: str, text: str, context: int, stride: int, keep_short: bool, batch_size: int) -> _Plan:
    """The windows of one part, in whole batches of `batch_size`."""
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise PromptError(f"the {name} part has {len(ids)} tokens: at least two are needed to predict one")
    if max(ids) >= model.config.vocab_size:
        raise PromptError(f"the {name} part has token {max(ids)}: the vocabulary ends at {model.config.vocab_size - 1}")
    windows = _windows(len(ids), context, stride, keep_short=keep_short)
    if not windows:
        raise OptionError(
            f"the {name} part has {len(ids)} tokens, a window of {context} needs {context + 1}:"
            " lower context, or keep the short window"
        )
    windows = windows[: len(windows) - len(windows) % batch_size]
    if not windows:
        raise OptionError(
            f"the {name} part makes no full batch of {batch_size} windows: lower batch_size or context, or keep"
            " the last batch"
        )
    content = text.encode("utf-8", "replace")
    first, *left_out = (model.tokenizer.token_bytes(token) for token in (ids[0], *ids[windows[-1].end + 1 :]))
    # A start token that the tokenizer adds stands for no bytes of the text.
    unseen = [first if content.startswith(first) else b"", *left_out]
    return _Plan(ids, windows, len(content) - sum(map(len, unseen)))


def _windows(length: int, context: int, stride: int, *, keep_short: bool) -> list[Window]:
    """The windows of `length` tokens, up to the one that predicts the last token."""
    windows: list[Window] = []
    end = 0
    for begin in range(0, length - 1, stride):
        new, end = end, min(begin + context, length - 1)
        if keep_short or end - begin == context:
            windows.append(Window(begin, end, new))
        if end == length - 1:
            break
    return windows


def _loss(plan: _Plan, sums: list[float], batch_size: int) -> Loss:
    counts = [window.end - window.new for window in plan.windows]
    starts = range(0, len(sums), batch_size)
    means = [math.fsum(sums[i : i + batch_size]) / sum(counts[i : i + batch_size]) for i in starts]
    return Loss(
        tokens=len(plan.ids),
        predicted=plan.predicted,
        predicted_bytes=plan.predicted_bytes,
        windows=len(plan.windows),
        batches=len(means),
        loss=math.fsum(sums) / plan.predicted,
        batch_loss=math.fsum(means) / len(means),
    )
