"""The wheel in empty environments, as people get it, but for uv in place of pip, which takes half a minute longer."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.paths import REPOSITORY

pytestmark = pytest.mark.system

# Every folder that is a package here is one in the wheel: X is gpt2onnx.X.
PACKAGES = {
    path.parent.relative_to(REPOSITORY).as_posix(): f"gpt2onnx/{path.parent.relative_to(REPOSITORY).as_posix()}"
    for top in ("cli", "exporter", "experiments", "fleet", "models", "runtime", "serving", "web")
    for path in (REPOSITORY / top).rglob("__init__.py")
} | {"gpt2onnx": "gpt2onnx"}
DATA = {".js", ".json", ".jinja", ".toml", ".txt", ".gz", ".bin", ".css", ".safetensors"}
LARGEST_WHEEL = 25e6
LARGEST_SITE = 230e6  # bytes


def run(*command: object, cwd: Path, **settings: str) -> str:
    """Runs a program where neither the repository nor this environment can be imported; returns its output."""
    own = ("PYTHONPATH", "VIRTUAL_ENV", "GPT2ONNX_CACHE", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"UV_SYSTEM_CERTS": "1"} | settings
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}\n{done.stderr}"
    assert not done.stderr or "build" in command, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the repository stays as it is."""
    copy = tmp_path_factory.mktemp("source") / "gpt2onnx"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--installer", "uv", "--wheel", "--outdir", target, copy, cwd=target)
    (built,) = target.glob("*.whl")
    return built


class Environment:
    """A virtual environment with nothing but the wheel and some extras in it."""

    def __init__(self, folder: Path, wheel: Path, extras: str) -> None:
        self.folder = folder
        self._bin = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        self._uv("venv", "--python", sys.executable, folder / "venv")
        install = ("pip", "install", "--python", folder / "venv", "--compile-bytecode")
        self._uv(*install, f"gpt2onnx[{extras}] @ {wheel.as_uri()}")
        (folder / "home").mkdir()

    def _uv(self, *arguments: object) -> str:
        return run(sys.executable, "-m", "uv", "--quiet", *arguments, cwd=self.folder)

    def gpt2onnx(self, *arguments: object) -> str:
        """Runs the installed command, for a user who has never used it."""
        return run(self._bin / "gpt2onnx", *arguments, cwd=self.folder, HOME=str(self.folder / "home"))

    def installed(self) -> set[str]:
        listed = self._uv("pip", "list", "--python", self.folder / "venv", "--format", "json")
        return {package["name"].lower() for package in json.loads(listed)}

    def site_size(self) -> int:
        """Bytes of everything that was installed, compiled modules too."""
        (site,) = self.folder.glob("venv/lib/python*/site-packages")
        return sum(path.stat().st_size for path in site.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def exporting(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    environment = Environment(tmp_path_factory.mktemp("exporting"), wheel, "cpu,export")
    yield environment
    shutil.rmtree(environment.folder)  # hundreds of megabytes that pytest would keep


@pytest.fixture(scope="module")
def bundle(exporting: Environment) -> Path:
    exporting.gpt2onnx("export", "tales", "bundle")
    return exporting.folder / "bundle"


@pytest.fixture(scope="module")
def generating(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    environment = Environment(tmp_path_factory.mktemp("generating"), wheel, "cpu")
    yield environment
    shutil.rmtree(environment.folder)  # hundreds of megabytes that pytest would keep


def test_wheel_holds_every_module_and_the_embedded_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"{package}/{path.name}" for folder, package in PACKAGES.items() for path in (REPOSITORY / folder).glob("*.py")
    }
    # What modules read beside them. The training of tales isn't one.
    expected |= {
        f"{package}/{path.name}"
        for folder, package in PACKAGES.items()
        for path in (REPOSITORY / folder).iterdir()
        if path.suffix in DATA
    }
    assert expected <= names, f"missing: {sorted(expected - names)}"
    tales = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f"gpt2onnx/models/tales/{name}" for name in tales} | {"gpt2onnx/py.typed"} <= names
    assert {f"gpt2onnx/experiments/{name}" for name in ("notebooks.toml", "report.html.jinja")} <= names
    for folder in ("serving/page", "web/static", "web/npm"):
        files = {path for path in (REPOSITORY / folder).rglob("*") if path.is_file()}
        assert {f"gpt2onnx/{path.relative_to(REPOSITORY).as_posix()}" for path in files} <= names
    assert {name.split("/")[0] for name in names} == {
        "gpt2onnx",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert not [name for name in names if "train" in name or "test" in name], "only for development"
    assert wheel.stat().st_size < LARGEST_WHEEL, f"{wheel.stat().st_size:,} bytes"


def test_no_extra_brings_both_kinds_of_onnxruntime(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(path).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]

    def brings(extra: str) -> set[str]:
        return {one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": extra})}

    extras = metadata.get_all("Provides-Extra", [])
    assert {"cpu", "gpu", "export", "optimum", "energy"} <= set(extras)
    assert brings("cpu") - brings("") == {"onnxruntime"}
    assert brings("gpu") - brings("") == {"onnxruntime-gpu"}
    assert brings("") & {"onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx"} == set()
    assert [extra for extra in extras if "onnxruntime-gpu" in brings(extra)] == ["gpu"]


def test_exports_and_generates(exporting: Environment, bundle: Path) -> None:
    from_bundle = exporting.gpt2onnx("generate", "Once upon a time", "-m", bundle, "--seed", 1)
    assert len(from_bundle.split()) > 20
    # The model that is meant where none is named, exported into the cache on first use.
    from_source = exporting.gpt2onnx("generate", "Once upon a time", "--seed", 1)
    assert from_source == from_bundle
    assert exporting.installed() & {"torch", "transformers", "pandas"} == set()


def test_generates_from_a_bundle_with_little_installed(
    generating: Environment, exporting: Environment, bundle: Path
) -> None:
    command = ("generate", "Once upon a time", "-m", bundle, "--seed", 1)
    assert generating.gpt2onnx(*command) == exporting.gpt2onnx(*command)
    assert generating.installed() & {"torch", "transformers", "pandas", "onnx", "safetensors"} == set()
    size = generating.site_size()
    assert size < LARGEST_SITE, f"{size / 1e6:.1f} MB"
