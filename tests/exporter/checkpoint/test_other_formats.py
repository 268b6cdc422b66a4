"""One small network as other programs save it: the exported graph gives the logits that each program itself gave.

golden/make_other_formats.py and make_torch_formats.py had the programs write the files.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from support import torch_files
from support.commands import CommandLine
from support.golden import FOLDER
from support.graphs import logits_of_prompt
from support.paths import DOCS
from support.weight_files import refused

import gpt2onnx
from gpt2onnx.errors import CheckpointError, install_command
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file

FILES = FOLDER / "other_formats"
TOKENS = [3, 60, 0, 17, 17, 42]
# What a user names, from the part's folder on.
SOURCES = {
    "llm_c": "gpt2.bin",
    "llm_c_bf16": "gpt2.bin",
    "mingpt_2020": "model.pt",
    "mingpt_2022": "model.pt",
    "mlx": "",
    "mlx_3bit": "",
    "mlx_4bit": "",
    "mlx_8bit": "",
    "onnx": "",
    "onnx_untied": "",
    "h5": "",
    "flax": "",
    "keras": "model.weights.h5",
    "keras_preset": "",
    "fsdp": "",
    "fsdp_whole": "",
    "rust": "",
    "torchscript": "model.pt",
    "megatron": "",
    "megatron_0": "",
    "megatron_1": "",
    "gptq": "",
    "gptq_2bit": "",
    "gptq_3bit": "",
    "gptq_8bit": "",
}


# Those that don't tell the number of attention heads.
WITHOUT_HEADS = {"mingpt_2020", "mingpt_2022"}


@pytest.mark.parametrize("part", SOURCES)
def test_logits(part: str, tmp_path: Path) -> None:
    shutil.copytree(FILES / part, tmp_path / part)
    heads = 2 if part in WITHOUT_HEADS else None
    bundle = gpt2onnx.export(tmp_path / part / SOURCES[part], tmp_path / "bundle", n_head=heads)
    expected = np.load(FILES / part / "logits.npy")
    difference = np.abs(logits_of_prompt(bundle, np.array([TOKENS]))[0] - expected).max()
    print(f"{part}: {difference:.1e}")
    assert difference < 1e-5 * np.abs(expected).max()
    assert np.abs(expected).max() > 1


def test_docs_name_the_versions() -> None:
    table = (DOCS / "export.md").read_text(encoding="utf-8")
    made_with = json.loads((FILES / "made_with.json").read_text())
    assert made_with.keys() == SOURCES.keys()
    for part, versions in made_with.items():
        for name, version in versions.items():
            assert re.search(rf"{re.escape(name)} [^,|]*{re.escape(version)}", table), (part, name, version)


# llm.c


def test_llm_c_knows_its_other_files(tmp_path: Path) -> None:
    content = (FILES / "llm_c" / "gpt2.bin").read_bytes()
    path = tmp_path / "gpt2.bin"

    def changed(place: int, number: int) -> str:
        path.write_bytes(content[: 4 * place] + number.to_bytes(4, "little") + content[4 * place + 4 :])
        return refused(path)

    assert "is llm.c's tokenizer: name the file with the weights" in changed(0, 20240328)
    assert "has version 1 of llm.c's format, not 3 or 5" in changed(1, 1)
    assert f"has {len(content):,} bytes, not" in changed(4, 1)
    path.write_bytes(content[:-1])
    assert f"has {len(content) - 1:,} bytes, not {len(content):,}" in refused(path)


# minGPT


@pytest.mark.parametrize("part", ["mingpt_2020", "mingpt_2022"])
@pytest.mark.parametrize("model", [{"n_head": 4, "model_type": None}, {"n_head": None, "model_type": "gpt-micro"}])
def test_mingpt_tells_its_heads_in_config_json(part: str, model: dict[str, object], tmp_path: Path) -> None:
    shutil.copytree(FILES / part, tmp_path, dirs_exist_ok=True)
    assert "the number of attention heads can't be read off the weights" in refused(tmp_path)
    # As projects/chargpt writes it.
    config = {"system": {"seed": 3407}, "data": {"block_size": 8}, "model": model, "trainer": {"num_workers": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(str(tmp_path)).config.n_head == 4


def test_mingpt_beside_settings_that_are_a_text(tmp_path: Path) -> None:
    stored = read_checkpoint_file(FILES / "mingpt_2020" / "model.pt")
    state = {name: array.read() for name, array in stored.items()}
    torch_files.save({"model": state, "config": "gpt-mini"}, tmp_path / "mine.pt")
    assert Checkpoint.open(str(tmp_path), n_head=2).config.n_head == 2
    assert "the number of attention heads can't be read off the weights" in refused(tmp_path)


# MLX, and other quantised weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "doesn't fit its scales [96, 1] and 3 bits"),
        ({"mode": "mxfp4", "bits": None}, "is quantised in a way that can't be read (bits None, mode 'mxfp4')"),
    ],
)
def test_mlx_quantised_otherwise(change: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / "mlx_4bit", tmp_path / "mlx")
    config = json.loads((folder / "config.json").read_text())
    own = {"model.h.0.attn.c_attn": config["quantization"] | change}
    (folder / "config.json").write_text(json.dumps(config | {"quantization": config["quantization"] | own}))
    assert message in refused(folder)


GPTQ, GPTQ_FILE, GPTQ_BITS = ["gptq", "gptq_2bit", "gptq_3bit", "gptq_8bit"], "gptq_model-4bit-16g.safetensors", 4


@pytest.mark.parametrize("part", GPTQ)
def test_the_matrices_of_gptq(part: str) -> None:
    """AutoGPTQ's own, to the last bit."""
    matrix = Checkpoint.open(str(FILES / part)).tensor("h.1.attn.c_attn.weight")
    assert np.array_equal(matrix, np.load(FILES / part / "c_attn.npy"))


