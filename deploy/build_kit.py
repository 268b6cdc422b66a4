"""Builds an offline kit: a folder that installs gpt2onnx and a bundle on a machine without a network.

    python deploy/build_kit.py ./tales-int8 ./kit --platform linux-aarch64 --python 3.11

Run it where gpt2onnx[cpu] is installed and a package index is reached. The target's platform and Python may be
others than this machine's. The kit: wheels with their hashes, the bundle's archive, `install.py`, a systemd unit.
"""

import argparse
import email.parser
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
MANYLINUX = [f"manylinux_2_{minor}" for minor in range(28, 16, -1)] + ["manylinux2014"]
# Tags of wheels that run there, and what markers of requirements say there (PEP 508).
PLATFORMS = {
    "linux-x86_64": ([f"{tag}_x86_64" for tag in MANYLINUX], ("posix", "linux", "Linux", "x86_64")),
    "linux-aarch64": ([f"{tag}_aarch64" for tag in MANYLINUX], ("posix", "linux", "Linux", "aarch64")),
    "macos-arm64": (["macosx_14_0_arm64"], ("posix", "darwin", "Darwin", "arm64")),
    "windows-x86_64": (["win_amd64"], ("nt", "win32", "Windows", "AMD64")),
}
PYTHONS = ("3.11", "3.12", "3.13")
SMOKE = [
    {"id": "greedy", "prompt": "Once upon a time", "max_new_tokens": 16},
    {"id": "sampled", "prompt": "Once upon a time", "max_new_tokens": 16, "do_sample": True, "top_k": 20, "seed": 1},
]


@dataclass(frozen=True)
class Target:
    """Where the kit is to be installed."""

    platform: str
    python: str

    def pip_options(self) -> list[str]:
        """What makes pip choose wheels for the target."""
        tags, _ = PLATFORMS[self.platform]
        abis = ["cp" + self.python.replace(".", ""), "abi3", "none"]
        options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        return [*options, *(f"--platform={tag}" for tag in tags), *(f"--abi={abi}" for abi in abis)]

    def markers(self) -> dict[str, str]:
        """What markers of requirements are compared with on the target."""
        _, (os_name, sys_platform, system, machine) = PLATFORMS[self.platform]
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": os_name,
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": system,
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": sys_platform,
        }


def main() -> None:
    """Reads the options, builds the kit and prints what it weighs, as JSON."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of the bundle that the kit is to bring")
    parser.add_argument("kit", type=Path, help="folder to make")
    parser.add_argument("--platform", choices=PLATFORMS, required=True, help="of the target")
    parser.add_argument("--python", choices=PYTHONS, default=here, help="version on the target (default: this one)")
    parser.add_argument("--wheel", type=Path, help="of gpt2onnx (default: built from this repository)")
    parser.add_argument("--constraint", type=Path, help="versions to keep to, as for pip")
    options = parser.parse_args()
    if options.kit.exists():
        fail(f"{options.kit} exists: choose another folder")
    partial = options.kit.with_name(f".{options.kit.name}.{os.getpid()}.new")
    try:
        facts = build(
            partial, options.bundle, Target(options.platform, options.python), options.wheel, options.constraint
        )
        partial.rename(options.kit)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(json.dumps({"kit": str(options.kit)} | facts, indent=2))


def build(kit: Path, bundle: Path, target: Target, wheel: Path | None, constraint: Path | None) -> dict[str, object]:
    """Fills the folder; returns its facts."""
    wheels = kit / "wheels"
    wheels.mkdir(parents=True)
    if wheel is None:
        build_wheel(wheels)
    else:
        shutil.copy(wheel, wheels)
    (own,) = wheels.iterdir()
    limits = ["--constraint", constraint] if constraint else []
    download = ("download", "--dest", wheels, *target.pip_options(), *limits)
    pip(*download, f"{own}[cpu]")
    # pip compares markers with the machine that it runs on: what only the target needs is fetched by name.
    while missing := unmet(wheels, target):
        pip(*download, "--no-deps", *missing)
    required = sorted(closure(wheels, target))
    for path in wheels.iterdir():
        if path not in required:
            path.unlink()
    (kit / "requirements.txt").write_text(
        "".join(f"{pinned(path)} --hash=sha256:{sha256(path)}\n" for path in required)
    )
    # pip comes along, since a target's Python may be without it.
    pip(*download, "--no-deps", "pip")

    gpt2onnx("pack", bundle, kit / "bundle.tar.gz", "--quiet")
    requests, results = kit / "smoke.jsonl", kit / "smoke-results.jsonl"
    requests.write_text("".join(json.dumps(request) + "\n" for request in SMOKE))
    gpt2onnx("generate", "-m", bundle, "--input", requests, "--output", results, "--quiet")
    for name in ("install.py", "gpt2onnx-job@.service"):
        shutil.copy(HERE / name, kit)
    shutil.copy(HERE / "kit.md", kit / "README.md")
    facts: dict[str, object] = {
        "platform": target.platform,
        "python": target.python,
        "machine": target.markers()["platform_machine"],
    }
    (kit / "kit.json").write_text(json.dumps(facts | {"gpt2onnx": own.name.split("-")[1]}, indent=2) + "\n")
    files = sorted(path for path in kit.rglob("*") if path.is_file())
    sums = [f"{sha256(path)}  {path.relative_to(kit).as_posix()}\n" for path in files]
    (kit / "SHA256SUMS").write_text("".join(sums))
    sizes = {path.relative_to(kit).as_posix(): path.stat().st_size for path in [*files, kit / "SHA256SUMS"]}
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    return facts | {"bytes": sum(sizes.values()), "files": dict(largest)}


def build_wheel(target: Path) -> None:
    """The wheel of this repository, built from a copy: a build leaves files in its tree, and finds older ones there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        skipped = shutil.ignore_patterns(".*", "build", "dist", "tests", "benchmarks", "*.egg-info", "__pycache__")
        shutil.copytree(HERE.parent, copy, ignore=skipped)
        pip("wheel", "--no-deps", "--wheel-dir", target, copy)


