"""What the runtime does without: PyTorch and transformers always, the exporter's packages where a bundle is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import CommandLine
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run
from support.paths import REPOSITORY

import gpt2onnx
from gpt2onnx.errors import install_command


def modules_after(code: str) -> set[str]:
    """Top-level packages that are imported once the code has run."""
    status, out, err = run(f"before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))")
    assert (status, err) == (0, "")
    return {name.partition(".")[0] for name in out.split()}


def test_importing_the_package_costs_nothing() -> None:
    imported = modules_after("import gpt2onnx")
    assert imported & {"numpy", "onnxruntime", "tokenizers", "tqdm", "click"} == set()
    assert imported >= {"gpt2onnx"}


def test_the_runtime_imports_only_what_generating_needs(tales_bundle: Path) -> None:
    imported = modules_after(
        f"import gpt2onnx; gpt2onnx.load({str(tales_bundle)!r}).generate('Once', max_new_tokens=2)"
    )
    assert {"numpy", "onnxruntime", "tokenizers"} <= imported
    assert imported & {*REFERENCES, *EXPORT_ONLY, "tqdm", "click", "codecarbon", "pandas", "psutil"} == set()
    assert "tqdm" not in modules_after("import gpt2onnx.runtime.model")


def test_generates_without_pytorch_transformers_and_onnx(tales_bundle: Path, tales_model: gpt2onnx.Model) -> None:
    code = (
        "import gpt2onnx\n"
        "model = gpt2onnx.load(sys.argv[1], threads=1)\n"
        "result = model.generate('Once upon a time', max_new_tokens=20, do_sample=True, top_p=0.9, seed=5)\n"
        "print(result.sequences[0].token_ids)"
    )
    status, out, err = run(code, tales_bundle, without=(*REFERENCES, *EXPORT_ONLY, "tqdm", "click"))
    assert (status, err) == (0, "")
    expected = tales_model.generate("Once upon a time", max_new_tokens=20, do_sample=True, top_p=0.9, seed=5)
    assert out == f"{expected.sequences[0].token_ids}\n"


def test_a_source_needs_the_extra_export(tmp_path: Path) -> None:
    export, generate = ["export", "tales", tmp_path / "bundle"], ["generate", "x", "-m", "tales"]
    for package, command in (("onnx", export), ("safetensors", generate)):
        status, out, err = run(COMMAND_LINE, *command, without=(package,), GPT2ONNX_CACHE=str(tmp_path / "cache"))
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert f"needs the package {package}: {install_command('export')}" in err
    assert not list(tmp_path.iterdir())


def test_a_cached_export_needs_no_extra(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "x", "-m", "tales", "--max-new-tokens", 3]
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    first = command_line(*command)
    assert (first.code, first.err) == (0, "")
    assert run(COMMAND_LINE, *command, without=REFERENCES + EXPORT_ONLY) == (0, first.out, "")


def test_generating_needs_the_extra_cpu(tales_bundle: Path) -> None:
    status, out, err = run(COMMAND_LINE, "generate", "x", "-m", tales_bundle, without=("onnxruntime",))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert f"needs the package onnxruntime: {install_command('cpu')}" in err


def test_the_hub_needs_its_package(tmp_path: Path) -> None:
    status, out, err = run(COMMAND_LINE, "export", "gpt2", tmp_path / "bundle", without=("huggingface_hub",))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert install_command("export") in err


def test_in_a_clone_the_folders_beside_are_found() -> None:
    """Python looks into the current folder first, where `gpt2onnx` holds the front door alone."""
    clone = REPOSITORY
    code = "import gpt2onnx.exporter, gpt2onnx.runtime; print(*gpt2onnx.runtime.__path__)"
    # -S: without what an editable installation adds.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=clone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(clone / "runtime")), done.stderr


def test_onnxruntime_reports_to_nobody_unless_it_is_let() -> None:
    code = "import os, gpt2onnx.runtime.ort.providers; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("place", "facts", "command"),
    [
        ("clone", {"dir_info": {}}, "pip install '{place}[serve]'"),
        ("clone", {"dir_info": {"editable": True}}, "pip install -e '{place}[serve]'"),
        ("a b.whl", {"archive_info": {}}, "pip install '{place}[serve]'"),
        ("gone", {"dir_info": {}}, "pip install 'gpt2onnx[serve]'"),
        (None, {}, "pip install 'gpt2onnx[serve]'"),  # from an index, or from a package of the system's
    ],
)
def test_a_missing_extra_comes_from_where_the_package_came_from(
    place: str | None, facts: dict[str, object], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clone").mkdir()
    (tmp_path / "a b.whl").touch()
    installed = tmp_path / "site" / "gpt2onnx-0.1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt2onnx\nVersion: 0.1.0\n")
    if place is not None:
        url = (tmp_path / place).as_uri()
        (installed / "direct_url.json").write_text(json.dumps({"url": url} | facts))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert install_command("serve") == command.format(place=tmp_path / (place or ""))