def test_gptq_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    bundle = gpt2onnx.export(FILES / "gptq", tmp_path / "bundle")
    assert "GPTQ rounded the weights to 4 bits" in caplog.text
    # Others would take the bundle's weights for packed ones.
    assert "quantization_config" not in json.loads((bundle.folder / "config.json").read_text())


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("with_zeros_of_0", [False, True])
def test_the_second_format_of_gptq(with_zeros_of_0: bool, place: str, tmp_path: Path) -> None:
    """It stores zeros as they are. GPTQModel makes the first format of it: 1 less in each number of a word, which may borrow."""
    first, second = (shutil.copytree(FILES / "gptq", tmp_path / name) for name in ("first", "second"))
    arrays = load_file(FILES / "gptq" / GPTQ_FILE)
    ones = np.uint32(sum(1 << GPTQ_BITS * number for number in range(32 // GPTQ_BITS)))
    for name in [name for name in arrays if name.endswith("qzeros")]:
        zeros = arrays[name].view(np.uint32) + ones
        if with_zeros_of_0:
            zeros &= np.uint32(0xFFF0FF00)
        arrays[name] = zeros.view(np.int32)
    save_file(arrays, second / GPTQ_FILE)
    first_arrays = {name: (array.view(np.uint32) - ones).view(np.int32) if name.endswith("qzeros") else array for name, array in arrays.items()}  # fmt: skip
    save_file(first_arrays, first / GPTQ_FILE)
    config = json.loads((second / "config.json").read_text())
    settings = config.pop("quantization_config") | {"checkpoint_format": "gptq_v2"}
    (second / "quantize_config.json").unlink()
    (second / "config.json").write_text(json.dumps(config))
    told = config | {"quantization_config": settings} if place == "config.json" else settings
    (second / place).write_text(json.dumps(told))
    opened = [Checkpoint.open(str(folder)).tensor("h.1.mlp.c_fc.weight") for folder in (first, second)]
    assert np.array_equal(*opened)
    unchanged = Checkpoint.open(str(FILES / "gptq")).tensor("h.1.mlp.c_fc.weight")
    assert np.array_equal(opened[0], unchanged) != with_zeros_of_0


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", None, "transformer.h.0.attn.c_attn.qweight has no g_idx, so AWQ quantised it"),
        ("qzeros", None, "tensor transformer.h.0.attn.c_attn.qweight lacks its zeros or scales"),
        ("scales", lambda array: array[:1], "doesn't fit its zeros [2, 12], scales [1, 96] and groups [32]"),
        ("g_idx", lambda array: array[:24], "doesn't fit its zeros [2, 12], scales [2, 96] and groups [24]"),
        ("g_idx", lambda array: array + 2, "names a group that isn't there"),
    ],
)
def test_gptq_that_does_not_fit(part: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / "gptq", tmp_path / "gptq")
    arrays, name = load_file(folder / GPTQ_FILE), f"transformer.h.0.attn.c_attn.{part}"
    old = arrays.pop(name)
    save_file(arrays if change is None else arrays | {name: change(old).copy()}, folder / GPTQ_FILE)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(folder)).tensor("h.0.attn.c_attn.weight")
    assert message in str(caught.value)


# ONNX


def test_the_head_of_an_onnx_graph() -> None:
    assert Checkpoint.open(str(FILES / "onnx")).tied
    assert not Checkpoint.open(str(FILES / "onnx_untied")).tied


