"""The parity report: it passes what is right, and fails what isn't."""

import json
import shutil
from pathlib import Path

import numpy as np
from conftest import CommandLine, MakeCheckpoint
from safetensors.numpy import load_file, save_file

import gpt2onnx
from gpt2onnx.exporter.checkpoint import Checkpoint
from gpt2onnx.exporter.parity import check


def test_fp32_bundle_of_tales_passes(tales_bundle: Path) -> None:
    report = check(tales_bundle, Checkpoint.open("tales"))
    assert report["passed"], json.dumps(report, indent=2)
    assert report["whole"]["max_abs"] < 1e-4
    assert report["tokens"]["equal"] == report["tokens"]["cases"] > 20


def test_int8_bundle_of_tales_passes(tales_int8_bundle: Path) -> None:
    report = check(tales_int8_bundle, Checkpoint.open("tales"))
    assert report["passed"], json.dumps(report, indent=2)
    assert report["whole"]["max_abs"] > 1e-4, "int8 can't be this close: is it what was compared?"


def test_changed_weight_is_found(make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine) -> None:
    folder = make_checkpoint()
    gpt2onnx.export(folder, tmp_path / "bundle")
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.bias"][::2] += np.float32(0.5)
    save_file(weights, changed / "model.safetensors", {"format": "pt"})

    right = command_line("parity", tmp_path / "bundle", folder, "--json")
    assert right.code == 0, right.out + right.err
    wrong = command_line("parity", tmp_path / "bundle", changed, "--json")
    assert wrong.code == 1
    report = json.loads(wrong.out)
    assert not report["whole"]["passed"]
    assert report["tokens"]["equal"] < report["tokens"]["cases"]
    assert report["tokens"]["first_difference"]["position"] >= 0


def test_export_puts_the_report_into_the_manifest(tmp_path: Path, command_line: CommandLine) -> None:
    """By default where PyTorch is installed, as it is here."""
    done = command_line("export", "tales", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    parity = json.loads(done.out)["parity"]
    assert parity["passed"]
    assert parity["tokens"]["equal"] == parity["tokens"]["cases"] > 0
    assert json.loads(command_line("verify", tmp_path / "bundle", "--json").out)["parity"] is True
