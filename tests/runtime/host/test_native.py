"""Standard error while a native library may print on it."""

import logging
import os
import threading

import pytest

from gpt2onnx.runtime.host.native import captured_stderr, silenced_stderr


def test_log_lines_of_other_threads_wait(capfd: pytest.CaptureFixture[str]) -> None:
    """They would be dropped with what the library prints: a model's graph is opened while its tokenizer is read."""
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with silenced_stderr():
            other = threading.Thread(target=logging.warning, args=["from another thread"])
            other.start()
            other.join(0.2)
            assert other.is_alive()
        other.join(10)
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err == "from another thread\n"


def test_what_is_printed_is_dropped_or_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced_stderr():
        os.write(2, b"dropped")
    with captured_stderr() as said:
        os.write(2, b"kept")
    assert said() == "kept"
    assert capfd.readouterr().err == ""
