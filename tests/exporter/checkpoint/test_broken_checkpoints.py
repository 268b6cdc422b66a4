"""Broken and hostile checkpoints are refused in one line, and nothing in them is run."""

import io
import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file
from support import torch_files
from support.golden import FOLDER
from support.systems import UNREADABLE, linux
from support.weight_files import SAVE, State, book_state, refused

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file
from gpt2onnx.models.config import GPT2Config

# Made by PyTorch: golden/make_torch_files.py.
FILES = FOLDER / "torch_files"


def test_a_wrong_shape_names_the_tensor_what_was_found_and_what_was_wanted(folder: Path, state: State) -> None:
    SAVE["safetensors"](state | {"transformer.h.1.mlp.c_fc.bias": np.zeros(100, np.float32)}, folder)
    assert all(part in refused(folder) for part in ("transformer.h.1.mlp.c_fc.bias", "[100]", "[128]"))


def test_a_wrong_shape_in_the_book_s_model_is_told_in_its_own_terms(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_heads": 2}')
    state = book_state(8)
    state["trf_blocks.0.att.W_key.weight"] = np.zeros((8, 7), np.float32)
    torch_files.save(state, tmp_path / "model.pth")
    assert all(part in refused(tmp_path) for part in ("trf_blocks.0.att.W_key.weight", "[8, 7]", "[8, 8]"))
    del state["trf_blocks.0.att.W_key.weight"]
    torch_files.save(state, tmp_path / "model.pth")
    assert "lack tensor trf_blocks.0.att.W_key.weight" in refused(tmp_path)


@pytest.mark.parametrize("form", SAVE)
def test_a_missing_tensor_and_a_wrong_type_are_named(form: str, folder: Path, state: State) -> None:
    name = "transformer.h.0.ln_2.weight"
    SAVE[form]({key: value for key, value in state.items() if key != name}, folder)
    assert "h.0.ln_2.weight" in refused(folder)
    SAVE[form](state | {name: np.ones(32, np.int64)}, folder)
    message = refused(folder)
    assert name in message
    assert "int64" in message.lower().replace("i64", "int64")


def test_a_head_in_8_bits_is_named(folder: Path, state: State) -> None:
    head = state["transformer.wte.weight"].astype(ml_dtypes.float8_e4m3fn)
    SAVE["safetensors"](state | {"lm_head.weight": head}, folder)
    assert "tensor lm_head.weight holds F8_E4M3, not floating-point numbers" in refused(folder)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("form", [*SAVE, "float32.pt", "float32_legacy.pt", "nanogpt.pt"])
def test_truncated_files_are_refused(form: str, part: float, folder: Path, state: State) -> None:
    if form in SAVE:
        SAVE[form](state, folder)
    else:
        shutil.copy(FILES / form, folder / "pytorch_model.bin")
    path = max(folder.glob("*.bin"), default=None) or max(folder.glob("*.safetensors"))
    os.truncate(path, int(part * path.stat().st_size))
    assert path.name in refused(folder)


@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
def test_shards_have_to_be_there_inside_and_complete(kind: str, folder: Path, state: State) -> None:
    SAVE[f"sharded {kind}"](state, folder)
    stem, suffix = {"safetensors": ("model", "safetensors"), "pytorch": ("pytorch_model", "bin")}[kind]
    index = folder / f"{stem}.{suffix}.index.json"
    content = json.loads(index.read_text())
    shard = folder / f"{stem}-00002-of-00003.{suffix}"

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"transformer.extra": shard.name}}))
    assert all(part in refused(folder) for part in ("transformer.extra", shard.name))
    outside = folder.parent / shard.name
    shutil.copy(shard, outside)
    for name in (f"../{shard.name}", str(outside), "..", "sub/" + shard.name):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"transformer.ln_f.bias": name}}))
        assert "outside" in refused(folder)
    index.write_text(json.dumps(content))
    shard.unlink()
    assert "missing" in refused(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], "long" * 75)}))
    assert f"{'long' * 75} is missing" in refused(folder)
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        assert index.name in refused(folder)


class Hostile:
    """Unpickles to whatever a function returns, once it is run."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(zipped: bool, folder: Path, state: State) -> None:
    path, trace = folder / "pytorch_model.bin", folder / "trace"
    for hostile, name in (
        (Hostile(eval, f"open({str(trace)!r}, 'w')"), "builtins.eval"),
        (Hostile(Path.touch, trace), "builtins.getattr"),
        (Hostile(shutil.copy, folder / "config.json", trace), "shutil.copy"),
    ):
        for content in (state | {"x": hostile}, {"model": state, "x": [hostile]}, hostile):
            torch_files.save(content, path, zipped=zipped)
            message = refused(folder)
            assert "refused" in message
            assert name in message
    assert not trace.exists()


def test_a_whole_module_is_refused_by_name(folder: Path) -> None:
    shutil.copy(FILES / "module.pt", folder / "pytorch_model.bin")
    message = refused(folder)
    assert "refused" in message
    assert "torch.nn.modules.linear.Linear" in message


@pytest.mark.parametrize(
    "tensor",
    [
        (10**15, (4,), (1,)),
        (0, (10**9, 10**9), (1, 1)),
        (0, (4,), (10**12,)),
        (-4, (4,), (1,)),
        (8, (4,), (-1,)),
        (0, (4, 4), (1,)),
        (0, ("4",), (1,)),
        (0, 4, 1),
        (0.5, (4,), (1,)),
    ],
    ids=str,
)
def test_a_tensor_that_leaves_its_storage_is_refused(tensor: tuple[Any, Any, Any], folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(FILES / "float32.pt") as archive:
        storage_of = b"ctorch\nFloatStorage\n"
        assert storage_of in archive.read("float32/data.pkl")
    offset, shape, strides = tensor
    # {"wte.weight": _rebuild_tensor_v2(storage, *body)}, in the pickle machine's own words
    program = (
        b"\x80\x02}Vwte.weight\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI16\ntQ"
    )
    values = b"".join(pickle.dumps(value, protocol=0)[:-1] for value in (offset, shape, strides))
    torch_files.write_zip(path, program + values + b"I00\nNtRs.", {"0": bytes(64)})
    message = refused(folder)
    assert "tensor wte.weight is damaged" in message or "ends before tensor wte.weight" in message
    inside = b"".join(pickle.dumps(value, protocol=0)[:-1] for value in (12, (2, 2), (1, 1)))
    torch_files.write_zip(path, program + inside + b"I00\nNtRs.", {"0": bytes(64)})
    assert read_checkpoint_file(path)["wte.weight"].shape == (2, 2)


def test_files_that_are_no_checkpoints_are_told_apart(folder: Path, state: State) -> None:
    assert "no weights" in refused(folder)
    torch_files.save(state, folder / "a.pt")
    torch_files.save(state, folder / "b.pt")
    assert all(name in refused(folder) for name in ("a.pt", "b.pt"))
    path = folder / "pytorch_model.bin"
    for content, word in (
        (pickle.dumps(3), "torch.save"),
        (b"hello", "torch.save"),
        (b"", "torch.save"),
        (b"PK\x03\x04 no archive", "truncated"),
    ):
        path.write_bytes(content)
        assert word in refused(folder)
    torch_files.save([1, 2], path)
    assert "state dict" in refused(folder)
    torch_files.save({"weight": np.ones(3, np.float32)}, path)
    assert "weight" in refused(folder)
    torch_files.save(state, path)
    repacked = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(repacked) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(folder)
    assert "not a checkpoint" in refused(folder / "config.json")
    assert "no checkpoint" in refused(folder / "none")
    assert "no checkpoint" in refused(folder / ("long" * 1000))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx", "mine.gguf", "config.json",
        "model.safetensors.index.json", "model-00002-of-00003.safetensors", "model-2.index",
        "tokenizer.json", "merges.txt", "vocab.txt", "spiece.model",
    ],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_told(name: str, folder: Path, state: State) -> None:
    SAVE["sharded safetensors"](state, folder)
    if name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.onnx", "mine.gguf", "model-2.index"):
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    if name in ("merges.txt", "vocab.txt", "spiece.model"):
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as caught:
        gpt2onnx.export(folder, folder / "bundle")
    assert (
        str(caught.value)
        == f"{folder / name} is a Git LFS pointer, not the file itself: run 'git lfs pull' in {folder}"
    )


def test_a_pointer_that_nobody_needs(folder: Path, state: State) -> None:
    SAVE["sharded safetensors"](state, folder)
    assert (folder / "tokenizer.json").is_file()
    (folder / "spiece.model").write_text(POINTER)
    assert gpt2onnx.export(folder, folder / "bundle").folder.is_dir()


def test_the_data_of_an_onnx_graph_that_git_lfs_keeps(folder: Path) -> None:
    place = onnx.TensorProto(name="wte.weight", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    place.external_data.add(key="location", value="model.onnx_data")
    onnx.save(onnx.ModelProto(graph=onnx.GraphProto(initializer=[place])), folder / "model.onnx")
    (folder / "model.onnx_data").write_text(POINTER)
    assert "model.onnx_data is a Git LFS pointer" in refused(folder)


def test_a_json_file_that_is_too_large_is_not_read(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")
    config = folder / "config.json"
    config.write_bytes(config.read_bytes() + b" " * 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"config\.json has more than the 16,777,216 bytes"):
            Checkpoint.open(str(folder))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 16 * 2**20


def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't read .*config\.json: "):
        GPT2Config.from_file(tmp_path / "config.json")
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            GPT2Config.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"can't read .*config\.json: "):
        GPT2Config.from_file(tmp_path / "config.json")


@linux
def test_a_weight_file_that_cannot_be_read_is_named(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")
    opened = Checkpoint.open(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(UNREADABLE)
    with pytest.raises(CheckpointError, match=r"can't read .*model\.safetensors: "):
        opened.sha256()


def test_a_folder_that_may_not_be_listed_is_named(
    folder: Path, state: State, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system answers users other than root, who may do all."""
    save_file(state, folder / "model.safetensors")
    others = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self == folder:
            raise PermissionError(13, "Permission denied", str(self))
        return others(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    target = tmp_path_factory.mktemp("target") / "bundle"
    for ask in (lambda: gpt2onnx.export(folder, target), lambda: gpt2onnx.load(folder)):
        with pytest.raises(CheckpointError, match=r"can't read .*: you may not list this folder"):
            ask()


def test_a_file_without_its_config_says_so(tmp_path: Path, state: State) -> None:
    torch_files.save(state, tmp_path / "pytorch_model.bin")
    assert "config.json" in refused(tmp_path)
    assert "config.json" in refused(tmp_path / "pytorch_model.bin")
