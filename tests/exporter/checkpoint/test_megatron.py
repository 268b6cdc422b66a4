"""Megatron-LM's checkpoints: which of a folder's files, and what doesn't fit. test_other_formats.py compares logits."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import torch_files
from support.golden import FOLDER
from support.weight_files import refused

from gpt2onnx.exporter.checkpoint.arrays import StridedArray
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file

FILES = FOLDER / "other_formats"
FILE = "model_optim_rng.pt"
NAMES = ["wte.weight", "h.0.attn.c_attn.weight", "h.1.attn.c_attn.bias", "h.1.mlp.c_proj.weight", "ln_f.bias"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FILES / "megatron", tmp_path / "megatron")


def assert_same(mine: Checkpoint, whole: Checkpoint) -> None:
    for name in NAMES:
        array = whole.tensor(name)
        assert np.array_equal(mine.tensor(name)[: len(array)], array), name


def change(file: Path, edit: Callable[[Any], object]) -> None:
    """Writes a file anew, with other content."""

    def loaded(content: Any) -> Any:
        if isinstance(content, StridedArray):
            return content.read()
        return {name: loaded(value) for name, value in content.items()} if isinstance(content, dict) else content

    content = loaded(read_checkpoint_file(file, 6))
    del content["rng_state"]
    content["args"] = argparse.Namespace(**{**content.get("args", {}), "model_type": None})
    edit(content)
    torch_files.save(content, file)


def test_three_versions_are_one_network() -> None:
    whole = Checkpoint.open(str(FILES / "mlx"))  # the same network
    for part in ("megatron", "megatron_0", "megatron_1"):
        mine = Checkpoint.open(str(FILES / part))
        assert (mine.config.vocab_size, mine.config.n_head, mine.tied) == (61, 2, True)
        assert_same(mine, whole)


@pytest.mark.parametrize("place", ["iter_0000100", f"iter_0000100/mp_rank_00/{FILE}"])
def test_a_step_or_a_file(place: str, folder: Path) -> None:
    mine = Checkpoint.open(str(folder / place))
    assert mine.config.vocab_size == 64  # padded; only config.json in the folder above tells
    assert_same(mine, Checkpoint.open(str(folder)))


def test_the_step_that_is_named(folder: Path) -> None:
    later = shutil.copytree(folder / "iter_0000100", folder / "iter_0012000")
    for part in later.iterdir():
        change(part / FILE, lambda content: content["model"]["language_model"]["encoder"].update({"final_layernorm.bias": np.full(16, 7, np.float32)}))  # fmt: skip
    assert Checkpoint.open(str(folder)).tensor("ln_f.bias")[0] != 7
    (folder / "latest_checkpointed_iteration.txt").write_text("12000\n")
    assert Checkpoint.open(str(folder)).tensor("ln_f.bias")[0] == 7
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert "holds iter_0000100, iter_0012000: name the one to export" in refused(folder)


def test_names_of_newer_versions_without_settings(folder: Path) -> None:
    for part in (folder / "iter_0000100").iterdir():
        (part / FILE).rename(part / "model_rng.pt")

        def edit(content: Any) -> None:
            model = content["model"]["language_model"]
            model["encoder"] = {name.replace("layernorm", "norm"): array for name, array in model["encoder"].items()}
            del content["args"]
            content["checkpoint_version"] = 2.0

        change(part / "model_rng.pt", edit)
    mine = Checkpoint.open(str(folder), n_head=2)
    assert_same(mine, Checkpoint.open(str(FILES / "megatron")))
    assert mine.config.activation_function == "gelu_new"


def test_a_head_of_its_own(folder: Path) -> None:
    for number, part in enumerate(sorted((folder / "iter_0000100").iterdir())):
        head = {"weight": np.full((32, 16), number, np.float32)}
        change(
            part / FILE, lambda content, head=head: content["model"]["language_model"].update({"output_layer": head})
        )  # type: ignore[misc]
    mine = Checkpoint.open(str(folder))
    assert not mine.tied
    assert np.array_equal(mine.tensor("lm_head.weight")[:, 0], np.arange(61) // 32)


@pytest.mark.parametrize(("rows", "arguments", "vocabulary"), [(50304, {}, 50257), (50304, {"vocab_size": 50280}, 50280), (50312, {}, 50312)])  # fmt: skip
def test_padded_vocabularies(rows: int, arguments: dict[str, int], vocabulary: int, tmp_path: Path) -> None:
    shutil.copy(FILES / "megatron_1" / "release" / "mp_rank_00" / FILE, tmp_path)

    def edit(content: Any) -> None:
        content["model"]["language_model"]["embedding"]["word_embeddings"]["weight"] = np.zeros((rows, 16), np.float32)
        vars(content["args"]).update(arguments)

    change(tmp_path / FILE, edit)
    mine = Checkpoint.open(str(tmp_path), n_head=2)
    assert (mine.config.vocab_size, len(mine.tensor("wte.weight"))) == (vocabulary, vocabulary)


def _args(**values: object) -> Callable[[Any], object]:
    return lambda content: vars(content["args"]).update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_args(swiglu=True), "swiglu makes it no GPT-2"),
        (_args(num_attention_heads=3), "which 3 heads in 2 parts can't have"),
        (_args(tensor_model_parallel_size=4), "iter_0000100 has 2 of 4 parts: fetch or save it again"),
        (lambda content: content.update(checkpoint_version=1.5), "Megatron-LM has no checkpoint_version 1.5"),
        (lambda content: content.update(model=[]), "has no network of Megatron-LM"),
        (
            lambda content: content["model"]["language_model"]["embedding"]["word_embeddings"].update(weight=np.ones((5, 16), np.float32)),
            "the parts don't fit together at language_model.embedding.word_embeddings.weight",
        ),
        (lambda content: content["model"]["language_model"]["embedding"].pop("position_embeddings"), "lack tensor language_model.embedding.position_embeddings.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit(edit: Callable[[Any], object], message: str, folder: Path) -> None:
    change(folder / "iter_0000100" / "mp_rank_00" / FILE, edit)
    assert message in refused(folder)


@pytest.mark.parametrize("settings", [{}, {"args": {}, "parts": 0}, {"args": [], "parts": 1}])
def test_names_of_megatron_in_another_file(settings: dict[str, object], tmp_path: Path) -> None:
    state = {"language_model.embedding.word_embeddings.weight": np.ones((61, 16), np.float32)}
    torch_files.save({"model": state, **settings}, tmp_path / "mine.pt")
    assert "has Megatron-LM's names without its settings" in refused(tmp_path)


def test_parts_that_are_missing_or_of_a_pipeline(folder: Path) -> None:
    step = folder / "iter_0000100"
    (step / "mp_rank_01" / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"mp_rank_01/{FILE} is a Git LFS pointer" in refused(folder)
    (step / "mp_rank_01").rename(step / "mp_rank_00_001")
    assert "iter_0000100 is pipeline parallel (mp_rank_00_001): join the parts" in refused(folder)
    shutil.rmtree(step / "mp_rank_00_001")
    assert "iter_0000100 has 1 of 2 parts" in refused(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    assert f"{folder} has no weights" in refused(folder)
