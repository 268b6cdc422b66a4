"""`gpt2onnx eval`: losses are those that PyTorch computes over the same windows and batches."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import digest, golden
from support.paths import DOCS
from support.reference import Reference

import gpt2onnx
from gpt2onnx.experiments.evaluation import Loss, evaluate
from gpt2onnx.exporter.tokenizer import known

TOLERANCE = 1e-4
VERDICT = DOCS / "the-verdict.txt"
TEXT = VERDICT.read_text(encoding="utf-8")[:4850]
SHORT_TEXT = TEXT[-1450:]


@dataclass(frozen=True)
class Losses:
    """PyTorch's losses of a text.

    Attributes:
        predicted: how many tokens count.
        batches: how many batches there are.
        loss: mean of the cross-entropy of all tokens that count, in nats.
        batch_loss: mean over the batches of each one's mean.
    """

    predicted: int
    batches: int
    loss: float
    batch_loss: float

    @classmethod
    def of(cls, batches: list[list[float]]) -> Losses:
        losses = np.concatenate(batches)
        return cls(len(losses), len(batches), float(losses.mean()), float(np.mean([np.mean(each) for each in batches])))


@functools.cache
def window_losses(model: Any, ids: tuple[int, ...]) -> list[float]:
    """Cross-entropy in nats of every token but the first, given all tokens before it."""
    import torch

    window = torch.tensor(ids)
    with torch.no_grad():
        logits = model(window[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()


def reference_batches(
    model: Any, ids: list[int], context: int, stride: int, batch_size: int, *, keep_short: bool, drop: bool
) -> list[list[float]]:
    """The losses that count in each batch: those of tokens that no earlier window has predicted."""
    windows: list[list[float]] = []
    predicted: set[int] = set()
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context + 1]
        targets = range(begin + 1, begin + len(window))
        if predicted.issuperset(targets) or (len(window) <= context and not keep_short):
            break
        losses = zip(targets, window_losses(model, tuple(window)), strict=True)
        windows.append([loss for target, loss in losses if target not in predicted])
        predicted.update(targets)
    starts = range(0, len(windows), batch_size)
    batches = [list(itertools.chain.from_iterable(windows[first : first + batch_size])) for first in starts]
    return batches[:-1] if drop and len(windows) % batch_size else batches


def reference_losses(
    reference: Reference, ids: list[int], context: int, stride: int, batch_size: int, *, keep_short: bool, drop: bool
) -> Losses:
    """PyTorch's losses of a text in these windows and batches, from the golden answers."""
    question = [reference.name, digest(ids), context, stride, batch_size, keep_short, drop]
    windows = functools.partial(reference_batches, keep_short=keep_short, drop=drop)
    return Losses(
        **golden.answer(question, lambda: asdict(Losses.of(windows(reference.model, ids, context, stride, batch_size))))
    )


def assert_equal(loss: Loss, expected: Losses, label: object) -> None:
    assert loss.predicted == expected.predicted, label
    assert loss.batches == expected.batches, label
    for name, found, theirs in (
        ("loss", loss.loss, expected.loss),
        ("batch loss", loss.batch_loss, expected.batch_loss),
        ("perplexity", math.log(loss.perplexity), expected.loss),
    ):
        difference = abs(found - theirs)
        assert difference < TOLERANCE, f"{label}: {name} {found} differs from PyTorch's by {difference:.1e}"


@pytest.fixture(scope="module")
def small(
    make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path_factory: pytest.TempPathFactory
) -> tuple[gpt2onnx.Model, Reference]:
    """A small network with a token a byte."""
    folder = make_checkpoint(n_head=2, n_embd=24, scale_attn_by_inverse_layer_idx=True)
    bundle = gpt2onnx.export(folder, tmp_path_factory.mktemp("small") / "bundle").folder
    return gpt2onnx.load(bundle, threads=1), reference_of(folder)


@pytest.mark.parametrize("split", [None, 0.7])
@pytest.mark.parametrize("stride", [24, 15, 8])
@pytest.mark.parametrize("keep_short", [True, False])
def test_every_combination_of_options(
    keep_short: bool, stride: int, split: float | None, small: tuple[gpt2onnx.Model, Reference]
) -> None:
    model, reference = small
    text = TEXT[-230:]
    border = len(text) if split is None else int(split * len(text))
    texts = {"text" if split is None else "train": text[:border], "validation": text[border:]}
    for batch_size, drop_last in itertools.product([1, 2], ["none", "all"] if split is None else ["train", "all"]):
        options: dict[str, Any] = {"split": split, "keep_short": keep_short, "drop_last": drop_last}
        result = evaluate(model, text, context=24, stride=stride, batch_size=batch_size, **options)
        assert list(result.parts) == (["text"] if split is None else ["train", "validation"])
        for name, loss in result.parts.items():
            ids = model.tokenizer.encode(texts[name])
            expected = reference_losses(
                reference, ids, 24, stride, batch_size, keep_short=keep_short, drop=drop_last in ("all", name)
            )
            assert_equal(loss, expected, (name, batch_size, drop_last))


