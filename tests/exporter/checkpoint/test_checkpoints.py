"""Every kind of checkpoint is read as PyTorch reads it; test_broken_checkpoints.py has those that are refused.

Files that PyTorch wrote are in golden/torch_files; support/torch_files.py writes others like them.
"""

import json
import shutil
import sys
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import torch_files
from support.checkpoints import MakeCheckpoint, byte_tokenizer
from support.golden import FOLDER, Golden, assert_close
from support.graphs import logits_of_prompt
from support.reference import Reference
from support.versions import skip_with_transformers_4
from support.weight_files import SAVE, TINY, State, assert_reads, book_state, nanogpt_state, refused

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file

# Made by PyTorch: golden/make_torch_files.py.
FILES = FOLDER / "torch_files"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Loaded = Callable[..., State]


@pytest.fixture
def loaded(golden: Golden) -> Loaded:
    """Tensors of a file that PyTorch wrote, as it reads them, in float32: loaded(path, key of what holds them)."""

    def load(path: Path, *keys: str) -> State:
        def tensors() -> Mapping[str, Any]:
            from support import reference_models

            content = reference_models.load(path)
            for key in keys:
                content = content[key]
            return content

        def numbers() -> np.ndarray:
            return np.concatenate([tensor.detach().float().numpy().ravel() for tensor in tensors().values()])

        shapes = golden.answer(
            ["shapes", path.name], lambda: {name: list(tensor.shape) for name, tensor in tensors().items()}
        )
        flat = golden.array(["numbers", path.name], numbers)
        assert not np.isnan(flat).any()
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    return load


# Hugging Face's own layout

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", SAVE)
def test_every_form_and_type_is_read(form: str, dtype: str, folder: Path, state: State) -> None:
    state = {name: array.astype(TYPES[dtype]) for name, array in state.items()}
    SAVE[form](state, folder)
    assert_reads(Checkpoint.open(str(folder)), state)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ending", [".pt", "_legacy.pt"])
def test_every_type_of_pytorch_s_files_is_read(ending: str, dtype: str, tiny: Path, loaded: Loaded) -> None:
    path = FILES / f"{dtype}{ending}"
    shutil.copy(path, tiny / "pytorch_model.bin")
    assert_reads(Checkpoint.open(str(tiny)), loaded(path))


@pytest.mark.parametrize("form", [form for form in SAVE if form.startswith("sharded")])
def test_the_index_of_shards_names_them(form: str, folder: Path, state: State) -> None:
    SAVE[form](state, folder)
    (index,) = folder.glob("*.index.json")
    assert_reads(Checkpoint.open(str(index)), state)


def test_pytorch_s_shards_are_read(tiny: Path, loaded: Loaded) -> None:
    shutil.copytree(FILES / "sharded", tiny, dirs_exist_ok=True)
    state: State = {}
    for shard in sorted(FILES.glob("sharded/*.bin")):
        state |= loaded(shard)
    assert_reads(Checkpoint.open(str(tiny)), state)


