"""The web folder on the disk: what is in it, and what is said where it can't be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.paths import REPOSITORY

import gpt2onnx
from gpt2onnx.models import bundle

LOCK = REPOSITORY / "web" / "npm" / "package-lock.json"
RUNTIME = [f"ort-wasm-simd-threaded{kind}" for kind in (".mjs", ".wasm", ".asyncify.mjs", ".asyncify.wasm")]
LARGEST_GROWTH = 1e6  # bytes that the wheel may grow by


@pytest.fixture
def node_modules(tmp_path: Path) -> Path:
    """Packages of the locked versions, whose code is a word each."""
    for place, facts in locked().items():
        folder = tmp_path / place
        (folder / "dist").mkdir(parents=True)
        name = place.removeprefix("node_modules/")
        (folder / "package.json").write_text(json.dumps({"version": facts["version"], "license": facts["license"]}))
        (folder / "LICENSE").write_text(f"You may use {name}.")
        for file in ("transformers.min.js", *RUNTIME):
            (folder / "dist" / file).write_text("code")
    return tmp_path / "node_modules"


def locked() -> dict[str, Any]:
    """The packages that are fetched, by their places."""
    packages = json.loads(LOCK.read_text())["packages"]
    return {place: facts for place, facts in packages.items() if "integrity" in facts}


def test_packages_are_locked_by_their_hashes_and_named_by_no_host() -> None:
    assert {"node_modules/@huggingface/transformers", "node_modules/onnxruntime-web"} <= locked().keys()
    assert all(facts["integrity"].startswith("sha512-") for facts in locked().values())
    assert "://" not in LOCK.read_text()
    assert sum(path.stat().st_size for path in (REPOSITORY / "web").rglob("*.*")) < LARGEST_GROWTH


def test_a_source_comes_in_int8_with_licences_and_the_size_of_each_file(
    command_line: CommandLine, make_checkpoint: MakeCheckpoint, node_modules: Path, tmp_path: Path
) -> None:
    finished = command_line("web", make_checkpoint(), tmp_path / "site", "--npm", node_modules, "--json")
    assert finished.code == 0, finished.err
    sizes = json.loads(finished.out)["files"]
    facts = json.loads((tmp_path / "site" / "web.json").read_text())
    assert facts["dtype"] == "int8"
    assert {device: each["graph"] for device, each in facts["devices"].items()} == {
        "wasm": "unpacked",
        "webgpu": "model",
    }
    for name, size in sizes.items():
        assert (tmp_path / "site" / name).stat().st_size == size
    licenses = (tmp_path / "site" / "runtime" / "LICENSES.txt").read_text()
    for name in ("@huggingface/transformers", "@huggingface/jinja", "@huggingface/tokenizers", "onnxruntime-web"):
        assert f"You may use {name}." in licenses


def test_only_another_web_folder_is_replaced_and_its_version_tells_other_content(
    command_line: CommandLine, tales_bundle: Path, tales_int8_bundle: Path, node_modules: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"

    def write(model: Path, *options: str) -> str:
        finished = command_line("web", model, site, "--npm", node_modules, "-q", *options)
        return finished.err if finished.code else (site / "version.js").read_text()

    first = write(tales_bundle)
    assert write(tales_bundle) == (
        f"gpt2onnx: {site} already holds a web folder: choose another target, or replace it with --force\n"
    )
    assert write(tales_bundle, "--force") == first
    assert write(tales_int8_bundle, "--force") != first
    (site / "web.json").unlink()
    assert write(tales_bundle, "--force") == (
        f"gpt2onnx: {site} exists and is not a web folder: choose another target\n"
    )


def test_what_is_missing_is_said_in_a_line(
    command_line: CommandLine,
    make_checkpoint: MakeCheckpoint,
    tales_bundle: Path,
    node_modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(model: Path, *options: object) -> str:
        finished = command_line("web", model, tmp_path / "site", *options)
        assert finished.code == 1
        assert not (tmp_path / "site").exists()
        return finished.err.removeprefix("gpt2onnx: ").rstrip("\n")

    (node_modules / "onnxruntime-web" / "package.json").write_text('{"version": "1.0.0", "license": "MIT"}')
    assert f"{node_modules / 'onnxruntime-web'} is version 1.0.0, not 1." in error(tales_bundle, "--npm", node_modules)
    (node_modules / "onnxruntime-web" / "package.json").unlink()
    assert f"{node_modules} lacks onnxruntime-web: run npm ci" in error(tales_bundle, "--npm", node_modules)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    assert error(tales_bundle) == (
        "a web folder needs npm once, which isn't installed: install Node.js, or name --npm FOLDER"
    )
    checkpoint = make_checkpoint()
    for name in (bundle.TOKENIZER, bundle.TOKENIZER_CONFIG):
        (checkpoint / name).unlink(missing_ok=True)
    silent = gpt2onnx.export(checkpoint, tmp_path / "silent").folder
    assert error(silent) == f"{silent} has no tokenizer, which a page needs: export a checkpoint that has one"