def loader_loss(
    reference: Reference, ids: list[int], length: int, batch_size: int, *, drop_last: bool
) -> tuple[float, int]:
    """Mean over a loader's batches of each one's mean cross-entropy, and their number: by PyTorch's own loader."""

    def torchs() -> tuple[float, int]:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        # Windows of a text, and the same windows one token further on, as a training loop sees them.
        starts = range(0, len(ids) - length, length)
        inputs, targets = (
            torch.tensor([ids[start + ahead : start + ahead + length] for start in starts]) for ahead in (0, 1)
        )
        losses = []
        for batch, wanted in DataLoader(TensorDataset(inputs, targets), batch_size, drop_last=drop_last):
            with torch.no_grad():
                logits = reference.model(batch).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, wanted.flatten()))
        return float(torch.stack(losses).mean()), len(losses)

    loss, batches = golden.answer(["loader", reference.name, digest(ids), length, batch_size, drop_last], torchs)
    return loss, batches


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_book_s_data_loaders(
    batch_size: int, tmp_path: Path, command_line: CommandLine, tales_model: gpt2onnx.Model, tales_reference: Reference
) -> None:
    (tmp_path / "story.txt").write_text(TEXT, encoding="utf-8")
    done = command_line(
        "eval", tmp_path / "story.txt", "-m", tales_model.bundle.folder, "--context", 48, "--stride", 48, "--batch-size", batch_size,
        "--split", 0.9, "--drop-short", "--drop-last", "train", "--json", "--threads", 1,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    parts = json.loads(done.out)["parts"]
    border = int(0.9 * len(TEXT))
    for name, text in (("train", TEXT[:border]), ("validation", TEXT[border:])):
        ids = tales_model.tokenizer.encode(text)
        expected, batches = loader_loss(tales_reference, ids, 48, batch_size, drop_last=name == "train")
        assert parts[name]["batches"] == batches
        assert parts[name]["tokens"] == len(ids)
        assert abs(parts[name]["batch_loss"] - expected) < TOLERANCE, (name, parts[name]["batch_loss"] - expected)


def test_the_book_s_batches_of_the_verdict(
    command_line: CommandLine, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], tmp_path: Path
) -> None:
    """With GPT-2's own tokenizer: the batches that chapter 5 prints, and their losses for some weights of that vocabulary."""
    folder = make_checkpoint(vocab_size=50257, n_positions=256, n_embd=8, n_head=1, n_layer=1)
    tokenizer = known.gpt2()
    tokenizer.save(str(folder / "tokenizer.json"))
    bundle = gpt2onnx.export(folder, tmp_path / "bundle").folder
    done = command_line(
        "eval", VERDICT, "-m", bundle, "--context", 256, "--stride", 256, "--batch-size", 2, "--split", 0.9,
        "--drop-short", "--drop-last", "train", "--json", "--threads", 1,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    parts = json.loads(done.out)["parts"]
    text = VERDICT.read_text(encoding="utf-8")
    assert (len(text), len(tokenizer.encode(text).ids)) == (20479, 5145), "as the book counts them"
    border = int(0.90 * len(text))
    reference = reference_of(folder)
    for name, part, printed in (("train", text[:border], (9, 4608)), ("validation", text[border:], (1, 512))):
        assert (parts[name]["batches"], parts[name]["predicted"]) == printed
        ids = tokenizer.encode(part).ids
        expected, batches = loader_loss(reference, ids, 256, 2, drop_last=name == "train")
        assert batches == printed[0]
        for figure in ("loss", "batch_loss"):
            assert abs(parts[name][figure] - expected) < TOLERANCE, (name, figure, parts[name][figure] - expected)


@pytest.mark.parametrize(("max_length", "stride"), [(64, 32), (33, 9), (512, 100)])
def test_the_guide_to_perplexity_of_transformers(
    max_length: int, stride: int, tales_model: gpt2onnx.Model, tales_reference: Reference
) -> None:
    text = TEXT[:2000]
    tokens = tales_model.tokenizer.encode(text)

    def guide() -> tuple[float, int]:
        import torch

        ids = torch.tensor([tokens])
        total, count, previous_end = 0.0, 0, 0
        for begin in range(0, ids.shape[1], stride):
            end = min(begin + max_length, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : previous_end - begin] = -100
            with torch.no_grad():
                mean = tales_reference.model(ids[:, begin:end], labels=labels).loss
            # The model shifts the labels, so the first one is never predicted.
            counted = int((labels[:, 1:] != -100).sum())
            total, count, previous_end = total + float(mean) * counted, count + counted, end
            if end == ids.shape[1]:
                break
        return total / count, count

    loss, count = golden.answer(["guide", digest(tokens), max_length, stride], guide)
    result = evaluate(tales_model, text, context=max_length - 1, stride=stride).parts["text"]
    assert result.predicted == count == len(tokens) - 1
    assert abs(result.loss - loss) < TOLERANCE, result.loss - loss


def test_whole_windows(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    result = evaluate(tales_model, TEXT, batch_size=2)
    assert (result.context, result.stride) == (512, 512)
    ids = tales_model.tokenizer.encode(TEXT)
    expected = reference_losses(tales_reference, ids, 512, 512, 2, keep_short=True, drop=False)
    assert_equal(result.parts["text"], expected, "whole windows")


def test_texts_of_several_bytes_a_character(small: tuple[gpt2onnx.Model, Reference]) -> None:
    model, reference = small
    text = "Füchse, 狐狸 and 🦊: foxes. " * 8
    ids = model.tokenizer.encode(text)
    assert len(ids) == len(text.encode()), "a token a byte"
    (loss,) = evaluate(model, text, context=60, stride=50, batch_size=3).parts.values()
    expected = reference_losses(reference, ids, 60, 50, 3, keep_short=True, drop=False)
    assert_equal(loss, expected, "bytes")
    assert loss.predicted_bytes == loss.predicted == len(ids) - 1
    assert loss.bits_per_byte == pytest.approx(loss.loss / math.log(2), rel=1e-12), "a token a byte"


def test_bits_per_byte_counts_what_was_predicted(tales_model: gpt2onnx.Model) -> None:
    ids = tales_model.tokenizer.encode(SHORT_TEXT)
    for keep_short in (True, False):
        (loss,) = evaluate(tales_model, SHORT_TEXT, context=64, keep_short=keep_short).parts.values()
        text = tales_model.tokenizer.decode(ids[1 : loss.predicted + 1])
        assert SHORT_TEXT.endswith(text) == keep_short
        assert loss.predicted_bytes == len(text.encode())
        bits = loss.loss * loss.predicted / math.log(2)
        assert loss.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-12)


def test_the_table_shows_what_json_holds(tmp_path: Path, command_line: CommandLine, tales_bundle: Path) -> None:
    (tmp_path / "story.txt").write_text(SHORT_TEXT, encoding="utf-8")
    command = ["eval", tmp_path / "story.txt", "-m", tales_bundle, "--context", 64, "--split", 0.5]
    record = json.loads(command_line(*command, "--json").out)
    assert {name: record[name] for name in ("context", "stride", "batch_size", "split", "keep_short", "drop_last")} == {
        "context": 64, "stride": 64, "batch_size": 1, "split": 0.5, "keep_short": True, "drop_last": "none",
    }  # fmt: skip
    done = command_line(*command)
    assert (done.code, done.err) == (0, "")
    for name, loss in record["parts"].items():
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"{name} ")]
        figures = [float(cell.replace(",", "")) for cell in line.split()[1:]]
        names = ["tokens", "predicted", "windows", "batches", "loss", "batch_loss", "perplexity", "bits_per_byte"]
        assert figures == pytest.approx([loss[each] for each in names], abs=0.005)
    assert command_line("eval", "-", "-m", tales_bundle, "--json", stdin=SHORT_TEXT).code == 0


