"""The npm packages of a web folder: transformers.js and ONNX Runtime, in the versions of npm/package-lock.json."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt2onnx.errors import OutputError

from ..exporter.files.atomic import replacing
from ..models import user_cache

_LOCKED, _LOCK = Path(__file__).parent / "npm", "package-lock.json"
_TRANSFORMERS, _RUNTIME = "@huggingface/transformers", "onnxruntime-web"
# ONNX Runtime by device, a module and its WebAssembly; a browser fetches one of them.
RUNTIMES = {"wasm": "ort-wasm-simd-threaded", "webgpu": "ort-wasm-simd-threaded.asyncify"}
_FILES = {
    _TRANSFORMERS: ["transformers.min.js"],
    _RUNTIME: [f"{name}.{end}" for name in RUNTIMES.values() for end in ("mjs", "wasm")],
}
# Packages whose code is in these files. Those of ONNX Runtime come without the text of their licence.
_LICENSED = [_TRANSFORMERS, "@huggingface/jinja", "@huggingface/tokenizers", _RUNTIME, "onnxruntime-common"]


def put(target: Path, node_modules: Path | None = None) -> None:
    """Copies the packages' files and licences.

    Args:
        node_modules: where npm has installed the packages; None to let it do so, once, into the user's cache.

    Raises:
        OutputError: npm is missing or fails, or the folder lacks a package or has another version.
    """
    if node_modules is not None:
        _collect(node_modules, target)
        return
    digest = hashlib.sha256((_LOCKED / _LOCK).read_bytes()).hexdigest()[:12]
    kept = user_cache.made() / f"web-{digest}"
    if not kept.is_dir():
        with TemporaryDirectory() as folder, replacing(kept, lambda: None) as new:
            shutil.copytree(_LOCKED, folder, dirs_exist_ok=True)
            _install(Path(folder))
            _collect(Path(folder) / "node_modules", new)
    shutil.copytree(kept, target, dirs_exist_ok=True)


def _install(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise OutputError("a web folder needs npm once, which isn't installed: install Node.js, or name --npm FOLDER")
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["without a word"]
        raise OutputError(f"npm can't fetch the packages ({lines[0]}): is there a network? Else name --npm FOLDER")


def _collect(node_modules: Path, target: Path) -> None:
    wanted = json.loads((_LOCKED / _LOCK).read_text("utf-8"))["packages"]
    licenses = []
    for package in _LICENSED:
        folder, version = node_modules / package, wanted[f"node_modules/{package}"]["version"]
        try:
            facts = json.loads((folder / "package.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{node_modules} lacks {package}: run npm ci with {_LOCKED / _LOCK}") from error
        if facts["version"] != version:
            raise OutputError(
                f"{folder} is version {facts['version']}, not {version}: run npm ci with {_LOCKED / _LOCK}"
            )
        own = folder / "LICENSE"
        text = (own if own.is_file() else _LOCKED / "onnxruntime.LICENSE.txt").read_text("utf-8")
        licenses.append(f"{package} {version} ({facts['license']})\n\n{text.strip()}\n")
        for name in _FILES.get(package, ()):
            # Some servers, nginx for one, don't know that .mjs is JavaScript.
            shutil.copyfile(folder / "dist" / name, target / name.replace(".mjs", ".js"))
    (target / "LICENSES.txt").write_text(f"\n{'-' * 80}\n\n".join(licenses), encoding="utf-8")