def test_an_onnx_graph_as_transformers_js_has_it(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    graph = onnx.load(FILES / "onnx" / "model.onnx")
    path = tmp_path / "onnx" / "decoder_model_merged.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="merged.onnx_data", size_threshold=0)
    shutil.copy(FILES / "onnx" / "config.json", tmp_path)
    mine, whole = Checkpoint.open(str(tmp_path)), Checkpoint.open(str(FILES / "onnx"))
    for name in ("wte.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias"):
        assert np.array_equal(mine.tensor(name), whole.tensor(name))
    (tmp_path / "onnx" / "merged.onnx_data").write_bytes(b"short")
    assert "merged.onnx_data is truncated" in refused(tmp_path)
    onnx.save(graph, path)
    path.write_bytes(path.read_bytes().replace(b"transformer.wte.weight", b"transformer._quantized"))
    assert "the weights are quantised, as transformer._quantized shows" in refused(tmp_path)


@pytest.mark.parametrize("kept", [("offset",), ("length",), ()], ids=str)
def test_data_of_an_onnx_graph_without_its_offset_or_length(kept: tuple[str, ...], tmp_path: Path) -> None:
    """Both are optional in ONNX: from the file's beginning, and as much as the shape needs."""
    graph = onnx.load(FILES / "onnx" / "model.onnx")
    for initializer in graph.graph.initializer:
        onnx.external_data_helper.set_external_data(initializer, f"{initializer.name}.data")
    for tensor in onnx.external_data_helper._get_initializer_tensors(graph):
        onnx.external_data_helper.save_external_data(tensor, str(tmp_path))
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert facts["offset"] == "0"
        del tensor.external_data[:]
        for name in ("location", *kept):
            tensor.external_data.add(key=name, value=facts[name])
        tensor.ClearField("raw_data")
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    shutil.copy(FILES / "onnx" / "config.json", tmp_path)
    mine, whole = Checkpoint.open(str(tmp_path)), Checkpoint.open(str(FILES / "onnx"))
    for name in ("wte.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias"):
        assert np.array_equal(mine.tensor(name), whole.tensor(name))
    (tmp_path / "transformer.wte.weight.data").write_bytes(b"short")
    assert "wte.weight.data is truncated" in refused(tmp_path)


def test_an_onnx_graph_elsewhere(tmp_path: Path) -> None:
    place = onnx.TensorProto(name="wte.weight", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    place.external_data.add(key="location", value="../../etc/passwd")
    onnx.save(onnx.ModelProto(graph=onnx.GraphProto(initializer=[place])), tmp_path / "model.onnx")
    assert "names a file outside its folder: ../../etc/passwd" in refused(tmp_path)


def test_a_bundle_is_no_checkpoint(tmp_path: Path) -> None:
    gpt2onnx.export(FILES / "onnx", tmp_path / "bundle")
    assert "is a bundle itself: export the checkpoint" in refused(tmp_path / "bundle")


# TensorFlow, Flax and Keras


@pytest.mark.parametrize(
    ("part", "file"),
    [("h5", "tf_model.h5"), ("flax", "flax_model.msgpack"), ("keras", "model.weights.h5"), ("onnx", "model.onnx")],
)
@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_files(part: str, file: str, size: int, tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / part, tmp_path / part)
    (folder / file).write_bytes((FILES / part / file).read_bytes()[:size])
    assert file in refused(folder)


def test_an_hdf5_file_that_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file["wpe/embeddings:0"] = h5py.ExternalLink(tmp_path / "other.h5", "x")
        shape = (4, 4)
        file.create_dataset("wte/embeddings:0", shape, "float32", external=[(tmp_path / "secret", 0, 4096)])
    assert "tensor wte/embeddings:0 isn't stored whole in this file" in refused(tmp_path)


def test_the_package_that_hdf5_needs(command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line("export", FILES / "h5", tmp_path / "bundle", without=("h5py",))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert install_command("formats") in done.err


def test_pytorchs_weights_come_before_others(tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / "h5", tmp_path / "both")
    state = {name: array + 1 for name, array in load_file(FILES / "mlx" / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    assert np.array_equal(Checkpoint.open(str(folder)).tensor("wte.weight"), state["model.wte.weight"])


# TorchScript and LibTorch


def write_zip(path: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, each in content.items():
            archive.writestr(name, each)


@pytest.mark.parametrize(("part", "file"), [("rust", "rust_model.ot"), ("torchscript", "model.pt")])
def test_the_program_of_torchscript_is_not_read(part: str, file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / part, tmp_path / part)
    with zipfile.ZipFile(FILES / part / file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    places = [name for name in content if "/code/" in name or name.endswith("constants.pkl")]
    assert places
    write_zip(folder / file, content | dict.fromkeys(places, b"cposix\nsystem\n(X\x04\x00\x00\x00truetR."))
    mine, whole = Checkpoint.open(str(folder / file)), Checkpoint.open(str(FILES / part / file))
    assert np.array_equal(mine.tensor("h.1.mlp.c_fc.weight"), whole.tensor("h.1.mlp.c_fc.weight"))
    pickle = next(name for name in content if name.endswith("/data.pkl"))
    write_zip(folder / file, content | {pickle: content[pickle].replace(b"torch._utils\n", b"torch._xtils\n")})
    assert "torch._xtils._rebuild_tensor_v2 is no tensor and no plain container, and might run code" in refused(
        folder / file
    )


# What several devices saved


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    return shutil.copytree(FILES / "fsdp", tmp_path / "fsdp") / "pytorch_model_fsdp_0"


def test_pieces_of_fsdp_beside_an_optimizer_s(pieces: Path) -> None:
    shutil.copytree(pieces, pieces.with_name("optimizer_0"))
    whole = Checkpoint.open(str(FILES / "fsdp"))
    assert np.array_equal(Checkpoint.open(str(pieces.parent)).tensor("wte.weight"), whole.tensor("wte.weight"))
    shutil.copytree(pieces, pieces.with_name("pytorch_model_fsdp_1"))
    assert "holds pytorch_model_fsdp_0, pytorch_model_fsdp_1: name the one to export" in refused(pieces.parent)


def test_the_hash_of_pieces_is_of_all_files(pieces: Path) -> None:
    before = Checkpoint.open(str(pieces.parent)).sha256()
    file = pieces / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert Checkpoint.open(str(pieces.parent)).sha256() != before


def test_pieces_that_are_not_whole(pieces: Path) -> None:
    index, file = pieces / ".metadata", pieces / "__1_0.distcp"
    content = index.read_bytes()
    index.write_bytes(content.replace(b"__1_0.distcp", b"../_0.distcp"))
    assert "names a file outside its folder: ../_0.distcp" in refused(pieces.parent)
    index.write_bytes(content.replace(b"_StorageInfo", b"_StorageXnfo"))
    assert "_StorageXnfo is no tensor and no plain container" in refused(pieces.parent)
    index.write_bytes(content)
    file.write_bytes(file.read_bytes()[:-100])
    assert "the pieces are truncated" in refused(pieces.parent)
    file.unlink()
    assert "__1_0.distcp is missing" in refused(pieces.parent)


# Written down as DeepSpeed's save_checkpoint does it, not by DeepSpeed itself.


@pytest.fixture
def deepspeed(tmp_path: Path) -> Path:
    state = load_file(FILES / "mlx" / "model.safetensors")
    names = {name: name.replace("model.", "transformer.", 1) for name in state}
    module = {
        names[name]: array.T.copy() if ".h." in name and array.ndim == 2 else array for name, array in state.items()
    }
    for step in (1, 2):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        content = {
            "module": {name: array + step for name, array in module.items()},
            "ds_config": {"train_batch_size": 1},
        }
        torch_files.save(content | {"optimizer": None, "global_steps": step}, folder / "mp_rank_00_model_states.pt")
        torch_files.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step1")
    shutil.copy(FILES / "mlx" / "config.json", tmp_path)
    return tmp_path


def test_deepspeed(deepspeed: Path) -> None:
    stored = load_file(FILES / "mlx" / "model.safetensors")
    opened = Checkpoint.open(str(deepspeed))
    assert np.array_equal(opened.tensor("wte.weight"), stored["model.wte.weight"] + 1)
    assert np.array_equal(opened.tensor("h.1.mlp.c_fc.weight"), stored["model.h.1.mlp.c_fc.weight"].T + 1)
    later = Checkpoint.open(str(deepspeed / "global_step2"), n_head=2)
    assert np.array_equal(later.tensor("ln_f.bias"), stored["model.ln_f.bias"] + 2)


@pytest.mark.parametrize("named", [b"x" * 5000, b"\xff" * 300, b"global\0step1", b"..", b""])
def test_a_step_of_deepspeed_that_is_none(named: bytes, deepspeed: Path) -> None:
    (deepspeed / "latest").write_bytes(named)
    assert f"{deepspeed} has no weights" in refused(deepspeed)


def test_pieces_of_deepspeed(deepspeed: Path) -> None:
    step = deepspeed / "global_step1"
    weights = step / "mp_rank_00_model_states.pt"
    shutil.copy(weights, step / "mp_rank_01_model_states.pt")
    assert f"{step} has the parts of 2 devices" in refused(deepspeed)
    (step / "mp_rank_01_model_states.pt").unlink()
    weights.rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert f"{step} has the weights in DeepSpeed's pieces: run python zero_to_fp32.py" in refused(deepspeed)
