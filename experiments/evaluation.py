"""The loss of a text: cross-entropy, perplexity and bits per byte, over windows of its tokens.

A window runs `context` tokens through the network and predicts the token after each of them, so windows that
lie end to end predict every token but the first, once. Those are the windows of the loaders in Sebastian Raschka's
"Build a Large Language Model (From Scratch)", chapters 2 and 5, whose figures are means over batches.
With a stride below the context windows overlap, and only tokens that no earlier window has predicted count, as in
transformers' guide to perplexity (https://huggingface.co/docs/transformers/perplexity). There a window of
`max_length` tokens predicts those within it, which is a context of max_length - 1 here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gpt2onnx.errors import OptionError, PromptError

from ..runtime.decoding.processors import Tokens
from ..runtime.decoding.sampling import log_softmax
from ..runtime.model import Model

DropLast = Literal["none", "train", "all"]
# Called with the tokens predicted so far and in all.
Progress = Callable[[int, int], None]

_ROW = slice(0, 1)
# Positions whose logits are in memory together: of a vocabulary of 50,257 they take 26 MB.
_AT_ONCE = 128


@dataclass(frozen=True)
class Window:
    """Tokens that pass through the network together.

    Attributes:
        begin: index of the first.
        end: index behind the last; that token is predicted, but no input.
        new: index of the first one whose successor no earlier window has predicted.
    """

    begin: int
    end: int
    new: int


@dataclass(frozen=True)
class Loss:
    """How well a model predicts a text.

    Attributes:
        tokens: of the text.
        predicted: tokens that the figures are about.
        predicted_bytes: bytes of UTF-8 that those stand for.
        windows: that they were predicted in.
        batches: that the windows make.
        loss: mean cross-entropy, nats per predicted token.
        batch_loss: mean over batches of each one's mean, which a loop over a data loader gives. It differs from
            `loss` only where batches predict unequally many tokens.
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
        """e to the power of the loss; infinite where that is too large for a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The cross-entropy in bits for each byte of text, which models of different vocabularies share.

        Not a number where the tokens stand for no text, as some special ones do.
        """
        if self.predicted_bytes < 1:
            return math.nan
        return self.loss * self.predicted / (math.log(2) * self.predicted_bytes)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON holds them; what is no finite number is null."""
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return asdict(self) | {name: value if math.isfinite(value) else None for name, value in derived.items()}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The losses of a text, and how they were measured; the options are those of `evaluate`.

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
    """Measures how well a model predicts a text.

    Args:
        model: predicts.
        text: what is predicted; its first token is not.
        context: tokens of a window; by default as many as the model has positions.
        stride: tokens from the start of one window to that of the next; by default `context`, so that none overlap.
        batch_size: windows of a batch. It sets what `batch_loss` and `drop_last` are about; each window passes
            through the network by itself in any case, so neither memory nor any other figure depends on it.
        split: share of the characters, from the start, that makes the part "train"; the rest is "validation".
            Each part is tokenized by itself.
        keep_short: whether a last window of fewer than `context` tokens counts.
        drop_last: which parts leave out a last batch of fewer than `batch_size` windows: "none", "train" or "all".
        progress: called after each window.

    Raises:
        OptionError: an option is out of range, or leaves nothing to predict.
        PromptError: a part has fewer than two tokens, or tokens that the model doesn't have.
        BackendError: ONNX Runtime failed.
    """
    positions = model.config.n_positions
    context = positions if context is None else _whole("context", context, most=positions)
    stride = context if stride is None else _whole("stride", stride, most=context)
    _whole("batch_size", batch_size)
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
    done = 0
    parts: dict[str, Loss] = {}
    for name, plan in plans.items():
        sums = []
        for window, loss in zip(plan.windows, _window_losses(model, plan, context), strict=True):
            sums.append(loss)
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


def _whole(name: str, value: int, most: int | None = None) -> int:
    if value < 1 or (most is not None and value > most):
        limit = "at least 1" if most is None else f"between 1 and {most}"
        raise OptionError(f"{name} must be {limit}, not {value}")
    return value


@dataclass(frozen=True)
class _Plan:
    """What of a text is to be predicted.

    Attributes:
        ids: the text's tokens.
        windows: those that count.
        predicted_bytes: what they predict, in bytes of UTF-8.
    """

    ids: Tokens
    windows: list[Window]
    predicted_bytes: int

    @property
    def predicted(self) -> int:
        """Tokens that are predicted: from the second one to that behind the last window."""
        return self.windows[-1].end


def _plan(model: Model, name: str, text: str, context: int, stride: int, keep_short: bool, batch_size: int) -> _Plan:
    """The windows of one part, in whole batches of so many."""
    ids = np.array(model.tokenizer.encode(text), np.int64)
    if len(ids) < 2:
        raise PromptError(f"the {name} part has {len(ids)} tokens: at least two are needed to predict one")
    if ids.max() >= model.config.vocab_size:
        raise PromptError(
            f"the {name} part has token {ids.max()}: the vocabulary ends at {model.config.vocab_size - 1}"
        )
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
    first, *left_out = (model.tokenizer.token_bytes(int(token)) for token in (ids[0], *ids[windows[-1].end + 1 :]))
    # A token that the tokenizer puts before every text is none of its bytes.
    unseen = [first if content.startswith(first) else b"", *left_out]
    return _Plan(ids, windows, len(content) - sum(map(len, unseen)))


def _windows(length: int, context: int, stride: int, *, keep_short: bool) -> list[Window]:
    """The windows of so many tokens, up to the one that predicts the last token."""
    windows: list[Window] = []
    end = 0
    for begin in range(0, length - 1, stride):
        new, end = end, min(begin + context, length - 1)
        if keep_short or end - begin == context:
            windows.append(Window(begin, end, new))
        if end == length - 1:
            break
    return windows


def _window_losses(model: Model, plan: _Plan, context: int) -> Iterator[float]:
    """The summed cross-entropy of each window's new tokens, in nats."""
    session, ids = model.session, plan.ids
    cache = session.new_cache(1, min(context, len(ids)))
    for window in plan.windows:
        cache.trim(0, 0)
        for first in range(window.begin, window.new, _AT_ONCE):
            session.forward(cache, _ROW, ids[None, first : min(first + _AT_ONCE, window.new)])
        loss = 0.0
        for first in range(window.new, window.end, _AT_ONCE):
            last = min(first + _AT_ONCE, window.end)
            logits = session.forward(cache, _ROW, ids[None, first:last], keep=last - first)[0]  # [position, vocabulary]
            following = log_softmax(logits)[np.arange(last - first), ids[first + 1 : last + 1]]
            loss -= float(following.sum(dtype=np.float64))
        yield loss


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
