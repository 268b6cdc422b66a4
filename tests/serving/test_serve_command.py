"""`gpt2onnx serve` on the command line."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.commands import CommandLine, start, wait_until
from support.systems import posix

from gpt2onnx.errors import install_command
from gpt2onnx.serving.http import server as serving_server
from gpt2onnx.serving.http.connections import OncePerSecond
from gpt2onnx.serving.http.guard import Admission
from gpt2onnx.serving.service import Limits


def test_command_line(tales_bundle: Path, command_line: CommandLine) -> None:
    options = ["--port", 0, "--name", "stories", "--energy"]
    with start("serve", "-m", tales_bundle, *options, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().rpartition(" ")[2].strip()
            assert address.startswith("http://127.0.0.1:")
            answer = httpx.post(f"{address}/v1/completions", json={"prompt": "Once", "model": "stories"}, timeout=30)
            assert answer.status_code == 200
            (joules,) = [line for line in httpx.get(f"{address}/metrics", timeout=30).text.splitlines()
                         if line.startswith("gpt2onnx_joules_total")]  # fmt: skip
            assert float(joules.split()[1]) > 0
            taken = command_line("serve", "-m", tales_bundle, "--port", address.rpartition(":")[2])
            assert taken.code == 1
            assert "can't listen" in taken.err
            assert taken.err.count("\n") == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout is not None
            assert process.stdout.read() == ""
            assert process.stderr.read() == ""
        finally:
            process.kill()


def takes_requests(address: str) -> bool:
    """Whether a server isn't ending: then its connections are refused, or get 503."""
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


@posix
def test_a_second_ctrl_c(tales_bundle: Path) -> None:
    """Ends at once, without a trace."""
    with start("serve", "-m", tales_bundle, "--port", 0, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        try:
            assert process.stderr is not None
            address = process.stderr.readline().rpartition(" ")[2].strip()
            body = {"prompt": ["A"] * 50, "stream": True, "max_tokens": 500, "eos_token_id": -1}
            with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as answer:
                next(answer.iter_bytes())
                process.send_signal(signal.SIGINT)
                wait_until(lambda: not takes_requests(address))
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_requests_that_the_end_cuts_off_are_not_logged() -> None:
    def logged(error: BaseException) -> bool:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, "failed", (), (type(error), error, None))
        return OncePerSecond().filter(record)

    assert logged(ValueError())
    assert not logged(asyncio.CancelledError())


def test_wrong_command_lines(tales_bundle: Path, command_line: CommandLine, tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--max-batch", "0"], 2, "max-batch"),
        (["--port", "70000"], 2, "port"),
        (["--host", "no such host"], 1, "can't listen"),
        (["--api-key-file", str(tmp_path / "missing")], 1, "can't read"),
        (["--host", "no such host", "--cors-origin", "foo"], 1, "'foo' is no origin"),
    ):
        result = command_line("serve", "-m", tales_bundle, *arguments)
        assert (result.code, result.err.count("\n")) == (code, 1), result
        assert message in result.err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_missing_extra(package: str, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gpt2onnx.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = command_line("serve")
    assert result.code == 1
    assert install_command("serve") in result.err
    assert result.err.count("\n") == 1


def test_every_option_arrives(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: dict[str, Any] = {}

    def load(*arguments: Any, **more: Any) -> Any:
        taken["loaded"] = (*arguments, more)
        return SimpleNamespace(bundle=SimpleNamespace(folder=tmp_path))

    monkeypatch.setattr("gpt2onnx.cli.serve.load", load)
    monkeypatch.setattr(
        serving_server, "serve", lambda model, listener, settings, ready: taken.update(settings=settings)
    )
    assert command_line("serve", "--port", 0).code == 0
    plain = serving_server.Settings(names=["tales"], admission=Admission(keys=[]))
    assert taken == {"loaded": ("tales", "cpu", None, {"wide_after": 0}), "settings": plain}

    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    log = logging.getLogger("gpt2onnx.serving")
    monkeypatch.setattr(log, "level", log.level)  # put back at the end
    finished = command_line(
        "serve", "-m", "some/model", "--port", 0, "--cors-origin", "https://a.example/", "--root-path", "/api", "--allowed-host", "me",
        "--served-model-name", "mine", "yours", "--api-key-file", keys, "--max-batch", 3, "--max-queue", 5,
        "--max-prompt-tokens", 7, "--max-tokens", 11, "--max-body", 13, "--timeout", 17, "--shutdown-timeout", 19,
        "--log-prompts", "--device", "cuda", "--threads", 23,
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert taken["loaded"] == ("some/model", "cuda", 23, {"wide_after": 0})
    assert taken["settings"] == serving_server.Settings(
        names=["mine", "yours"], cors_origins=("https://a.example",), root_path="/api", max_batch=3, max_queue=5, limits=Limits(prompt_tokens=7, max_tokens=11, seconds=17),
        admission=Admission(keys=[b"open sesame"], only_local=False, hosts=("me",), body_bytes=13), log_prompts=True, shutdown_seconds=19,
    )  # fmt: skip
