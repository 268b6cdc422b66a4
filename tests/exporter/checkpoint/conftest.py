"""Checkpoints to save in other forms, or to spoil."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.checkpoints import MakeCheckpoint
from support.weight_files import TINY, State


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil, without weights."""
    target = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def state(checkpoint: Path) -> State:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint of the architecture that PyTorch's files have, without weights."""
    folder = make_checkpoint(**TINY)
    (folder / "model.safetensors").unlink()
    return folder