@pytest.mark.parametrize("name", ["float32.pt", "float16.pt", "bfloat16.pt", "float64.pt"])
def test_files_written_without_pytorch_are_like_its_own(name: str, loaded: Loaded, tmp_path: Path) -> None:
    """Byte for byte, as far as anything reads them; torch.load reads them in reference/test_checkpoints_live.py."""
    dtype = TYPES[name.removesuffix(".pt")]
    torch_files.save({key: array.astype(dtype) for key, array in loaded(FILES / name).items()}, tmp_path / name)
    with zipfile.ZipFile(FILES / name) as theirs, zipfile.ZipFile(tmp_path / name) as ours:
        assert set(ours.namelist()) <= set(theirs.namelist())
        for member in ours.namelist():
            assert ours.read(member) == theirs.read(member), member


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize(
    "prefix",
    ["transformer.", "", "_orig_mod.transformer.", "module.transformer.", "gpt2.", "base_model.model.transformer."],
)
def test_prefixes_and_old_mask_buffers_don_t_matter(form: str, prefix: str, folder: Path, state: State) -> None:
    renamed = {name.replace("transformer.", prefix): array for name, array in state.items()}
    for layer in range(2):
        renamed[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.uint8))
        renamed[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    SAVE[form](renamed, folder)
    assert_reads(Checkpoint.open(str(folder)), state)


def test_safetensors_come_before_pickles(folder: Path, state: State) -> None:
    SAVE["safetensors"](state, folder)
    SAVE["pytorch"]({name: array + 1 for name, array in state.items()}, folder)
    assert_reads(Checkpoint.open(str(folder)), state)


@pytest.mark.parametrize("name", ["model.safetensors", "some.bin", "some.pt", "some.pth"])
def test_one_file_is_enough_to_name(name: str, folder: Path, state: State) -> None:
    (save_file if name.endswith("safetensors") else torch_files.save)(state, folder / name)
    (folder / "another.pt").write_bytes(b"not read")
    opened = Checkpoint.open(str(folder / name))
    assert opened.folder == folder
    assert_reads(opened, state)


@pytest.mark.parametrize("name", ["views.pt", "views_legacy.pt"])
def test_views_parameters_and_shared_storages_are_read_as_pytorch_does(name: str, loaded: Loaded) -> None:
    arrays, wanted = read_checkpoint_file(FILES / name)["weights"], loaded(FILES / name, "weights")
    assert set(arrays) == set(wanted)
    for key, array in wanted.items():
        found = arrays[key].read()
        assert found.shape == arrays[key].shape == array.shape, key
        assert np.array_equal(found.astype(np.float32), array), key


@pytest.mark.parametrize("zipped", [True, False])
def test_a_small_view_reads_no_more_of_a_large_storage(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    large = np.arange(4_000_000, dtype=np.float32)
    torch_files.save({"view": large[1000:1010], "other": large}, path, zipped=zipped)
    tracemalloc.start()
    found = read_checkpoint_file(path)["view"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, np.arange(1000, 1010))
    assert peak < 1_000_000, f"{peak} bytes for ten numbers"


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
def test_a_head_of_its_own_is_kept_where_transformers_keeps_it(
    form: str, make_checkpoint: MakeCheckpoint, reference_of: type[Reference], golden: Golden
) -> None:
    skip_with_transformers_4("a head that differs is dropped where the config says that it's tied")
    folder = make_checkpoint(**TINY)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    embedding = state["transformer.wte.weight"]
    for head, tied in ((embedding.copy(), True), (embedding + 1, False)):
        for said in (True, False):
            edit_config(folder, tie_word_embeddings=said)
            SAVE[form](state | {"lm_head.weight": head}, folder)
            opened = Checkpoint.open(str(folder))
            assert opened.tied is tied
            expected = golden.array(
                ["head", form, tied, said], lambda: reference_of(folder).model.lm_head.weight.detach().numpy()
            )
            assert np.array_equal(opened.tensor("wte.weight" if tied else "lm_head.weight"), expected)


ALIAS = {"transformer.wte.weight": "lm_head.weight"}


@pytest.mark.parametrize("form", ["one file", "shards"])
def test_a_tied_pair_that_is_stored_under_the_head_s_name(form: str, folder: Path, state: State) -> None:
    """As safetensors.torch.save_model stores it; reference/test_checkpoints_live.py has it do so."""
    stored = {ALIAS.get(name, name): array for name, array in state.items()}
    if form == "one file":
        save_file(stored, folder / "model.safetensors", {"format": "pt"} | ALIAS)
    else:
        SAVE["sharded safetensors"](stored, folder)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": 1} | ALIAS}))
    opened = Checkpoint.open(str(folder))
    assert opened.tied
    assert_reads(opened, state)


def test_a_tied_pair_of_nanogpt_s_that_is_stored_under_the_head_s_name(tmp_path: Path) -> None:
    state = nanogpt_state(29)
    head = np.arange(29 * 8, dtype=np.float32).reshape(29, 8)
    del state["transformer.wte.weight"]
    save_file(state | {"lm_head.weight": head}, tmp_path / "mine.safetensors", ALIAS | {"other": "missing"})
    opened = Checkpoint.open(str(tmp_path / "mine.safetensors"), n_head=2)
    assert opened.tied
    assert np.array_equal(opened.tensor("wte.weight"), head)


def test_a_tied_pair_of_which_only_the_head_is_stored(
    make_checkpoint: MakeCheckpoint, reference_of: type[Reference], golden: Golden
) -> None:
    skip_with_transformers_4("it draws another embedding")
    folder = make_checkpoint(**TINY)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    opened = Checkpoint.open(str(folder))
    assert opened.tied
    expected = golden.array("only the head", lambda: reference_of(folder).model.transformer.wte.weight.detach().numpy())
    assert np.array_equal(opened.tensor("wte.weight"), expected)


def test_a_missing_head_is_an_error_where_the_config_wants_one(folder: Path, state: State) -> None:
    SAVE["safetensors"](state, folder)
    edit_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in refused(folder)


# Other layouts


# What golden/make_torch_files.py saved: whether the head is tied, and the activation.
NETWORKS = {
    "book.pth": (False, "gelu_new"),
    "book_beside_an_optimizer.pth": (False, "gelu_new"),
    "book_fast.pth": (False, "gelu_new"),
    "book_fast_without_bias.pth": (False, "gelu_new"),
    "book_lora.pth": (False, "gelu_new"),
    "nanogpt.pt": (True, "gelu"),
    "nanogpt_compiled.pt": (True, "gelu"),
    "build_nanogpt.pt": (True, "gelu_pytorch_tanh"),
    "build_nanogpt_legacy.pt": (True, "gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_layouts_compute_what_their_network_does(name: str, golden: Golden, tmp_path: Path) -> None:
    shutil.copy(FILES / name, tmp_path)
    if name.startswith("book"):
        (tmp_path / "config.json").write_text('{"n_heads": 2, "lora_alpha": 6}')
    opened = Checkpoint.open(str(tmp_path))
    assert (opened.tied, opened.config.activation_function) == NETWORKS[name]
    byte_tokenizer(29).save(str(tmp_path / "tokenizer.json"))
    bundle = gpt2onnx.export(tmp_path / name, tmp_path / "bundle")
    ids, prompt = np.arange(8) * 7 % 29, [3, 14, 15]

    def logits(tokens: list[int]) -> np.ndarray:
        import torch
        from support.reference_models import saved_network

        with torch.no_grad():
            return saved_network(FILES / name)(torch.tensor([tokens])).numpy()

    def greedy() -> list[int]:
        tokens: list[int] = []
        for _ in range(5):
            tokens.append(int(logits(prompt + tokens)[0, -1].argmax()))
        return tokens

    expected = golden.array(["logits of the network", name], lambda: logits(ids.tolist()))
    assert_close(logits_of_prompt(bundle, ids[None]), expected, 2e-5)
    generated = gpt2onnx.load(bundle.folder, threads=1).generate(prompt, max_new_tokens=5, do_sample=False)
    assert generated.sequences[0].token_ids == golden.answer(["tokens of the network", name], greedy)


def test_the_book_s_classifier_cannot_generate() -> None:
    assert "is a classifier: out_head gives 2 numbers, not one for each of the 29 tokens" in refused(
        FILES / "book_classifier.pth"
    )


def test_the_book_s_lora_layers_need_their_alpha(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(FILES / "book_lora.pth", tmp_path)
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    assert '{"lora_alpha": …}' in refused(tmp_path)
    state = {name: array.read() for name, array in read_checkpoint_file(tmp_path / "book_lora.pth").items()}
    for alpha in (6, 12):
        torch_files.save(
            {"model_state_dict": state, "lora_alpha": alpha, "config": {"n_heads": 2}}, tmp_path / "own.pth"
        )
        opened = Checkpoint.open(str(tmp_path / "own.pth"))
        assert f"{alpha} / 3" in caplog.text
        assert "lora_alpha" not in opened.raw_config
        place = "trf_blocks.0.att.out_proj"
        change = state[f"{place}.lora.A"] @ state[f"{place}.lora.B"] * (alpha / 3)
        expected = state[f"{place}.linear.weight"].T + change
        assert np.allclose(opened.tensor("h.0.attn.c_proj.weight"), expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "book_lora.pth").unlink()
    for name, array, expected in (
        (f"{place}.lora.A", np.ones((7, 3), np.float32), "has shape [7, 3]"),
        (f"{place}.lora.B", np.ones((8,), np.float32), "has shape [8]"),
    ):
        torch_files.save({"model_state_dict": state | {name: array}, "lora_alpha": 6}, tmp_path / "own.pth")
        assert expected in refused(tmp_path / "own.pth")


def test_the_book_s_model_with_gpt2_s_weights_is_tied_and_has_gpt2_s_heads(tmp_path: Path) -> None:
    state = book_state(768)
    state["tok_emb.weight"][:] = np.arange(768)
    state["out_head.weight"][:] = np.arange(768)
    save_file(state, tmp_path / "gpt2-small-124M.safetensors")
    opened = Checkpoint.open(str(tmp_path))
    assert opened.tied
    assert opened.config.n_head == 12
    assert opened.config.activation_function == "gelu_new"


def test_the_number_of_heads_has_to_be_known(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch_files.save(book_state(8), path)
    assert all(word in refused(path) for word in ("heads", "config.json", "n_head", "width 8"))
    torch_files.save({"model_state_dict": book_state(8), "config": {"n_heads": 4}}, path)
    assert Checkpoint.open(str(path)).config.n_head == 4


def test_what_is_refused_is_not_called_damaged(tmp_path: Path) -> None:
    content = {"model": nanogpt_state(29), "model_args": {"n_head": 2}, "losses": {(1, 2): 3.0}}
    torch_files.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"refused: a key .* is a tuple; save the model's state_dict\(\) alone"):
        Checkpoint.open(str(tmp_path))


class AttrDict(dict):
    """A script's own mapping."""


class Mirror(dict):
    """One whose keys are its attributes."""

    def __init__(self, **items: object) -> None:
        super().__init__(items)
        self.__dict__ = self


class Items(list):
    """A script's own list."""


@pytest.mark.parametrize("kind", [AttrDict, Mirror])
def test_settings_in_a_script_s_own_mapping(
    kind: type[AttrDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (AttrDict, Mirror, Items):
        monkeypatch.setattr(each, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], each.__name__, each, raising=False)
    content = {"model": nanogpt_state(29), "config": kind(n_head=4), "losses": Items([3.5, 2.5])}
    torch_files.save(content, tmp_path / "ckpt.pt")
    assert Checkpoint.open(str(tmp_path / "ckpt.pt")).config.n_head == 4


@pytest.mark.parametrize(
    "beside",
    [{"milestones": Counter([10, 20, 20])}, {"bytes": bytearray(b"x")}, {"number": 1j}, {"ids": np.arange(3, dtype=np.uint16)}],
    ids=str,
)  # fmt: skip
def test_what_torch_load_allows_beside_weights(beside: dict[str, object], tmp_path: Path) -> None:
    """With weights_only=True; reference/test_checkpoints_live.py has it load them."""
    torch_files.save({"model": nanogpt_state(29), "model_args": {"n_head": 4}} | beside, tmp_path / "ckpt.pt")
    assert Checkpoint.open(str(tmp_path / "ckpt.pt")).config.n_head == 4


def test_a_counter_and_a_tensor_of_another_type_are_read(tmp_path: Path) -> None:
    ids = np.array([1, 65535, 3], np.uint16)
    torch_files.save({"counts": Counter("aab"), "ids": ids}, tmp_path / "ckpt.pt")
    content = read_checkpoint_file(tmp_path / "ckpt.pt")
    assert content["counts"] == {"a": 2, "b": 1}
    assert np.array_equal(content["ids"].read(), ids)


@pytest.mark.parametrize("key", ["net", "model_state", "weights", 3])
def test_a_state_dict_under_another_key(key: object, tmp_path: Path) -> None:
    state = nanogpt_state(29)
    state["transformer.ln_f.weight"] = np.arange(8, dtype=np.float32)
    others = {
        "model_args": {"n_head": 4},
        "optimizer": {"state": {}},
        "step": np.array(3),
        "ema": {"decay": np.ones(1)},
    }
    torch_files.save({key: state} | others, tmp_path / "ckpt.pt")
    opened = Checkpoint.open(str(tmp_path / "ckpt.pt"))
    assert opened.config.n_head == 4
    assert np.array_equal(opened.tensor("ln_f.weight"), np.arange(8))


def test_a_file_without_one_state_dict_names_its_keys(tmp_path: Path) -> None:
    path, state = tmp_path / "ckpt.pt", nanogpt_state(29)
    torch_files.save({"net": state, "net_ema": state, "step": 3}, path)
    assert "holds several networks, ['net', 'net_ema']: save one alone" in refused(path)
    torch_files.save({"checkpoint": {"model": state}, "step": 3}, path)
    assert "has no state dict under its keys ['checkpoint', 'step']" in refused(path)


def test_lightning_s_prefix_and_suffix(tiny: Path, loaded: Loaded) -> None:
    shutil.copy(FILES / "last.ckpt", tiny)
    saved = loaded(FILES / "last.ckpt", "state_dict")
    state = {name.removeprefix("model."): array for name, array in saved.items()}
    assert_reads(Checkpoint.open(str(tiny / "last.ckpt")), state)


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


def test_the_book_s_names_in_a_config_are_read(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(n_positions=40)
    expected = Checkpoint.open(str(folder)).config
    theirs = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head"}  # fmt: skip
    content = {name: getattr(expected, ours) for name, ours in theirs.items()}
    (folder / "config.json").write_text(json.dumps(content))
    assert Checkpoint.open(str(folder)).config == expected


def test_generation_options_in_config_json_count_where_there_is_no_other_file(
    folder: Path, checkpoint: Path, state: State, reference_of: type[Reference]
) -> None:
    """As in transformers, which wrote them there once."""
    skip_with_transformers_4("max_length in config.json counts otherwise")
    SAVE["safetensors"](state, folder)
    (folder / "generation_config.json").unlink()
    edit_config(folder, do_sample=True, top_k=5, temperature=0.7, max_length=20)
    (expected,) = reference_of(folder, f"{checkpoint.name}, options in config.json").tokens([5, 6, 7], 3)
    gpt2onnx.export(folder, folder / "bundle")
    found = gpt2onnx.load(folder / "bundle", threads=1).generate([5, 6, 7], seed=3)
    assert len(expected) > 3
    assert found.sequences[0].token_ids == expected


def test_a_head_that_is_left_out_is_told(folder: Path, state: State, caplog: pytest.LogCaptureFixture) -> None:
    SAVE["safetensors"](state | {"score.weight": np.ones((3, 32), np.float32)}, folder)
    assert_reads(Checkpoint.open(str(folder)), state)
    assert "score.weight" in caplog.text
    caplog.clear()
    shapes = {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": (1,)}
    masks = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    SAVE["safetensors"](state | masks | {"lm_head.weight": state["transformer.wte.weight"]}, folder)
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
    torch_files.save({"model": nanogpt_state(50304), "model_args": {"n_head": 2}}, tmp_path / "ckpt.pt")
    opened = Checkpoint.open(str(tmp_path / "ckpt.pt"))
    assert opened.config.vocab_size == 50304
    assert opened.raw_config["eos_token_id"] == 50256
    assert not opened.config.n_embd % opened.config.n_head
