"""The head that screens, against PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2onnx
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.graph.fused import screening as exporter
from gpt2onnx.exporter.validate.parity import check
from gpt2onnx.models.bundle import BODY_GRAPH, Bundle
from gpt2onnx.runtime.engine import head as runtime
from gpt2onnx.runtime.engine.runner import Runner

# A network this small gains nothing by more, and loses much beside other work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small(tales_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small heads are screened, too; not that of the bundle that tests share, which is made before."""
    monkeypatch.setattr(exporter, "_LARGE", 0)


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    return gpt2onnx.export("tales", tmp_path / "bundle", parity=False)


def test_same_tokens_as_transformers(made: Bundle) -> None:
    report = check(made.folder, Checkpoint.open("tales"), screens=True)
    assert report["passed"], report
    assert report["tokens"]["cases"] == report["tokens"]["equal"] > 10


def test_parity_goes_through_the_head_that_screens(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that screens wrongly is found, though it would begin later in most processes."""
    logits = runtime._Screening.logits

    def wrong(self: Any, *given: Any) -> tuple[Any, bool]:
        return -logits(self, *given)[0], True

    monkeypatch.setattr(runtime._Screening, "logits", wrong)
    report = check(made.folder, Checkpoint.open("tales"), screens=True)
    assert not report["passed"]
    assert report["tokens"]["equal"] < report["tokens"]["cases"]


def test_the_portable_graph_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("optimum")
    made = gpt2onnx.export("tales", tmp_path / "bundle", graph="portable", parity=False)
    assert BODY_GRAPH not in made.manifest.files
    assert Runner(made, screens=True)._head is None
