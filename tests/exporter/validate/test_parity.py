"""The parity report where PyTorch isn't installed, and what a version of transformers can't judge: tests/reference has the rest."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine

from gpt2onnx.cli.parity import table
from gpt2onnx.errors import install_command
from gpt2onnx.exporter.validate.cases import Options, cases, why_left_out

SAMPLED_BEAMS = {"do_sample": True, "num_beams": 2}
NO_TOP_H = "transformers before 5.0 has no top_h"
FIRST_ONLY = "transformers before 5.19 applies encoder_repetition_penalty to the first sequence only"
NAN = "transformers before 5.19 makes NaN of a forbidden end token with exponential_decay_length_penalty"
UNSORTED = "transformers before 5.24 doesn't sort what beam sampling draws"


@pytest.mark.parametrize(
    ("options", "version", "reason"),
    [
        ({}, "4.57.6", None),
        ({"do_sample": True, "num_beams": 1, "top_h": None}, "4.57.6", None),
        ({"num_beams": 4}, "4.57.6", None),
        ({"top_h": 0.6}, "4.57.6", NO_TOP_H),
        ({"top_h": 0.6}, "5.0.0", None),
        ({"encoder_repetition_penalty": 1.5, "num_beams": 2}, "5.17.0", FIRST_ONLY),
        ({"encoder_repetition_penalty": 1.5, "do_sample": True, "num_return_sequences": 2}, "5.17.0", FIRST_ONLY),
        ({"encoder_repetition_penalty": 1.5}, "5.17.0", None),
        ({"encoder_repetition_penalty": 1.0, "num_beams": 2}, "5.17.0", None),
        ({"encoder_repetition_penalty": 1.5, "num_beams": 2}, "5.19.0", None),
        ({"exponential_decay_length_penalty": [5, 1.4], "min_length": 9}, "5.17.0", NAN),
        ({"exponential_decay_length_penalty": [5, 1.4], "min_new_tokens": 9}, "5.17.0", NAN),
        ({"exponential_decay_length_penalty": [5, 1.4], "min_new_tokens": 9}, "5.19.0", None),
        ({"exponential_decay_length_penalty": [5, 1.4]}, "5.17.0", None),
        (SAMPLED_BEAMS, "4.57.6", UNSORTED),
        (SAMPLED_BEAMS, "5.9.0", UNSORTED),
        (SAMPLED_BEAMS, "5.23.0", UNSORTED),
        (SAMPLED_BEAMS, "5.24.0", None),
        (SAMPLED_BEAMS, "5.24.0.dev0", None),
        (SAMPLED_BEAMS | {"top_h": 0.6}, "4.57.6", NO_TOP_H),
        (SAMPLED_BEAMS | {"top_h": 0.6}, "6.0", None),
    ],
)
def test_what_a_version_cannot_judge(options: Options, version: str, reason: str | None) -> None:
    assert why_left_out(options, version) == reason


def test_the_newest_judges_all_cases_and_older_ones_most() -> None:
    judged = {
        version: sum(why_left_out(case.options, version) is None for case in cases(50257, 1024))
        for version in ("4.57.6", "5.23.0", "5.24.0")
    }
    every = len(cases(50257, 1024))
    assert every == judged["5.24.0"] > judged["5.23.0"] > judged["4.57.6"] > every / 2


def test_without_pytorch_the_extra_is_named(
    tales_bundle: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = command_line("parity", tales_bundle, "tales")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"gpt2onnx: Checking parity with PyTorch needs the package torch: {install_command('optimum')}\n"


def test_without_pytorch_an_export_has_no_report(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = command_line("export", "tales", tmp_path / "bundle", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["parity"] is None
    assert json.loads(command_line("verify", tmp_path / "bundle", "--json").out)["parity"] is None
    asked = command_line("export", "tales", tmp_path / "other", "--parity")
    assert asked.code == 1
    assert f"needs the package torch: {install_command('optimum')}" in asked.err
    assert not (tmp_path / "other").exists()


def test_the_report_for_a_person() -> None:
    figures: dict[str, Any] = {"positions": 171, "difference": 2e-6, "allowed": 1e-5, "kl": 0.0, "top1_agreement": 1.0}
    tokens = {"cases": 30, "equal": 29, "notes": ["a note"], "left_out": {NO_TOP_H: 2, UNSORTED: 7}, "passed": False}
    tokens["first_difference"] = {"position": 3}
    report = {"precision": "fp32", "reference": "transformers 4.57.6, torch 2.13.0", "whole": figures, "tokens": tokens}
    shown = table(report).splitlines()
    assert shown[0] == "against transformers 4.57.6, torch 2.13.0"
    assert shown[2:] == [
        "  tokens              30 cases, 29 equal   FAILED",
        "  a note",
        f"  2 cases left out: {NO_TOP_H}",
        f"  7 cases left out: {UNSORTED}",
        '  first difference: {"position": 3}',
    ]
