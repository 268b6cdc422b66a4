"""Makes each peer's environment and model files, outside the repository.

    python -m benchmarks.prepare                   everything that isn't there yet; gpt2onnx's anew
    python -m benchmarks.prepare llama.cpp         only the named environments and models
    python -m benchmarks.prepare --list            their names

It can be interrupted and run again. To use an environment or a model made elsewhere, put a link in its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import environments
from .environments import BUILDERS, ENVIRONMENTS, interpreter

CHECKPOINT = "checkpoint"
GGUF_KINDS = ("f32", "bf16", "q8_0", "q4_0")
BUNDLES = {"fp32": ["--dtype", "fp32"], "int8": ["--dtype", "int8"], "int4": ["--dtype", "int4"]}
BUNDLES["int4-pure"] = ["--dtype", "int4", "--pure"]

Make = Callable[[Path, Path, Path], list[str]]  # work folder, checkpoint, target -> command


def default_work() -> Path:
    """The default work folder, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gpt2onnx-benchmarks"


def models() -> dict[str, tuple[str, Make]]:
    """Model files and folders by name: their peer, and the command that makes them from the checkpoint."""
    made: dict[str, tuple[str, Make]] = {}
    for kind in GGUF_KINDS:
        made[f"gpt2-{kind}.gguf"] = "llama.cpp", _gguf(kind)
    for name, quantization in {"fp32": "float32", "int8": "int8"}.items():
        made[f"ctranslate2-{name}"] = "ctranslate2", _ctranslate2(quantization)
    for weights in ("fp32", "int8", "int4"):
        made[f"openvino-{weights}"] = "openvino", _openvino(weights)
    made["optimum"] = "optimum", _optimum
    for name, options in BUNDLES.items():
        made[f"gpt2onnx-{name}"] = "gpt2onnx", _gpt2onnx(options)
    return made


def _gguf(kind: str) -> Make:
    script = str(Path(__file__).with_name("models.py"))
    return lambda work, source, target: [_in(work, "converter"), script, "gguf", str(source), str(target), kind]


def _ctranslate2(quantization: str) -> Make:
    return lambda work, source, target: [
        _in(work, "converter", "ct2-transformers-converter"), "--model", str(source), "--output_dir", str(target),
        "--quantization", quantization, "--copy_files", "tokenizer.json",
    ]  # fmt: skip


def _openvino(weights: str) -> Make:
    return lambda work, source, target: [
        _in(work, "converter", "optimum-cli"), "export", "openvino", "--model", str(source),
        "--task", "text-generation-with-past", "--weight-format", weights, str(target),
    ]  # fmt: skip


def _optimum(work: Path, source: Path, target: Path) -> list[str]:
    command = [_in(work, "optimum", "optimum-cli"), "export", "onnx", "--model", str(source)]
    return [*command, "--task", "text-generation-with-past", "--no-post-process", str(target)]


def _gpt2onnx(options: list[str]) -> Make:
    # Random weights need no quality check, but calibration, which decides about the second graph.
    unchecked = ["--no-quality", "--no-parity", "--quiet", "--force"]
    return lambda work, source, target: [
        _in(work, "exporter", "gpt2onnx"), "export", str(source), str(target), *options, *unchecked
    ]  # fmt: skip


def _in(work: Path, environment: str, program: str = "") -> str:
    python = interpreter(work, environment)
    return str(python.with_name(program) if program else python)


def make_checkpoint(work: Path) -> Path:
    """Makes the checkpoint that all models come from."""
    script = str(Path(__file__).with_name("models.py"))
    target = work / "models" / CHECKPOINT
    _make(target, lambda part: [_in(work, "converter"), script, "checkpoint", str(part)])
    return target


def make_model(work: Path, name: str) -> None:
    """Makes one of `models()` unless it is there; gpt2onnx's anew, since the exporter changes."""
    peer, command = models()[name]
    target = work / "models" / name
    if peer == "gpt2onnx" and not target.is_symlink():
        shutil.rmtree(target, ignore_errors=True)
    _make(target, lambda part: command(work, work / "models" / CHECKPOINT, part))


def _make(target: Path, command: Callable[[Path], list[str]]) -> None:
    if target.exists():
        return
    part = target.with_name(f"part-{target.name}")  # renamed when it is complete
    shutil.rmtree(part, ignore_errors=True)
    arguments = command(part)
    print("+", *arguments, file=sys.stderr, flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(arguments, check=True, cwd=target.parent, env=os.environ | offline)
    part.rename(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="environments or models; all if none is named")
    parser.add_argument("--work", type=Path, default=default_work(), help="work folder (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    known = [*BUILDERS, *ENVIRONMENTS, environments.LLAMA_SERVER, CHECKPOINT, *models()]
    if unknown := set(arguments.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if arguments.list:
        print("\n".join(known))
        return
    wanted = arguments.names or [
        name for name in known if name != environments.LLAMA_SERVER
    ]  # only serve_load.py needs it
    work = arguments.work.resolve()
    (work / "models").mkdir(parents=True, exist_ok=True)
    for name in BUILDERS | ENVIRONMENTS:
        if name in wanted:
            environments.create(work, name)
    if environments.LLAMA_SERVER in wanted:
        environments.make_llama_server(work)
    if CHECKPOINT in wanted or any(name in models() or models_of(name) for name in wanted):
        make_checkpoint(work)
    for name in models():
        if name in wanted or models()[name][0] in wanted:
            make_model(work, name)


def models_of(peer: str) -> list[str]:
    """Names of the models that a peer runs."""
    return [name for name, (runtime, _) in models().items() if runtime == peer]


if __name__ == "__main__":
    main()
