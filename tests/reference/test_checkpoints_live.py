"""What stands in for PyTorch in tests of checkpoints: its files as it writes them now, and files written without it.

How they are read, and what their networks compute: tests/exporter/checkpoint/test_checkpoints.py.
"""

import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import make_torch_files
from safetensors.torch import load_file, save_model
from support import torch_files
from support.checkpoints import MakeCheckpoint
from support.weight_files import assert_reads
from transformers import GPT2LMHeadModel

from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(make_checkpoint: MakeCheckpoint) -> State:
    return load_file(make_checkpoint() / "model.safetensors")


def arrays_in(content: Any) -> dict[str, np.ndarray]:
    """All arrays of a file, by the keys that lead to them."""
    if hasattr(content, "read"):
        return {"": content.read()}
    if not isinstance(content, dict):
        return {}
    return {f"{key}/{name}": array for key in content for name, array in arrays_in(content[key]).items()}


def test_committed_files_are_those_that_the_script_makes(tmp_path: Path) -> None:
    make_torch_files.make(tmp_path)
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(make_torch_files.FOLDER) for path in make_torch_files.FOLDER.rglob("*") if path.is_file()}
    assert names == {name for name in kept if name.suffix != ".json" or "index" in name.name}
    for name in sorted(names):
        if name.suffix == ".json" or name.name == "module.pt":
            continue
        found, stored = (arrays_in(read_checkpoint_file(each / name)) for each in (tmp_path, make_torch_files.FOLDER))
        assert found.keys() == stored.keys()
        assert found, name
        for key, array in found.items():
            assert array.dtype == stored[key].dtype
            # AdamW's first step is 1e-4 up or down, even where a gradient is rounding alone.
            assert np.allclose(array.astype(np.float32), stored[key].astype(np.float32), 1e-5, 3e-4), (name, key)
    with pytest.raises(CheckpointError, match=r"refused: torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint_file(tmp_path / "module.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_reads_files_that_are_written_without_it(zipped: bool, state: State, tmp_path: Path) -> None:
    path = tmp_path / "ours.pt"
    whole = np.arange(600, dtype=np.float32).reshape(20, 30)
    arrays = {
        "whole": whole, "transposed": whole.T, "window": whole[3:17:2, 5:25:3], "number": np.array(2.5),
        "empty": np.zeros((0, 3), np.float16), "whole numbers": np.arange(9), "bytes": np.arange(9, dtype=np.uint8),
    }  # fmt: skip
    arrays |= {name: tensor.numpy() for name, tensor in state.items()}
    if zipped:
        arrays["a newer type"] = np.arange(9, dtype=np.uint16)
    others = {"step": 3, "milestones": Counter([10, 20]), "bytes": bytearray(b"x"), "number": 1j}
    torch_files.save({"weights": arrays} | others, path, zipped=zipped)
    found = torch.load(path, weights_only=True)
    assert {name: found[name] for name in others} == others
    assert found["weights"].keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = found["weights"][name]
        assert tensor.numpy().dtype == array.dtype
        assert tensor.stride() == tuple(stride // array.itemsize for stride in array.strides)
        assert np.array_equal(tensor.numpy(), array), name


def test_pickles_written_without_pytorch_are_its_own_byte_for_byte(state: State, tmp_path: Path) -> None:
    for name, save, content in (
        ("theirs", torch.save, state),
        ("ours", torch_files.save, {name: tensor.numpy() for name, tensor in state.items()}),
    ):
        (tmp_path / name).mkdir()
        save(content, tmp_path / name / "model.pt")
    ours, theirs = (zipfile.ZipFile(tmp_path / name / "model.pt") for name in ("ours", "theirs"))
    with ours, theirs:
        assert ours.read("model/data.pkl") == theirs.read("model/data.pkl")


def test_a_tied_pair_that_save_model_stores_once(make_checkpoint: MakeCheckpoint, state: State, tmp_path: Path) -> None:
    source = make_checkpoint()
    save_model(GPT2LMHeadModel.from_pretrained(source), tmp_path / "model.safetensors")
    assert "transformer.wte.weight" not in load_file(tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    opened = Checkpoint.open(str(tmp_path))
    assert opened.tied
    assert_reads(opened, {name: tensor.numpy() for name, tensor in state.items()})
