"""The web folder: page, runtime and model as static files.

index.html …      the server's page, whose calls gpt2onnx.js answers
gpt2onnx.js       for pages of one's own, with its types in gpt2onnx.d.ts
runtime/          transformers.js and ONNX Runtime, with their licences
model/            the bundle, as far as a browser needs it
web.json          model, precision, context, and the bytes each device loads
version.js        what the service worker keeps
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from gpt2onnx.errors import BundleError, MissingExtraError, OutputError

from ..exporter.files.atomic import replacing
from ..models import bundle
from ..models.bundle import Bundle
from ..models.config import read_json
from ..models.precision import memory
from . import packages

_FACTS = "web.json"
_STATIC = Path(__file__).parent / "static"
_PAGE = Path(__file__).parents[1] / "serving" / "page"
_MODEL = (bundle.CONFIG, bundle.GENERATION_CONFIG, bundle.TOKENIZER, bundle.TOKENIZER_CONFIG, bundle.WEIGHTS)
_UNPACKED = "onnx/unpacked.onnx"
_LARGEST = 3_000_000_000  # bytes of weights in float32: WebAssembly has 4 GB, and unpacks into them


def write(made: Bundle, target: Path, *, npm: Path | None = None, force: bool = False) -> dict[str, int]:
    """Writes a bundle as a web folder.

    Args:
        made: the bundle, with a tokenizer. In int8, int4 or fp16 its weights stay as small as they are, and are unpacked to
            float32 in the browser; in fp32 its greedy tokens are those of the runtime in Python.
        target: the folder. It must not exist, unless `force` is given and it is a web folder.
        npm: a node_modules with the packages; None to let npm fetch them into the user's cache, once.

    Returns:
        Size in bytes of each file but web.json and version.js, by its path.

    Raises:
        BundleError: the bundle has no tokenizer, or is too large for a browser.
        OutputError: the target exists or can't be written, or npm can't fetch the packages.
        MissingExtraError: weights have to be unpacked, and the extra `export` isn't installed.
    """
    floats = memory(made.config, "fp32").weights
    if bundle.TOKENIZER not in made.manifest.files:
        raise BundleError(f"{made.folder} has no tokenizer, which a page needs: export a checkpoint that has one")
    if floats > _LARGEST:
        raise BundleError(
            f"{made.folder} takes {floats / 1e9:.1f} GB in a browser, which has {_LARGEST / 1e9:.0f}: take a smaller model"
        )
    _check_target(target, force=force)
    with replacing(target, lambda: _check_target(target, force=force)) as folder:
        for source in (_PAGE, _STATIC):  # the second has the browser's client.js
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        shell = sorted(path.name for path in folder.iterdir() if path.suffix in (".html", ".css", ".js"))
        (folder / "runtime").mkdir()
        packages.put(folder / "runtime", npm)
        for name in filter(made.manifest.files.__contains__, _MODEL):
            place = folder / "model" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made.folder / name, place)
        graphs = _write_graphs(made, folder / "model")
        records = bundle.describe_files(folder)
        sizes = {name: record.size for name, record in records.items()}
        facts = {
            "id": Path(made.manifest.source).name,
            "dtype": made.manifest.dtype,
            "context_length": made.config.n_positions,
            "float_bytes": floats,
            "devices": {device: _device(device, graph, sizes) for device, graph in graphs.items()},
        }
        (folder / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        _write_version(folder, [*shell, _FACTS], [facts, {name: record.sha256 for name, record in records.items()}])
    return sizes


def _write_graphs(made: Bundle, folder: Path) -> dict[str, str]:
    """Writes the graphs that compute in float32; returns their names by device."""
    source, dtype = made.checked_path(bundle.GRAPH), made.manifest.dtype
    if dtype != "fp16":
        shutil.copyfile(source, folder / bundle.GRAPH)
    if dtype == "fp32":
        return dict.fromkeys(("wasm", "webgpu"), Path(bundle.GRAPH).stem)
    try:
        import onnx

        from ..exporter.graph import unpacked
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"A web folder of {dtype}", error.name or "onnx", "export") from error
    model = unpacked.build(onnx.load(source, load_external_data=False))
    (folder / _UNPACKED).write_bytes(model.SerializeToString())
    config = read_json(folder / bundle.CONFIG)
    config["transformers.js_config"].pop("kv_cache_dtype", None)
    (folder / bundle.CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    # WebGPU has a kernel for quantised weights, and may lack float16.
    gpu = _UNPACKED if dtype == "fp16" else bundle.GRAPH
    return {"wasm": Path(_UNPACKED).stem, "webgpu": Path(gpu).stem}


def _device(device: str, graph: str, sizes: dict[str, int]) -> dict[str, str | int]:
    """What a browser loads for a device: names, and bytes of all files that it fetches for the model."""
    runtime = packages.RUNTIMES[device]
    needed = sizes[f"runtime/{runtime}.wasm"] + sizes[f"model/onnx/{graph}.onnx"]
    needed += sum(size for name, size in sizes.items() if name.startswith("model/") and not name.endswith(".onnx"))
    return {"runtime": runtime, "graph": graph, "bytes": needed}


def _write_version(folder: Path, shell: list[str], content: list[object]) -> None:
    """What browsers compare at each visit: any other byte in the folder, all of which `content` tells of, changes it."""
    version = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    text = f"self.VERSION = {json.dumps(version)};\nself.SHELL = {json.dumps(shell)};\n"
    (folder / "version.js").write_text(text, encoding="utf-8")


def _check_target(folder: Path, *, force: bool) -> None:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / _FACTS).is_file() or not (folder / "version.js").is_file():
        raise OutputError(f"{folder} exists and is not a web folder: choose another target")
    if not force:
        raise OutputError(f"{folder} already holds a web folder: choose another target, or replace it with --force")
