"""A sandbox that hides /proc: ONNX Runtime opens no weights there, and says so in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN = "mount -t tmpfs none /proc && exec"


def hiding(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a mount namespace of its own, where /proc is empty."""
    script = ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{HIDDEN} "$@"', "sh", *map(str, command)]
    return subprocess.run(script, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_without_proc(tales_bundle: Path) -> None:
    if hiding("true").returncode:
        pytest.skip("this system lets nobody hide /proc")
    done = hiding(sys.executable, "-m", "gpt2onnx", "generate", "-m", tales_bundle, "Once", "--max-new-tokens", 1)
    assert done.stderr.count("\n") == (done.returncode != 0), done.stderr
    assert done.returncode == 0 or "/proc" in done.stderr
