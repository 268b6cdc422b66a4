"""Exports that take seconds and that several files look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.quantized import few_texts, shortened_tales

import gpt2onnx
from gpt2onnx.exporter.graph.second_graph import MIN_WIDTH
from gpt2onnx.models.bundle import Bundle


@pytest.fixture(scope="session")
def short_tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the embedded model."""
    return shortened_tales(tmp_path_factory.mktemp("short") / "tales")


@pytest.fixture(scope="session")
def export_short_tales(short_tales: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Exports these blocks, or such with other weights, on few texts; with `second_graph` as if they were wide enough for one.

    The same options give the same bundle, which tests leave as it is.
    """
    made: dict[str, Bundle] = {}

    def export(source: Path = short_tales, *, second_graph: bool = False, **options: Any) -> Bundle:
        key = repr((source, second_graph, sorted(options.items())))
        if key not in made:
            with few_texts(), pytest.MonkeyPatch.context() as patch:
                # Set in either case: a test may have changed it for itself.
                patch.setattr("gpt2onnx.exporter.graph.second_graph.MIN_WIDTH", 0 if second_graph else MIN_WIDTH)
                folder = tmp_path_factory.mktemp("exported") / "bundle"
                made[key] = gpt2onnx.export(source, folder, **options)
        return made[key]

    return export
