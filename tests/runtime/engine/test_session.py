"""Loading a bundle: one owner of threads, errors in one line, buffers that stay small."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import gpt2onnx
from gpt2onnx.errors import BackendError, OptionError
from gpt2onnx.models.bundle import RAGGED_GRAPH, Bundle
from gpt2onnx.runtime.engine import runner
from gpt2onnx.runtime.engine.runner import Runner


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_out_of_range(tales_bundle: Path, threads: Any) -> None:
    with pytest.raises(OptionError, match=f"threads must be a whole number, at least 1, not {threads!r}"):
        gpt2onnx.load(tales_bundle, threads=threads)


def test_threads_that_would_take_all_memory(tales_bundle: Path) -> None:
    with pytest.raises(OptionError, match="threads must be at most 1,024, not 999999"):
        gpt2onnx.load(tales_bundle, threads=999_999)


def test_threads_are_what_was_asked_for(tales_bundle: Path) -> None:
    for threads in (1, 2, 5):
        loaded = Runner(Bundle.open(tales_bundle), threads=threads)
        assert loaded.threads == loaded._graph.get_session_options().intra_op_num_threads == threads


def test_a_loaded_model_costs_nothing_while_idle(tales_bundle: Path) -> None:
    """With two threads, of which the second could wait for work in a loop: processor time over half a second's sleep."""
    code = (
        "import sys, time, gpt2onnx\n"
        "model = gpt2onnx.load(sys.argv[1], threads=2); model.generate('Once', max_new_tokens=8); time.sleep(0.1)\n"
        "before = time.process_time(); time.sleep(0.5); print(time.process_time() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tales_bundle], capture_output=True, check=True)
    assert float(done.stdout) < 0.005


def test_a_graph_that_cannot_be_loaded_is_one_line(
    tales_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("first\n  second")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendError, match=r"ONNX Runtime can't load .*\.onnx: first second$"):
        gpt2onnx.load(tales_bundle)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "message",
    ["Exception during initialization: std::bad_alloc", "Failed to allocate memory for requested buffer of size 7"],
)
def test_onnxruntime_out_of_memory_says_how_much_there_is(
    tales_bundle: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    loaded = Runner(Bundle.open(tales_bundle), threads=1)

    def fail(*arguments: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(loaded._graph, "run_with_iobinding", fail)
    with pytest.raises(BackendError, match=r"there isn't enough memory \(the tightest limit is "):
        loaded.forward(loaded.new_cache(1, 8), slice(0, 1), np.array([[1]]))


def test_a_cache_that_numpy_cannot_make_is_an_option_error(tales_bundle: Path) -> None:
    loaded = Runner(Bundle.open(tales_bundle), threads=1)
    with pytest.raises(OptionError, match=r"no memory for a cache of .* GB \(1000000000 sequences of 1000 tokens\)"):
        loaded.new_cache(10**9, 1000)


def test_buffers_of_long_prompts_are_not_kept(tales_model: gpt2onnx.Model) -> None:
    network = tales_model.runner
    cache = network.new_cache(2, 64)
    for count in (1, 4, 16, 17):
        network.forward(cache, slice(0, 1), np.ones((1, count), np.int64), logits="all")
    network.forward(cache, slice(0, 2), np.ones((2, 1), np.int64))
    assert len(network._passes) == 4


def test_buffers_of_many_batch_sizes_take_no_more_memory_than_those_of_a_few(
    tales_model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 100 * tales_model.config.vocab_size * 4
    monkeypatch.setattr(runner, "_KEPT_BYTES", most)
    network = tales_model.runner
    cache = network.new_cache(40, 64)
    for rows in (*range(40, 0, -1), 1, 2):
        network.forward(cache, slice(0, rows), np.ones((rows, 1), np.int64))
    kept = [each.output for each in network._passes.values()]
    assert sum(output.nbytes for output in kept) <= most
    assert [len(output) for output in kept][-4:] == [4, 3, 1, 2]  # those used last


@pytest.mark.parametrize("left_out", [(), (RAGGED_GRAPH,)], ids=["ragged", "interchange"])
def test_rows_whose_padding_does_not_fit_into_the_cache(tales_bundle: Path, left_out: tuple[str, ...]) -> None:
    """GroupQueryAttention takes no row whose past and padded tokens are longer than the cache."""
    loaded = Runner(Bundle.open(tales_bundle).without(*left_out), threads=1)
    tokens, past, counts = np.arange(5 * 64).reshape(5, 64), np.array([60, 0, 62, 5, 30]), np.array([3, 40, 0, 2, 34])
    cache = loaded.new_cache(5, 64)
    for row, length in enumerate(past):
        if length:
            loaded.forward(cache, slice(row, row + 1), tokens[row : row + 1, :length])
    new = np.zeros((5, 40), np.int64)
    for row in range(5):
        new[row, : counts[row]] = tokens[row, past[row] : past[row] + counts[row]]
    found = loaded.forward(cache, slice(0, 5), new, counts)
    for logits, row in zip(found, (0, 1, 3, 4), strict=True):
        end = past[row] + counts[row]
        alone = loaded.forward(loaded.new_cache(1, 64), slice(0, 1), tokens[row : row + 1, :end])[0]
        np.testing.assert_allclose(logits, alone, atol=1e-4)
    assert cache.lengths.tolist() == [63, 40, 62, 7, 64]


@pytest.mark.parametrize("left_out", [(), (RAGGED_GRAPH,)], ids=["ragged", "interchange"])
def test_padding_is_computed_from_nothing_left_in_memory(tales_bundle: Path, left_out: tuple[str, ...]) -> None:
    """Up to 1.26, ONNX Runtime's attention reads memory that nobody has written, if a prompt's padding is masked."""
    loaded = Runner(Bundle.open(tales_bundle).without(*left_out), threads=1)
    tokens, lengths = np.arange(80).reshape(2, 40), np.array([10, 20])
    alone = [
        loaded.forward(loaded.new_cache(1, 64), slice(0, 1), tokens[row : row + 1, :length])[0].copy()
        for row, length in enumerate(lengths)
    ]
    cache = loaded.new_cache(1, 64)
    loaded.forward(cache, slice(0, 1), tokens[:1, :20])
    cache.data[:] = np.nan
    # Its attention takes as much memory as that of the two prompts together, and leaves NaN there.
    with pytest.raises(BackendError, match="not a number"):
        loaded.forward(cache, slice(0, 1), tokens[1:])
    cache = loaded.new_cache(2, 64)
    together = loaded.forward(cache, slice(0, 2), tokens[:, :20], lengths)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert np.isfinite(cache.data[:, :, 0, :, :10]).all()
    assert np.isfinite(cache.data[:, :, 1, :, :20]).all()
