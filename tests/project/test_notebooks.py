"""The notebooks of the documentation run from their first cell to their last, and hold what they printed."""

import itertools
import json
from pathlib import Path

import pytest
from support.paths import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.system
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Jupyter says that its messages between processes of this machine aren't encrypted.
@pytest.mark.filterwarnings("ignore")
def test_runs(path: Path, tmp_path: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.system
@pytest.mark.filterwarnings("ignore")
def test_long_work_shows_a_bar_and_short_work_none(tmp_path: Path) -> None:
    import nbclient
    import nbformat

    code = """
import time
from gpt2onnx.runtime.host.progress import or_notebook_bar
progress = or_notebook_bar(None, "Working", "things")
progress(1, 3)
time.sleep({seconds})
progress(2, 3)
"""
    for seconds, bar in ((0, False), (1.1, True)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.format(seconds=seconds))])
        nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert ("display_data" in [output.output_type for output in notebook.cells[0].outputs]) is bar


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_holds_its_outputs(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert 'gpt2onnx.load("gpt2")' in "".join(code[0]["source"])
    printed = str([cell["outputs"] for cell in code])
    assert "Warning" not in printed
    assert "stderr" not in printed
    # A reader without Jupyter would see half a bar, and a text in pieces.
    assert "widget-view" not in printed
    for cell in code:
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert ("stream", "stream") not in itertools.pairwise(kinds)


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5
