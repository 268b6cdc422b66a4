"""The portable graph: optimum's own export, in standard ONNX operators, in the layout of our bundles.

It runs on execution providers that lack ONNX Runtime's fused operators. It is written independently of the fused graph, which
the tests compare with it. PyTorch traces the network, which needs the whole model in memory.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path

import onnx

from gpt2onnx.errors import BackendError, MissingExtraError

from ...models import bundle
from ...models.messages import one_line
from ..checkpoint import in_pytorch
from ..checkpoint.checkpoint import Checkpoint

_TASK = "text-generation-with-past"


def write_portable_graph(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the graph and its external data into a bundle's folder.

    Raises:
        MissingExtraError: the packages of the extra `optimum` aren't installed.
        BackendError: optimum can't export the network.
    """
    try:
        from optimum.exporters.onnx import onnx_export_from_model  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtraError("The portable graph", error.name or "optimum-onnx", "optimum") from error
    model = in_pytorch.build(checkpoint)
    (folder / bundle.GRAPH).parent.mkdir()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # optimum and PyTorch's tracer print progress and warnings.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("optimum").setLevel(logging.ERROR)
            try:
                onnx_export_from_model(model, temporary, task=_TASK, do_validation=False)
            except OSError:
                raise
            except Exception as error:
                raise BackendError(f"optimum can't export {checkpoint.name}: {one_line(error)}") from error
        del model
        graph = onnx.load(Path(temporary) / "model.onnx")
        onnx.save_model(
            graph,
            folder / bundle.GRAPH,
            save_as_external_data=True,
            location=Path(bundle.WEIGHTS).name,
            size_threshold=1024,
        )
