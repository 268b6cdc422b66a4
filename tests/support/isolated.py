"""Python code in a process of its own, where some packages seem not to be installed."""

import os
import subprocess
import sys

# Runs `code` where importing the named packages fails as if they weren't installed.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{code}
"""
REFERENCES = ("torch", "transformers", "optimum")
EXPORT_ONLY = ("onnx", "safetensors", "ml_dtypes", "huggingface_hub")

COMMAND_LINE = "from gpt2onnx.cli.main import main; main()"


def run(code: str, *arguments: object, without: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
    """Runs code in a process of its own; returns exit code, standard output and standard error."""
    script = BLOCK.format(packages=set(without), code=code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr
