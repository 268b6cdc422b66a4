"""Files that PyTorch writes now are read as it reads them, and its networks compute what ours do."""

import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from golden import make_torch_files
from safetensors.torch import load_file, save_file
from support import reference_models, torch_files
from support.checkpoints import MakeCheckpoint, byte_tokenizer
from support.reference_models import GPTModel, NanoGPT, randomised, save_build_nanogpt, save_nanogpt, save_plainly
from support.weight_files import assert_reads, save_shards

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.torch_file import read_checkpoint_file
from gpt2onnx.models.shapes import weight_shapes

State = dict[str, torch.Tensor]
FORMATS = pytest.mark.parametrize("zipped", [True, False])


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    target = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def state(checkpoint: Path) -> State:
    return load_file(checkpoint / "model.safetensors")


def in_numpy(state: State) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}


# Hugging Face's own layout

SAVE: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, folder: save_file(state, folder / "model.safetensors"),
    "pytorch": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "legacy pytorch": lambda state, folder: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "sharded safetensors": lambda state, folder: save_shards(save_file, state, folder, "model", "safetensors"),
    "sharded pytorch": lambda state, folder: save_shards(torch.save, state, folder, "pytorch_model", "bin"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", SAVE)
def test_every_form_and_type_is_read(form: str, dtype: torch.dtype, folder: Path, state: State) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    SAVE[form](state, folder)
    assert_reads(Checkpoint.open(str(folder)), in_numpy(state))


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize(
    "prefix",
    ["transformer.", "", "_orig_mod.transformer.", "module.transformer.", "gpt2.", "base_model.model.transformer."],
)
def test_prefixes_and_old_mask_buffers_don_t_matter(form: str, prefix: str, folder: Path, state: State) -> None:
    renamed = {name.replace("transformer.", prefix): tensor for name, tensor in state.items()}
    for layer in range(2):
        renamed[f"{prefix}h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.uint8))
        renamed[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    SAVE[form](renamed, folder)
    assert_reads(Checkpoint.open(str(folder)), in_numpy(state))


@pytest.mark.parametrize("name", ["some.bin", "some.pt", "some.pth"])
def test_one_file_is_enough_to_name(name: str, folder: Path, state: State) -> None:
    torch.save(state, folder / name)
    assert_reads(Checkpoint.open(str(folder / name)), in_numpy(state))


def test_lightning_s_prefix_and_suffix(folder: Path, state: State) -> None:
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "last.ckpt")
    assert_reads(Checkpoint.open(str(folder / "last.ckpt")), in_numpy(state))


@FORMATS
def test_views_parameters_and_shared_storages_are_read_as_pytorch_does(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    torch.save({"weights": reference_models.views(), "step": 3}, path, _use_new_zipfile_serialization=zipped)
    arrays, wanted = read_checkpoint_file(path)["weights"], torch.load(path, weights_only=True)["weights"]
    assert set(arrays) == set(wanted)
    for name, tensor in wanted.items():
        found = arrays[name].read()
        assert found.shape == arrays[name].shape == tuple(tensor.shape), name
        assert np.array_equal(found.astype(np.float32), tensor.detach().float().numpy()), name


def test_a_small_view_reads_no_more_of_a_large_storage(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save({"view": torch.zeros(4_000_000)[1000:1010], "other": torch.zeros(4_000_000)}, path)
    tracemalloc.start()
    read_checkpoint_file(path)["view"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, f"{peak} bytes for ten numbers"


@FORMATS
def test_code_in_a_checkpoint_is_refused_by_name(zipped: bool, folder: Path, state: State) -> None:
    module = torch.nn.Linear(2, 2)
    for content in (state | {"x": module}, {"model": state, "x": [module]}, module):
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"refused: torch\.nn\.modules\.linear\.Linear"):
            Checkpoint.open(str(folder))


# Other layouts


def assert_computes(opened: Checkpoint, model: torch.nn.Module) -> None:
    """transformers' GPT-2 with the checkpoint's weights gives the model's logits."""
    config = transformers.GPT2Config(**dict(opened.raw_config) | {"tie_word_embeddings": opened.tied})
    reference = transformers.GPT2LMHeadModel(config).eval()
    names = weight_shapes(opened.config, tied=opened.tied)
    weights = {
        name if name == "lm_head.weight" else f"transformer.{name}": torch.from_numpy(opened.tensor(name))
        for name in names
    }
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if opened.tied else [])
    ids = torch.arange(2 * opened.config.n_positions).reshape(2, -1) * 7 % opened.config.vocab_size
    with torch.no_grad():
        difference = (reference(ids).logits - model(ids)).abs().max().item()
    assert difference < 2e-5, f"logits differ by up to {difference}"


@pytest.mark.parametrize("save", [save_plainly, reference_models.save_beside_an_optimizer])
@pytest.mark.parametrize("bias", [False, True])
def test_the_book_s_model(save: Callable[[torch.nn.Module, Path], None], bias: bool, tmp_path: Path) -> None:
    model = randomised(GPTModel(bias=bias))
    save(model, tmp_path / "model.pth")
    (tmp_path / "config.json").write_text('{"n_heads": 4}')
    opened = Checkpoint.open(str(tmp_path / "model.pth"))
    assert not opened.tied
    assert_computes(opened, model)


def test_the_book_s_model_with_gpt2_s_weights_is_tied_and_has_gpt2_s_heads(tmp_path: Path) -> None:
    model = randomised(GPTModel(width=768, layers=1, heads=12, bias=True))
    model.out_head.weight = torch.nn.Parameter(model.tok_emb.weight.detach().clone())
    save_file(model.state_dict(), tmp_path / "gpt2-small-124M.safetensors")
    opened = Checkpoint.open(str(tmp_path))
    assert opened.tied
    assert opened.config.n_head == 12
    # Sums over 3,072 numbers: the tolerance of the small models doesn't hold.
    config = transformers.GPT2Config(**opened.raw_config)
    assert config.activation_function == "gelu_new"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(bias: bool, prefix: str, tmp_path: Path) -> None:
    model = randomised(NanoGPT(bias=bias))
    save_nanogpt(model, tmp_path / "ckpt.pt", prefix)
    opened = Checkpoint.open(str(tmp_path))
    assert opened.tied
    assert opened.config.activation_function == "gelu"
    assert_computes(opened, model)


@FORMATS
def test_build_nanogpt(zipped: bool, tmp_path: Path) -> None:
    model = reference_models.far_from_zero(randomised(NanoGPT(bias=True, approximate="tanh")))
    save_build_nanogpt(model, tmp_path / "model_00003.pt", zipped=zipped)
    opened = Checkpoint.open(str(tmp_path))
    assert opened.config.activation_function == "gelu_pytorch_tanh"
    assert_computes(opened, model)


@pytest.mark.parametrize("kind", [GPTModel, NanoGPT])
def test_other_layouts_generate_what_their_network_would(kind: type, tmp_path: Path) -> None:
    model = randomised(kind(bias=True))
    if kind is GPTModel:
        save_plainly(model, tmp_path / "model.pth")
        (tmp_path / "config.json").write_text('{"n_head": 4}')
    else:
        save_nanogpt(model, tmp_path / "model.pth")
    byte_tokenizer(70).save(str(tmp_path / "tokenizer.json"))
    bundle = gpt2onnx.export(tmp_path / "model.pth", tmp_path / "bundle")
    prompt, tokens = [3, 14, 15, 9], []
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([prompt + tokens]))[0, -1].argmax()))
    generated = gpt2onnx.load(bundle.folder, threads=1).generate(prompt, max_new_tokens=12, do_sample=False)
    assert list(generated.sequences[0].token_ids) == tokens


# The files that tests without PyTorch read


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


@FORMATS
def test_pytorch_reads_files_that_are_written_without_it(zipped: bool, state: State, tmp_path: Path) -> None:
    path = tmp_path / "ours.pt"
    whole = np.arange(600, dtype=np.float32).reshape(20, 30)
    arrays = {
        "whole": whole, "transposed": whole.T, "window": whole[3:17:2, 5:25:3], "number": np.array(2.5),
        "empty": np.zeros((0, 3), np.float16), "whole numbers": np.arange(9), "bytes": np.arange(9, dtype=np.uint8),
    }  # fmt: skip
    arrays |= {name: tensor.numpy() for name, tensor in state.items()}
    torch_files.save({"weights": arrays, "step": 3}, path, zipped=zipped)
    found = torch.load(path, weights_only=True)
    assert found["step"] == 3
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