@pytest.mark.parametrize(
    ("content", "options", "hint"),
    [
        (b"a", [], "the text part has 1 tokens"),
        (b"Once upon a time", ["--split", 0.01], "the train part has 0 tokens"),
        (b"Once upon a time", ["--drop-short"], "needs 513"),
        (b"Once upon a time", ["--batch-size", 2, "--drop-last", "all"], "no full batch of 2"),
        (b"Once upon a time", ["--drop-last", "train"], "split"),
        (b"Once upon a time", ["--context", 513], "512"),
        (b"Once upon a time", ["--context", 8, "--stride", 9], "stride"),
        (b"Once upon a time", ["--batch-size", 0], "batch_size"),
        (b"Once upon a time", ["--split", 1], "split"),
        (b"Once upon a time", ["--split", "nan"], "split"),
        (b"Zo\xeb was here", [], "byte 0xeb is not UTF-8"),
    ],
)
def test_what_cannot_be_evaluated(
    content: bytes, options: list[object], hint: str, tmp_path: Path, command_line: CommandLine, tales_bundle: Path
) -> None:
    (tmp_path / "story.txt").write_bytes(content)
    done = command_line("eval", tmp_path / "story.txt", "-m", tales_bundle, *options)
    assert (done.code, done.out) == (1, ""), done
    assert done.err.count("\n") == 1
    assert hint in done.err


def test_no_file(tmp_path: Path, command_line: CommandLine, tales_bundle: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        done = command_line("eval", path, "-m", tales_bundle)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert str(path) in done.err
