"""deploy/ci.yml, the workflow for users: its very commands, each job on a machine of its own.

The environment of this test stands in for the first machine's: installing PyTorch would take most of the time.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from support.paths import REPOSITORY
from support.systems import posix

pytestmark = posix

WORKFLOW = yaml.safe_load((REPOSITORY / "deploy" / "ci.yml").read_text("utf-8"))
INSTALL = "pip install './gpt2onnx[cpu,export,optimum]'"
# Left out of the clone: what a clone hasn't, and what no installation needs.
SKIPPED = shutil.ignore_patterns(".*", "build", "dist", "tests", "*.egg-info", "__pycache__")


class Machine:
    """A folder in which the steps of a job run as a runner runs them.

    Args:
        programs: folder of its Python and of gpt2onnx, where they are installed already; otherwise it gets its own.
    """

    def __init__(self, folder: Path, artifacts: Path, programs: Path | None = None) -> None:
        self.folder, self.artifacts, self.is_installed = folder, artifacts, programs is not None
        folder.mkdir()
        artifacts.mkdir(exist_ok=True)
        if programs is None:
            programs = folder / "python" / "bin"
            subprocess.run([sys.executable, "-m", "venv", programs.parent], check=True)
        own = ("PYTHONPATH", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if name not in own}
        self.environment |= {name: str(value) for name, value in WORKFLOW["env"].items()}
        self.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        self.environment["GPT2ONNX_CACHE"] = str(folder / "cache")

    def step(self, step: dict[str, Any]) -> str:
        """Takes a step; returns what a command prints."""
        if self.is_installed and step.get("run") == INSTALL:
            return ""
        if "run" in step:
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=1800,
            )  # fmt: skip
            assert done.returncode == 0, f"{step['run']}\n{done.stdout}\n{done.stderr}"
            return done.stdout
        action, given = step["uses"].split("@")[0], step.get("with", {})
        if action == "actions/checkout" and "path" in given:
            shutil.copytree(REPOSITORY, self.folder / given["path"], ignore=SKIPPED)
        elif action == "actions/upload-artifact":
            shutil.copy(self.folder / given["path"], self.artifacts / given["name"])
        elif action == "actions/download-artifact":
            # Under the name that the file had.
            path = next(each["with"]["path"] for each in uploads() if each["with"]["name"] == given["name"])
            shutil.copy(self.artifacts / given["name"], self.folder / path)
        else:
            assert action in ("actions/checkout", "actions/setup-python"), step
        return ""


def uploads() -> list[dict[str, Any]]:
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    return [step for step in steps if step.get("uses", "").startswith("actions/upload-artifact")]


def test_a_model_is_exported_proved_and_generates_without_pytorch(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    machines = {
        "export": Machine(tmp_path / "export", artifacts, Path(sys.executable).parent),
        "generate": Machine(tmp_path / "generate", artifacts),
    }
    assert list(WORKFLOW["jobs"]) == list(machines), "in the order of `needs`"
    assert {"run": INSTALL} in WORKFLOW["jobs"]["export"]["steps"]
    printed = {name: [machines[name].step(step) for step in job["steps"]] for name, job in WORKFLOW["jobs"].items()}
    manifest = json.loads((tmp_path / "generate" / "bundle" / "gpt2onnx.json").read_text("utf-8"))
    assert (manifest["source"], manifest["dtype"]) == (WORKFLOW["env"]["SOURCE"], WORKFLOW["env"]["DTYPE"])
    assert manifest["parity"]["passed"] is True
    (sequence,) = json.loads(printed["generate"][-1])["sequences"]
    assert len(sequence["token_ids"]) == 20
    shutil.rmtree(tmp_path / "generate" / "python")  # 200 MB that pytest would keep
