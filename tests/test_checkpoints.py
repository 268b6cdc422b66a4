"""Every kind of checkpoint is read as PyTorch reads it, and a broken one is refused in one line."""

import io
import json
import pickle
import shutil
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import MakeCheckpoint, byte_tokenizer, load_reference, reference_tokens
from reference_models import GPTModel, NanoGPT
from safetensors.torch import load_file, save_file

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.arrays import StridedArray
from gpt2onnx.exporter.checkpoint import Checkpoint
from gpt2onnx.exporter.pickles import read_checkpoint_file
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

State = dict[str, torch.Tensor]


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


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_reads(opened: Checkpoint, state: State) -> None:
    """Every weight of the checkpoint is the tensor of that name in `state`, in float32."""
    for name, shape in weight_shapes(opened.config, tied=opened.tied).items():
        found = opened.tensor(name)
        stored = state.get(f"transformer.{name}", state.get(name))
        assert stored is not None, name
        wanted = stored.to(torch.float32).numpy()
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


# Hugging Face's own layout

SAVE: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, folder: save_file(state, folder / "model.safetensors"),
    "pytorch": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "legacy pytorch": lambda state, folder: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "sharded safetensors": lambda state, folder: save_shards(state, folder, "model", "safetensors"),
    "sharded pytorch": lambda state, folder: save_shards(state, folder, "pytorch_model", "bin"),
}


def save_shards(state: State, folder: Path, stem: str, suffix: str) -> None:
    names = [f"{stem}-0000{number}-of-00003.{suffix}" for number in (1, 2, 3)]
    places = {name: names[index % 3] for index, name in enumerate(state)}
    for shard in names:
        part = {name: tensor for name, tensor in state.items() if places[name] == shard}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / shard)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", SAVE)
def test_every_form_and_type_is_read(form: str, dtype: torch.dtype, folder: Path, state: State) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    SAVE[form](state, folder)
    assert_reads(Checkpoint.open(str(folder)), state)


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
    assert_reads(Checkpoint.open(str(folder)), state)


def test_safetensors_come_before_pickles(folder: Path, state: State) -> None:
    SAVE["safetensors"](state, folder)
    SAVE["pytorch"]({name: tensor + 1 for name, tensor in state.items()}, folder)
    assert_reads(Checkpoint.open(str(folder)), state)


