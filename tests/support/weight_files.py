"""Weights in files of every form, and what reading them has to give."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

from . import torch_files

State = dict[str, np.ndarray]

# The architecture of the files in tests/golden/torch_files.
TINY: dict[str, Any] = {
    "vocab_size": 29,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "model_type": "gpt2",
}

# Hugging Face's own forms, written without PyTorch.
SAVE: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, folder: save_file(state, folder / "model.safetensors"),
    "pytorch": lambda state, folder: torch_files.save(state, folder / "pytorch_model.bin"),
    "legacy pytorch": lambda state, folder: torch_files.save(state, folder / "pytorch_model.bin", zipped=False),
    "sharded safetensors": lambda state, folder: save_shards(save_file, state, folder, "model", "safetensors"),
    "sharded pytorch": lambda state, folder: save_shards(torch_files.save, state, folder, "pytorch_model", "bin"),
}


def save_shards(
    save: Callable[[Any, Path], object], state: Mapping[str, Any], folder: Path, stem: str, suffix: str
) -> None:
    """Deals the tensors out to three files, and writes their index."""
    names = [f"{stem}-0000{number}-of-00003.{suffix}" for number in (1, 2, 3)]
    places = {name: names[index % 3] for index, name in enumerate(state)}
    for shard in names:
        save({name: tensor for name, tensor in state.items() if places[name] == shard}, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def assert_reads(opened: Checkpoint, state: State) -> None:
    """Every weight of the checkpoint is the array of that name in `state`, in float32."""
    for name, shape in weight_shapes(opened.config, tied=opened.tied).items():
        found = opened.tensor(name)
        stored = state.get(f"transformer.{name}", state.get(name))
        assert stored is not None, name
        wanted = stored.astype(np.float32)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.shape == shape == wanted.shape, name
        assert np.array_equal(found, wanted), f"{name}: largest difference {np.abs(found - wanted).max()}"


def refused(source: Path) -> str:
    """The message, one line, with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def book_state(width: int) -> State:
    """The names and shapes of one layer of GPTModel, from "Build a Large Language Model (From Scratch)"."""
    matrices = {
        "tok_emb": (29, width), "pos_emb": (8, width), "out_head": (29, width),
        "trf_blocks.0.att.W_query": (width, width), "trf_blocks.0.att.W_key": (width, width),
        "trf_blocks.0.att.W_value": (width, width), "trf_blocks.0.att.out_proj": (width, width),
        "trf_blocks.0.ff.layers.0": (4 * width, width), "trf_blocks.0.ff.layers.2": (width, 4 * width),
    }  # fmt: skip
    vectors = {
        f"{norm}.{part}": width
        for norm in ("trf_blocks.0.norm1", "trf_blocks.0.norm2", "final_norm")
        for part in ("scale", "shift")
    }
    vectors |= {
        "trf_blocks.0.att.out_proj.bias": width,
        "trf_blocks.0.ff.layers.0.bias": 4 * width,
        "trf_blocks.0.ff.layers.2.bias": width,
    }
    shapes = {f"{name}.weight": shape for name, shape in matrices.items()} | {
        name: (size,) for name, size in vectors.items()
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def nanogpt_state(vocabulary: int) -> State:
    """The names and shapes of nanoGPT's GPT, TINY but for its vocabulary, without biases."""
    shapes = weight_shapes(GPT2Config.from_dict(TINY | {"vocab_size": vocabulary}), tied=False)
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": np.zeros(
            shape[::-1] if name.startswith("h.") else shape, np.float32
        )
        for name, shape in shapes.items()
        if not name.endswith(".bias")
    }