def requirements(wheel: Path) -> Iterator[Requirement]:
    """What a wheel's metadata requires, extras and all."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        metadata = email.parser.Parser().parsestr(archive.read(path).decode())
    yield from map(Requirement, metadata.get_all("Requires-Dist", []))


def walk(wheels: Path, target: Target) -> tuple[set[Path], set[str]]:
    """From gpt2onnx[cpu] on: the wheels that the target needs, and the requirements that no wheel here meets."""
    found = {parse_wheel_filename(path.name)[0]: path for path in wheels.glob("*.whl")}
    needed, unmet_ = set[Path](), set[str]()
    waiting = [Requirement("gpt2onnx[cpu]")]
    seen = set[str]()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        wheel = found.get(canonicalize_name(requirement.name))
        if wheel is None or not requirement.specifier.contains(parse_wheel_filename(wheel.name)[1], prereleases=True):
            unmet_.add(f"{requirement.name}{requirement.specifier}")
            continue
        needed.add(wheel)
        for each in requirements(wheel):
            extras = requirement.extras or {""}
            if each.marker is None or any(each.marker.evaluate(target.markers() | {"extra": one}) for one in extras):
                waiting.append(each)
    return needed, unmet_


def closure(wheels: Path, target: Target) -> set[Path]:
    """The wheels that the target needs."""
    return walk(wheels, target)[0]


def unmet(wheels: Path, target: Target) -> set[str]:
    """Requirements on the target that no wheel in the folder meets."""
    return walk(wheels, target)[1]


def pinned(wheel: Path) -> str:
    """The requirement that only this wheel meets."""
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return f"{name}[cpu]=={version}" if name == "gpt2onnx" else f"{name}=={version}"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip(*arguments: object) -> None:
    """Runs this interpreter's pip."""
    run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)])


def gpt2onnx(*arguments: object) -> None:
    """Runs gpt2onnx's command line."""
    run([sys.executable, "-m", "gpt2onnx", *map(str, arguments)])


def run(command: Sequence[str]) -> None:
    """Runs a program, whose errors are the last that is said."""
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        fail(f"'{' '.join(command[2:4])} …' failed ({done.returncode}): the kit was not built")


def fail(message: str) -> NoReturn:
    """One line, exit code 1."""
    sys.exit(f"build_kit: {message}")


if __name__ == "__main__":
    main()