def test_an_adapter_is_no_model(folder: Path, state: State) -> None:
    SAVE["safetensors"](state, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge_and_unload" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "some.bin", "some.pt", "some.pth"])
def test_one_file_is_enough_to_name(name: str, folder: Path, state: State) -> None:
    (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
    (folder / "another.pt").write_bytes(b"not read")
    opened = Checkpoint.open(str(folder / name))
    assert opened.folder == folder
    assert_reads(opened, state)


def test_views_parameters_and_shared_storages_are_read_as_pytorch_does(tmp_path: Path) -> None:
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    saved = OrderedDict(
        whole=base,
        transposed=base.T,
        window=base[3:17:2, 5:25:3],
        row=base[7],
        repeated=base[0].expand(4, 30),
        number=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(base[1:3] * 2),
        half=(base / 7).half()[:, 4:],
        brain=(base / 7).bfloat16().T,
        whole_numbers=torch.arange(9).reshape(3, 3)[1:],
    )
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save({"weights": saved, "step": 3}, path, _use_new_zipfile_serialization=zipped)
        arrays, wanted = read_checkpoint_file(path)["weights"], torch.load(path, weights_only=True)["weights"]
        assert set(arrays) == set(wanted)
        for name, tensor in wanted.items():
            found = arrays[name].read()
            assert found.shape == arrays[name].shape == tuple(tensor.shape), name
            assert np.array_equal(found.astype(np.float32), tensor.detach().float().numpy()), (zipped, name)


def test_a_small_view_reads_no_more_of_a_large_storage(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save({"view": torch.zeros(4_000_000)[1000:1010], "other": torch.zeros(4_000_000)}, path)
    tracemalloc.start()
    read_checkpoint_file(path)["view"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, f"{peak} bytes for ten numbers"


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
def test_a_head_of_its_own_is_kept_where_transformers_keeps_it(form: str, folder: Path, state: State) -> None:
    embedding = state["transformer.wte.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + 1, False)):
        for said in (True, False):
            edit_config(folder, tie_word_embeddings=said)
            SAVE[form](state | {"lm_head.weight": head}, folder)
            opened = Checkpoint.open(str(folder))
            assert opened.tied is tied
            reference = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
            used = opened.tensor("wte.weight" if tied else "lm_head.weight")
            assert np.array_equal(used, reference.lm_head.weight.detach().numpy())


def test_a_missing_head_is_an_error_where_the_config_wants_one(folder: Path, state: State) -> None:
    SAVE["safetensors"](state, folder)
    edit_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refused(folder)


# Other layouts


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


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


def saved_plainly(model: torch.nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def saved_beside_an_optimizer(model: torch.nn.Module, path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, path)


@pytest.mark.parametrize("save", [saved_plainly, saved_beside_an_optimizer])
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


def test_the_number_of_heads_has_to_be_known(tmp_path: Path) -> None:
    saved_plainly(GPTModel(), tmp_path / "model.pth")
    assert all(word in refused(tmp_path / "model.pth") for word in ("heads", "config.json", "n_head", "32"))
    torch.save({"model_state_dict": GPTModel().state_dict(), "config": {"n_heads": 4}}, tmp_path / "model.pth")
    assert Checkpoint.open(str(tmp_path / "model.pth")).config.n_head == 4


def save_nanogpt(model: NanoGPT, path: Path, prefix: str = "") -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    saved = {
        "model": {name: tensor.clone() for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": model.arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "n_head": model.arguments["n_head"], "decay_lr": True},
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }
    torch.save(saved, path)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt(bias: bool, prefix: str, tmp_path: Path) -> None:
    model = randomised(NanoGPT(bias=bias))
    save_nanogpt(model, tmp_path / "ckpt.pt", prefix)
    opened = Checkpoint.open(str(tmp_path))
    assert opened.tied
    assert opened.config.activation_function == "gelu"
    assert_computes(opened, model)


def test_what_is_refused_is_not_called_damaged(tmp_path: Path) -> None:
    model = randomised(NanoGPT(bias=True))
    save_nanogpt(model, tmp_path / "ckpt.pt", "")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(saved | {"losses": {(1, 2): 3.0}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"refused: a key .* is a tuple; save the model's state_dict\(\) alone"):
        Checkpoint.open(str(tmp_path))


class GPTConfig:
    """build-nanogpt's settings are saved as an object of a class of the script that trains."""

    __module__ = "__main__"

    def __init__(self, model: NanoGPT) -> None:
        self.__dict__ |= {"n_head": model.arguments["n_head"], "block_size": model.arguments["block_size"]}


@pytest.mark.parametrize("zipped", [True, False])
def test_build_nanogpt(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    model = randomised(NanoGPT(bias=True, approximate="tanh"))
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight *= 5  # far enough from 0 to tell the two GELUs apart
    saved = {"model": model.state_dict(), "config": GPTConfig(model), "step": 3, "val_loss": 3.5}
    torch.save(saved, tmp_path / "model_00003.pt", _use_new_zipfile_serialization=zipped)
    opened = Checkpoint.open(str(tmp_path))
    assert opened.config.activation_function == "gelu_pytorch_tanh"
    assert_computes(opened, model)


def test_lightning_s_prefix_and_suffix(folder: Path, state: State) -> None:
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "last.ckpt")
    assert_reads(Checkpoint.open(str(folder / "last.ckpt")), state)


def test_what_a_trainer_leaves_beside_the_weights_is_passed_over(folder: Path, state: State) -> None:
    save_file(state, folder / "weights.safetensors")
    for name in ("optimizer.pt", "rng_state_0.pth", "scaler.pt", "training_args.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"not read")
    assert_reads(Checkpoint.open(str(folder)), state)


def test_the_first_configs_say_n_ctx(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(n_positions=40)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["n_ctx"] = content.pop("n_positions")
    path.write_text(json.dumps(content))
    opened = Checkpoint.open(str(folder))
    assert opened.config.n_positions == opened.raw_config["n_positions"] == 40


def test_generation_options_in_config_json_count_where_there_is_no_other_file(folder: Path, state: State) -> None:
    """As in transformers, which wrote them there once."""
    SAVE["safetensors"](state, folder)
    (folder / "generation_config.json").unlink()
    edit_config(folder, do_sample=True, top_k=5, temperature=0.7, max_length=20)
    reference = load_reference(folder)
    expected = reference_tokens(reference, [5, 6, 7], 3)
    gpt2onnx.export(folder, folder / "bundle")
    found = gpt2onnx.load(folder / "bundle", threads=1).generate([5, 6, 7], seed=3)
    assert len(expected[0]) > 3
    assert found.sequences[0].token_ids == expected[0]


def test_a_head_that_is_left_out_is_told(folder: Path, state: State, caplog: pytest.LogCaptureFixture) -> None:
    SAVE["safetensors"](state | {"score.weight": torch.ones(3, 32)}, folder)
    assert_reads(Checkpoint.open(str(folder)), state)
    assert "score.weight" in caplog.text
    caplog.clear()
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    SAVE["safetensors"](state | masks | {"lm_head.weight": state["transformer.wte.weight"].clone()}, folder)
    Checkpoint.open(str(folder))
    assert not caplog.text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(number: float, folder: Path, state: State) -> None:
    state["transformer.h.1.mlp.c_proj.weight"][3, 4] = number
    SAVE["safetensors"](state, folder)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_proj\.weight"):
        gpt2onnx.export(folder, folder / "bundle")
    assert not (folder / "bundle").exists()


def test_a_weight_beyond_float16_is_named(folder: Path, state: State) -> None:
    state["transformer.h.1.mlp.c_proj.bias"][3] = 1e6
    SAVE["safetensors"](state, folder)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_proj\.bias.*float16"):
        gpt2onnx.export(folder, folder / "bundle", dtype="fp16")


def test_nanogpt_s_padded_vocabulary_stays(tmp_path: Path) -> None:
    save_nanogpt(NanoGPT(vocabulary=50304, width=8, heads=2, layers=1), tmp_path / "ckpt.pt")
    opened = Checkpoint.open(str(tmp_path / "ckpt.pt"))
    assert opened.config.vocab_size == 50304
    assert opened.raw_config["eos_token_id"] == 50256
    assert not opened.config.n_embd % opened.config.n_head


@pytest.mark.parametrize("kind", [GPTModel, NanoGPT])
def test_other_layouts_generate_what_their_network_would(kind: type, tmp_path: Path) -> None:
    model = randomised(kind(bias=True))
    if kind is GPTModel:
        saved_plainly(model, tmp_path / "model.pth")
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


def test_weights_without_their_tokenizer_say_what_is_missing(tmp_path: Path) -> None:
    save_nanogpt(NanoGPT(), tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        gpt2onnx.export(tmp_path / "ckpt.pt", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# Broken and hostile checkpoints


def test_a_wrong_shape_names_the_tensor_what_was_found_and_what_was_wanted(folder: Path, state: State) -> None:
    SAVE["safetensors"](state | {"transformer.h.1.mlp.c_fc.bias": torch.zeros(100)}, folder)
    assert all(part in refused(folder) for part in ("transformer.h.1.mlp.c_fc.bias", "[100]", "[128]"))


def test_a_wrong_shape_in_the_book_s_model_is_told_in_its_own_terms(tmp_path: Path) -> None:
    state = GPTModel(width=768, layers=1, heads=12).state_dict()
    state["trf_blocks.0.att.W_key.weight"] = torch.zeros(768, 767)
    torch.save(state, tmp_path / "model.pth")
    assert all(part in refused(tmp_path) for part in ("trf_blocks.0.att.W_key.weight", "[768, 767]", "[768, 768]"))
    del state["trf_blocks.0.att.W_key.weight"]
    torch.save(state, tmp_path / "model.pth")
    assert "lack tensor trf_blocks.0.att.W_key.weight" in refused(tmp_path)


@pytest.mark.parametrize("form", SAVE)
def test_a_missing_tensor_and_a_wrong_type_are_named(form: str, folder: Path, state: State) -> None:
    name = "transformer.h.0.ln_2.weight"
    SAVE[form]({key: value for key, value in state.items() if key != name}, folder)
    assert "h.0.ln_2.weight" in refused(folder)
    SAVE[form](state | {name: torch.ones(32, dtype=torch.int64)}, folder)
    message = refused(folder)
    assert name in message
    assert "int64" in message.lower().replace("i64", "int64")


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(form: str, part: float, folder: Path, state: State) -> None:
    SAVE[form](state, folder)
    path = max(folder.glob("*.bin"), default=None) or max(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert path.name in refused(folder)


@pytest.mark.parametrize("stem_suffix", [("model", "safetensors"), ("pytorch_model", "bin")], ids=str)
def test_shards_have_to_be_there_inside_and_complete(stem_suffix: tuple[str, str], folder: Path, state: State) -> None:
    stem, suffix = stem_suffix
    save_shards(state, folder, stem, suffix)
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
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ):
        for content in (state | {"x": hostile}, {"model": state, "x": [hostile]}, hostile):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            message = refused(folder)
            assert "refused" in message
            assert name in message
    assert not trace.exists()


def with_pickle(path: Path, content: bytes) -> None:
    """Puts another pickle into a file that torch.save wrote, its storages as they were."""
    old = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, content if member.filename.endswith("data.pkl") else source.read(member))


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
    torch.save({"wte.weight": torch.zeros(16)}, path)
    with zipfile.ZipFile(path) as archive:
        storage_of = b"ctorch\nFloatStorage\n"
        assert storage_of in archive.read("pytorch_model/data.pkl")
    offset, shape, strides = tensor
    # {"wte.weight": _rebuild_tensor_v2(storage, *body)}, in the pickle machine's own words
    program = (
        b"\x80\x02}Vwte.weight\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI16\ntQ"
    )
    values = b"".join(pickle.dumps(value, protocol=0)[:-1] for value in (offset, shape, strides))
    with_pickle(path, program + values + b"I00\nNtRs.")
    message = refused(folder)
    assert "tensor wte.weight is damaged" in message or "ends before tensor wte.weight" in message
    inside = b"".join(pickle.dumps(value, protocol=0)[:-1] for value in (12, (2, 2), (1, 1)))
    with_pickle(path, program + inside + b"I00\nNtRs.")
    assert read_checkpoint_file(path)["wte.weight"].shape == (2, 2)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_never_does_more_than_be_refused(zipped: bool, folder: Path, state: State) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(dict(list(state.items())[:3]), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    pickled = slice(0, 1200) if zipped else slice(0, 1500)
    generator = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(content)
        for place in generator.integers(pickled.start, pickled.stop, size=generator.integers(1, 4)):
            broken[place] = generator.integers(256)
        path.write_bytes(broken)
        try:
            read = read_checkpoint_file(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017  # most do fail, not all
        else:
            for array in read.values() if isinstance(read, dict) else ():
                if isinstance(array, StridedArray) and np.prod(array.shape) < 10**6:
                    array.read()


def test_files_that_are_no_checkpoints_are_told_apart(folder: Path, state: State) -> None:
    assert "no weights" in refused(folder)
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "b.pt")
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
    torch.save([1, 2], path)
    assert "state dict" in refused(folder)
    torch.save({"weight": torch.ones(3)}, path)
    assert "weight" in refused(folder)
    torch.save(state, path)
    repacked = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(repacked) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(folder)
    assert "not a checkpoint" in refused(folder / "config.json")
    assert "no checkpoint" in refused(folder / "none")
    assert "no checkpoint" in refused(folder / ("long" * 1000))


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
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"can't read .*config\.json: "):
        GPT2Config.from_file(tmp_path / "config.json")


def test_a_file_without_its_config_says_so(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert "config.json" in refused(tmp_path)
    assert "config.json" in refused(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("form", SAVE)
def test_a_failed_export_leaves_the_target_as_it_was(form: str, folder: Path, state: State, tmp_path: Path) -> None:
    SAVE[form](state, folder)
    target = tmp_path / "bundle"
    gpt2onnx.export(folder, target)
    before = {path: path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()}
    path = max(folder.glob("*.bin"), default=None) or max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=path.name):
        gpt2onnx.export(folder, target, force=True)
    assert {path: path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
