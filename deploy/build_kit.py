"""Builds an offline kit: a folder that installs gpt2onnx and a bundle on a machine without a network.

    python deploy/build_kit.py ./tales-int8 ./kit --platform linux-aarch64 --python 3.11

Needs gpt2onnx[cpu], uv and a package index. The target's platform and Python may differ from this machine's. The kit
holds wheels, their hashes, the bundle's archive, `install.py` and a systemd unit.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
SMOKE = [
    {"id": "greedy", "prompt": "Once upon a time", "max_new_tokens": 16},
    {"id": "sampled", "prompt": "Once upon a time", "max_new_tokens": 16, "do_sample": True, "top_k": 20, "seed": 1},
]


class Platform(NamedTuple):
    """A target's names: platform.machine() there, uv's name, and tags of wheels for pip."""

    machine: str
    uv: str
    tags: tuple[str, ...]


def linux(machine: str) -> Platform:
    """Linux with glibc 2.28 or later."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1)]
    return Platform(machine, f"{machine}-manylinux_2_28", (*tags, f"manylinux2014_{machine}"))


PLATFORMS = {
    "linux-x86_64": linux("x86_64"),
    "linux-aarch64": linux("aarch64"),
    "macos-arm64": Platform("arm64", "aarch64-apple-darwin", ("macosx_14_0_arm64",)),
    "windows-x86_64": Platform("AMD64", "x86_64-pc-windows-msvc", ("win_amd64",)),
}


def main() -> None:
    """Reads the options, builds the kit and prints its facts as JSON."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("kit", type=Path, help="folder to make")
    parser.add_argument("--platform", choices=PLATFORMS, required=True, help="target platform")
    parser.add_argument("--python", choices=PYTHONS, default=here, help="target Python (default: this one)")
    parser.add_argument("--wheel", type=Path, help="wheel of gpt2onnx (default: built from this repository)")
    parser.add_argument("--constraint", type=Path, help="versions to keep to, as for pip")
    options = parser.parse_args()
    if options.kit.exists():
        fail(f"{options.kit} exists: choose another folder")
    partial = options.kit.with_name(f".{options.kit.name}.{os.getpid()}.new")
    try:
        facts = build(partial, options.bundle, options.platform, options.python, options.wheel, options.constraint)
        partial.rename(options.kit)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(json.dumps({"kit": str(options.kit)} | facts, indent=2))


def build(
    kit: Path, bundle: Path, platform: str, python: str, wheel: Path | None, constraint: Path | None
) -> dict[str, object]:
    """Fills the folder; returns its facts."""
    wheels = kit / "wheels"
    wheels.mkdir(parents=True)
    if wheel is None:
        build_wheel(wheels)
    else:
        shutil.copy(wheel, wheels)
    (own,) = wheels.iterdir()
    target = PLATFORMS[platform]
    # uv resolves: pip would evaluate markers such as sys_platform == "win32" for the machine that it runs on.
    requirements = kit / "requirements.txt"
    (kit / "own.txt").write_text(f"gpt2onnx[cpu] @ {own.resolve().as_uri()}\n")
    python_module(
        "uv", "pip", "compile", kit / "own.txt", "--quiet", "--no-header", "--no-annotate", "--generate-hashes",
        "--only-binary", ":all:", "--no-emit-package", "gpt2onnx", "--python-platform", target.uv,
        "--python-version", python, "--output-file", requirements, *(["--constraint", constraint] if constraint else []),
    )  # fmt: skip
    (kit / "own.txt").unlink()
    pip = ("pip", "--quiet", "--disable-pip-version-check")
    chosen = [
        "--dest", wheels, "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
        f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none", *(f"--platform={tag}" for tag in target.tags),
    ]  # fmt: skip
    python_module(*pip, "download", *chosen, "--require-hashes", "--requirement", requirements)
    # pip comes along, since a target's Python may be without it.
    python_module(*pip, "download", *chosen, "pip")
    version = own.name.split("-")[1]
    with requirements.open("a") as file:
        file.write(f"gpt2onnx[cpu]=={version} --hash=sha256:{sha256(own)}\n")

    python_module("gpt2onnx", "pack", bundle, kit / "bundle.tar.gz", "--quiet")
    requests, results = kit / "smoke.jsonl", kit / "smoke-results.jsonl"
    requests.write_text("".join(json.dumps(request) + "\n" for request in SMOKE))
    python_module(
        "gpt2onnx", "generate", "-m", bundle, "--input", requests, "--output", results, "--fail-on-error", "--quiet"
    )
    for name in ("install.py", "gpt2onnx-job@.service"):
        shutil.copy(HERE / name, kit)
    shutil.copy(HERE / "kit.md", kit / "README.md")
    facts: dict[str, object] = {"platform": platform, "python": python, "machine": target.machine}
    (kit / "kit.json").write_text(json.dumps(facts | {"gpt2onnx": version}, indent=2) + "\n")
    files = sorted(path for path in kit.rglob("*") if path.is_file())
    sums = [f"{sha256(path)}  {path.relative_to(kit).as_posix()}\n" for path in files]
    (kit / "SHA256SUMS").write_text("".join(sums))
    sizes = {path.relative_to(kit).as_posix(): path.stat().st_size for path in [*files, kit / "SHA256SUMS"]}
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    return facts | {"bytes": sum(sizes.values()), "files": dict(largest)}


def build_wheel(target: Path) -> None:
    """Builds this repository's wheel from a copy: a build leaves files in its tree, and takes older ones from there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        skipped = shutil.ignore_patterns(".*", "build", "dist", "tests", "benchmarks", "*.egg-info", "__pycache__")
        shutil.copytree(HERE.parent, copy, ignore=skipped)
        python_module("pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", target, copy)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def python_module(module: str, *arguments: object) -> None:
    """Runs a module of this Python. Its own output precedes the line that says that it failed."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], stdout=sys.stderr, check=False)
    if done.returncode:
        fail(f"{module} failed ({done.returncode}): the kit was not built")


def fail(message: str) -> NoReturn:
    """Ends with one line and exit code 1."""
    sys.exit(f"build_kit: {message}")


if __name__ == "__main__":
    main()
