"""`gpt2onnx bench`: counts and output. No test asks how fast anything is."""

import json
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine, wait_until

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.experiments import machine
from gpt2onnx.experiments.benchmark import Percentiles, Spread, benchmark, time_run, weights_read
from gpt2onnx.runtime.model import Model
from gpt2onnx.runtime.requests import Request

# Seconds that a fake model takes for a prompt, and for a step of the batch.
PREFILL, STEP = 100.0, 1.0


class FakeModel:
    """Computes nothing: reads prompts one by one, then advances all in each step, and tells the time by that.

    Args:
        drafted: tokens that each step adds beyond one.
    """

    def __init__(self, drafted: int) -> None:
        self.now, self._drafted = 0.0, drafted

    def reset(self) -> None:
        """There is no cache."""

    def follow(self, requests: list[Request], batch_size: int) -> Iterator[tuple[Request, object]]:
        tokens, most = 1, requests[0].options.max_new_tokens
        for request in requests:
            self.now += PREFILL
            yield request, self._outcome(request, 1)
        while tokens < most:
            self.now += STEP
            tokens = min(most, tokens + 1 + self._drafted)
            for request in requests:
                yield request, self._outcome(request, tokens)

    def _outcome(self, request: Request, tokens: int) -> object:
        text = SimpleNamespace(tokens=[*request.prompt, *range(tokens)])
        return SimpleNamespace(strategy=SimpleNamespace(prompt=request.prompt), continuations=lambda: [text])


