"""Other runtimes, each in an environment of its own, since they can't be installed beside what is tested.

The environment variable GPT2ONNX_PEERS names a folder for them; what isn't there yet is installed. Where the
variable isn't set, tests that need one are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY

TORCH = "torch==2.13.0"
# optimum's ONNX export stops short of transformers 5.
PYTHON_PACKAGES = ["transformers>=4.57,<4.58", "onnxruntime-genai>=0.8"]
CLIENTS = ["langchain-openai", "litellm", "llm", "openai"]
NODE_PACKAGE = "@huggingface/transformers"


def _folder() -> Path:
    folder = os.environ.get("GPT2ONNX_PEERS")
    if not folder:
        pytest.skip("needs other runtimes: set GPT2ONNX_PEERS to a folder, where they are installed on first use")
    return Path(folder).absolute()


def python() -> Path:
    """The interpreter of an environment with gpt2onnx and its extra `optimum`, and onnxruntime-genai."""
    return _interpreter("python", *PYTHON_PACKAGES, "--editable", f"{REPOSITORY}[cpu,export,optimum]", torch=True)


def clients() -> Path:
    """The interpreter of an environment with clients of OpenAI's interface, each in its newest version."""
    return _interpreter("clients", *CLIENTS)


def lm_eval() -> Path:
    """The interpreter of an environment with lm-eval and PyTorch."""
    return _interpreter("lm-eval", "lm-eval[api,hf]", torch=True)


def guidellm() -> Path:
    """The interpreter of an environment with guidellm and PyTorch."""
    return _interpreter("guidellm", "guidellm", torch=True)


def open_webui() -> Path:
    """The interpreter of an environment with Open WebUI and PyTorch: 1.4 GB beside the latter."""
    return _interpreter("open-webui", "open-webui", torch=True)


def _interpreter(name: str, *packages: str, torch: bool = False) -> Path:
    environment = _folder() / name
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (environment / "installed").exists():
        _run([sys.executable, "-m", "venv", str(environment)])
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(interpreter)]
        if torch:
            try:
                # The CPU build from PyTorch's own index, where that can be reached: PyPI's brings CUDA along.
                _run([*install, "--torch-backend", "cpu", TORCH])
            except AssertionError:
                _run([*install, TORCH])
        _run([*install, *([TORCH] if torch else []), *packages])
        (environment / "installed").touch()
    return interpreter


def node() -> Path:
    """A folder whose scripts can import transformers.js."""
    environment = _folder() / "node"
    if shutil.which("npm") is None:
        pytest.skip("needs Node 20 or later with npm, which isn't installed")
    if not (environment / "installed").exists():
        environment.mkdir(parents=True, exist_ok=True)
        # Its ONNX Runtime library comes along; the install scripts would only fetch one for CUDA.
        _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", NODE_PACKAGE], cwd=environment)
        (environment / "installed").touch()
    return environment


def run_python(program: str, *arguments: object, interpreter: Path | None = None, **settings: str) -> Any:
    """Runs a program in an environment, by default the peers', and returns what it prints, last, as JSON."""
    return _last_json(_run([str(interpreter or python()), "-c", program, *map(str, arguments)], **settings))


def run_node(program: str, *arguments: object) -> Any:
    """The same with an ES module that may import transformers.js."""
    environment = node()
    (environment / "program.mjs").write_text(program)
    return _last_json(_run(["node", str(environment / "program.mjs"), *map(str, arguments)]))


def _run(command: list[str], cwd: Path | None = None, **settings: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | offline | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"{command[0]} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def _last_json(output: str) -> Any:
    """The last line as JSON; what stands before it, such as a version, is printed."""
    *others, last = output.strip().splitlines()
    print(*others[-1:])
    return json.loads(last)