@given(batch=st.integers(1, 5), new=st.integers(1, 20), drafted=st.integers(0, 7))
def test_every_token_is_counted_once_in_its_phase(batch: int, new: int, drafted: int) -> None:
    model = FakeModel(drafted)
    run = time_run(model, [[1, 2]] * batch, new, clock=lambda: model.now)
    assert run.prefill_seconds == batch * PREFILL
    assert run.first_token_seconds == [PREFILL * (row + 1) for row in range(batch)]
    assert run.decode_seconds == STEP * -(-(new - 1) // (1 + drafted))
    assert len(run.token_seconds) == batch * (new - 1)
    assert sum(run.token_seconds) == pytest.approx(batch * run.decode_seconds)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_ordered_and_measured_values(values: list[float]) -> None:
    found = Percentiles.of(values)
    assert found.p50 <= found.p90 <= found.p99 <= found.most == max(values)
    assert {found.p50, found.p90, found.p99} <= set(values)
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert 100 * sum(each <= value for each in values) >= percent * len(values)
    spread = Spread.of(values)
    assert min(values) == spread.least <= spread.median <= spread.most == max(values)


def test_a_batch_of_a_real_model(tales_model: Model) -> None:
    seen: list[tuple[int, int]] = []
    result = benchmark(
        tales_model,
        prompt_tokens=5,
        new_tokens=4,
        batch_size=3,
        repetitions=2,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(1, 2), (2, 2)]
    config = tales_model.config
    # Of the last of 9 tokens there are no keys and values.
    assert result.cache_bytes == 3 * 8 * 2 * config.n_layer * config.n_embd * 4
    assert result.bandwidth is not None
    # The positions are looked up, everything else is read: 4 bytes a parameter.
    parameters = sum(record.size for name, record in tales_model.bundle.manifest.files.items() if "data" in name) / 4
    read = parameters - config.n_positions * config.n_embd
    assert result.bandwidth.weights == pytest.approx(4 * read, rel=0.01)
    # Steps find 5, 6 and 7 positions and add one.
    assert result.bandwidth.cache == 3 * 6.5 * 2 * config.n_layer * config.n_embd * 4


def test_one_new_token_is_all_prefill(tales_model: Model) -> None:
    result = benchmark(tales_model, prompt_tokens=2, new_tokens=1, repetitions=1)
    assert (result.decode, result.seconds_per_token, result.bandwidth) == (None, None, None)
    assert result.prefill.median > 0


def test_prompts_are_the_seed_s_and_end_tokens_end_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """With two entries, every other token is the end token."""
    seen: list[tuple[list[int], int]] = []

    class Counting(Model):
        def follow(self, requests: Iterable[Any], batch_size: int = 8, chunk: int | None = None) -> Iterator[Any]:
            for request, generation in super().follow(requests, batch_size, chunk):
                seen.append((request.prompt, len(generation.continuations()[0].tokens)))
                yield request, generation

    checkpoint = make_checkpoint(vocab_size=2, eos_token_id=[0, 1], bos_token_id=0)
    model = Counting(gpt2onnx.export(checkpoint, tmp_path / "bundle", parity=False).folder, threads=1)
    benchmark(model, prompt_tokens=6, new_tokens=20, repetitions=1, seed=3)
    prompt = np.random.default_rng(3).integers(2, size=(1, 6))[0].tolist()
    # One run to warm up and one that counts; each computes the whole prompt.
    assert seen == [(prompt, length) for length in range(7, 27)] * 2


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch_size", "repetitions"])
def test_numbers_below_one_are_refused(tales_model: Model, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a whole number, at least 1, not 0"):
        benchmark(tales_model, **{name: 0})


def test_more_than_the_context_window_is_refused(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line("bench", "-m", tales_bundle, "--prompt-tokens", 1000, "--new-tokens", 1000)
    assert (done.code, done.out) == (1, "")
    assert "take 1999 positions, the context window has" in done.err


def test_weights_read_leave_out_an_untied_embedding(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """An untied embedding is as large as the head, but only looked up."""
    read = {}
    for tied in (True, False):
        checkpoint = make_checkpoint(tie_word_embeddings=tied)
        read[tied] = weights_read(gpt2onnx.export(checkpoint, tmp_path / str(tied), parity=False))
    assert read[True] == pytest.approx(read[False], abs=8192)  # the graph, and the alignment of weights


def test_json_holds_everything(command_line: CommandLine, tales_bundle: Path) -> None:
    done = command_line(
        "bench", "-m", tales_bundle, "--prompt-tokens", 3, "--new-tokens", 5, "--batch-size", 2,
        "--repetitions", 2, "--threads", 1, "--device", "auto", "--seed", 11, "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    spread = {"median", "least", "most"}
    assert {name: set(found[name]) for name in ("prefill", "decode", "time_to_first_token")} == {
        "prefill": spread, "decode": spread, "time_to_first_token": spread,
    }  # fmt: skip
    assert set(found["seconds_per_token"]) == {"p50", "p90", "p99", "most"}
    assert set(found["memory"]) == {"resident", "anonymous", "file", "peak"}
    assert set(found["bandwidth"]) == {"bytes_per_second", "weights", "cache", "weights_share"}
    names = ("prompt_tokens", "new_tokens", "batch_size", "repetitions")
    assert [found[name] for name in names] == [3, 5, 2, 2]
    assert (found["model"], found["dtype"], found["device"], found["threads"]) == (str(tales_bundle), "fp32", "cpu", 1)
    assert found["versions"]["numpy"] == np.__version__
    weights, speed = found["bandwidth"]["weights"], found["decode"]["median"] / 2
    assert found["bandwidth"]["weights_share"] == pytest.approx(
        weights * speed / found["bandwidth"]["bytes_per_second"]
    )


def test_the_table_for_people(command_line: CommandLine, tales_bundle: Path) -> None:
    arguments = ("bench", "-m", tales_bundle, "--prompt-tokens", 3, "--new-tokens", 3, "--repetitions", 1)
    done = command_line(*arguments)
    assert done.code == 0
    for part in ("prefill", "decode", "tokens/s", "p50", "p99", "GB/s", "onnxruntime", "resident"):
        assert part in done.out, part
    assert "onnxruntime" not in command_line(*arguments, "-q").out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell as much")
def test_memory_of_this_process() -> None:
    used = machine.process_memory()
    assert None not in (used.resident, used.anonymous, used.file, used.peak)
    # Freshly mapped memory; an array might reuse memory that was resident before.
    with mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"1" * len(block))
        after = machine.process_memory()
        assert after.anonymous - used.anonymous > 0.9 * len(block)
    assert after.peak >= after.resident >= after.anonymous


def test_the_best_reading_counts_and_threads_end() -> None:
    threads = threading.active_count()
    reader = machine.MemoryReader(2, size=1 << 20)
    reader.read()
    first = reader.best
    reader.read()
    assert reader.best >= first > 0
    del reader
    wait_until(lambda: threading.active_count() == threads)
