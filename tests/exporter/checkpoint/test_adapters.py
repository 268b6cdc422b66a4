"""Adapters of peft are merged as peft merges them; golden/make_adapters.py had peft save and merge them.

test_fuzz_checkpoints.py has damaged ones.
"""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import MakeCheckpoint, byte_tokenizer
from support.commands import CommandLine
from support.golden import FOLDER, Golden
from support.weight_files import State, refused

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.models.shapes import weight_shapes

FILES = FOLDER / "adapters"
ADAPTERS = sorted(path.parent.name for path in FILES.glob("*/merged.npz"))
CONFIG = "adapter_config.json"


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The adapters, with their bases at the relative paths that they name."""
    folder = shutil.copytree(FILES, tmp_path / "adapters")
    monkeypatch.chdir(folder)
    return folder


def wanted(folder: Path, name: str) -> State:
    """The weights that peft's merge gives: those of the base and the changed ones."""
    base = load_file(folder / ("untied" if name.startswith("untied") else "base") / "model.safetensors")
    state = {key.removeprefix("transformer."): array for key, array in base.items()}
    return state | dict(np.load(folder / name / "merged.npz"))


def edit(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | settings))


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_are_those_that_peft_merges(name: str, adapters: Path) -> None:
    opened, state = Checkpoint.open(name), wanted(adapters, name)
    assert opened.tied == ("lm_head.weight" not in state)
    assert opened.config.vocab_size == opened.raw_config["vocab_size"] == (23 if name.startswith("grown") else 20)
    shapes = weight_shapes(opened.config, tied=opened.tied)
    assert shapes.keys() == state.keys()
    for weight, array in state.items():
        found = opened.tensor(weight)
        assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.float32, array.shape, True), weight
        assert np.abs(found - array).max() <= 2e-6 * np.abs(array).max(), weight


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_changes_weights(name: str, adapters: Path) -> None:
    """Otherwise the test above would compare the base with itself."""
    changed = np.load(adapters / name / "merged.npz")
    base = wanted(adapters, name) | {"lm_head.weight": np.zeros(1)}
    stored = load_file(adapters / ("untied" if name.startswith("untied") else "base") / "model.safetensors")
    plain = {key.removeprefix("transformer."): array for key, array in stored.items()}
    assert changed.files
    assert all(
        key not in plain or plain[key].shape != base[key].shape or np.abs(base[key] - plain[key]).max() > 0.1
        for key in changed.files
        if key != "lm_head.weight"
    )


def test_an_adapter_is_named_as_the_source_or_beside_its_base(adapters: Path) -> None:
    alone, beside = Checkpoint.open("lora"), Checkpoint.open("base", adapter="lora")
    elsewhere = Checkpoint.open(str(adapters / "base"), adapter=str(adapters / "lora" / "adapter_model.safetensors"))
    assert alone.config == beside.config == elsewhere.config
    assert alone.sha256() == beside.sha256() == elsewhere.sha256() != Checkpoint.open("base").sha256()
    assert np.array_equal(alone.tensor("h.0.attn.c_attn.weight"), elsewhere.tensor("h.0.attn.c_attn.weight"))
    before = beside.sha256()
    edit(adapters / "lora", lora_alpha=11)
    assert beside.sha256() != before


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_adapters_in_other_precisions(dtype: str, adapters: Path) -> None:
    path = adapters / "lora" / "adapter_model.safetensors"
    save_file({name: array.astype(dtype) for name, array in load_file(path).items()}, path)
    opened = Checkpoint.open("lora")
    for name, array in wanted(adapters, "lora").items():
        allowed = 2e-6 if dtype == "float64" else 2e-3
        assert np.abs(opened.tensor(name) - array).max() <= allowed * np.abs(array).max(), name


def test_merging_keeps_no_weight_in_memory(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base, (vocabulary, width) = make_checkpoint(vocab_size=20_000, n_embd=64, n_layer=4), (20_000, 64)
    modules = {"wte": (vocabulary, width), **{f"h.{layer}.attn.c_attn": (width, 3 * width) for layer in range(4)}}
    state: State = {}
    random = np.random.default_rng(0)
    for module, (rows, columns) in modules.items():
        first, second = (
            ("lora_embedding_A", "lora_embedding_B") if module == "wte" else ("lora_A.weight", "lora_B.weight")
        )
        place = f"base_model.model.transformer.{module}"
        state[f"{place}.{first}"] = random.standard_normal((2, rows), np.float32)
        state[f"{place}.{second}"] = random.standard_normal((columns, 2), np.float32)
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    tracemalloc.start()
    opened = Checkpoint.open(str(base), adapter=str(tmp_path / "adapter"))
    for name in weight_shapes(opened.config, tied=opened.tied):
        opened.tensor(name)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 4 * vocabulary * width
    assert left < largest / 5, f"{left} bytes are kept"
    assert peak < 4 * largest, f"{peak} bytes for a weight of {largest}"


def test_export_and_generate(adapters: Path, command_line: CommandLine, golden: Golden) -> None:
    assert command_line("export", "base", "one", "--adapter", "grown_saved", "--no-parity").code == 0
    assert command_line("export", "grown_saved", "two", "--no-parity").code == 0
    one, two = gpt2onnx.load(adapters / "one", threads=1), gpt2onnx.load(adapters / "two", threads=1)
    assert one.bundle.manifest.source == "base with grown_saved"
    assert one.bundle.manifest.source_sha256 == two.bundle.manifest.source_sha256

    def tokens() -> list[int]:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config.from_pretrained(FILES / "base")
        config.vocab_size, config.tie_word_embeddings = 23, False
        model = GPT2LMHeadModel(config).eval()
        state = {
            key if key == "lm_head.weight" else f"transformer.{key}": torch.from_numpy(array)
            for key, array in wanted(FILES, "grown_saved").items()
        }
        model.load_state_dict(state)
        return model.generate(
            torch.tensor([[21, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 2:].tolist()

    expected = golden.answer(["tokens of a merged adapter"], tokens)
    for model in (one, two, gpt2onnx.load("grown_saved", threads=1)):
        assert model.generate([21, 3], max_new_tokens=4, eos_token_id=None).sequences[0].token_ids == expected


def test_the_export_in_the_cache_follows_the_base(adapters: Path) -> None:
    before = gpt2onnx.load("lora").generate([1, 2], max_new_tokens=2, eos_token_id=None).sequences[0].token_ids
    state = load_file(adapters / "base" / "model.safetensors")
    state["transformer.wte.weight"] = np.roll(state["transformer.wte.weight"], 1, axis=0)
    save_file(state, adapters / "base" / "model.safetensors")
    after = gpt2onnx.load("lora").generate([2, 3], max_new_tokens=2, eos_token_id=None).sequences[0].token_ids
    assert after[0] == (before[0] + 1) % 20


def test_the_tokenizer_of_an_adapter_comes_first(adapters: Path) -> None:
    byte_tokenizer(20).save("base/tokenizer.json")
    byte_tokenizer(23).save("grown/tokenizer.json")
    for name, end in (("lora", 19), ("grown", 22)):
        assert gpt2onnx.load(gpt2onnx.export(name, f"{name}-bundle").folder).tokenizer.encode("<|endoftext|>") == [end]


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "vocab.bpe", "vocab.txt", "spiece.model", "meta.pkl"])
def test_every_form_of_an_adapter_s_tokenizer_counts(name: str, adapters: Path) -> None:
    opened = Checkpoint.open("grown")
    with opened.tokenizer_folder() as folder:
        assert folder == opened.folder
    (adapters / "grown" / name).write_bytes(b"any")
    with opened.tokenizer_folder() as folder:
        assert folder.resolve() == adapters / "grown"


# Refused


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "LOHA", "ADALORA", "OFT", None, ["LORA"]])
def test_other_kinds_of_adapters(kind: Any, adapters: Path) -> None:
    edit(adapters / "lora", peft_type=kind)
    message = refused(Path("lora"))
    assert repr(kind) in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize(
    "settings", [{"use_qalora": True}, {"layer_replication": [[0, 1]]}, {"init_lora_weights": "pissa_niter_4"}]
)
def test_kinds_of_lora_that_are_more_than_a_sum(settings: dict[str, Any], adapters: Path) -> None:
    edit(adapters / "lora", **settings)
    assert str(next(iter(settings.values() if "init_lora_weights" in settings else settings))) in refused(Path("lora"))


def test_a_base_that_is_not_found(adapters: Path) -> None:
    edit(adapters / "lora", base_model_name_or_path="/where/it/was/trained")
    assert "no checkpoint folder or file at '/where/it/was/trained'" in (message := refused(Path("lora")))
    assert message.endswith("export the base with --adapter lora")
    edit(adapters / "lora", base_model_name_or_path="base", revision="main")  # peft asks the hub alone for a revision
    Checkpoint.open("lora")
    edit(adapters / "lora", base_model_name_or_path=None)
    assert "(adapter_config.json names none)" in refused(Path("lora"))
    edit(adapters / "lora", base_model_name_or_path="ia3")
    assert "ia3 is itself an adapter" in refused(Path("lora"))


@pytest.mark.parametrize(("source", "adapter", "expected"), [
    ("lora", "lora", "lora is itself an adapter"),
    ("base", "base", "base has no adapter_config.json"),
    ("untied", "empty", "no adapter_model.safetensors or adapter_model.bin"),
    ("lora/adapter_model.safetensors", None, "name its folder lora, or its base with --adapter lora"),
    ("lora/adapter_model.safetensors", "lora", "name its folder lora, or its base"),
])  # fmt: skip
def test_what_is_mixed_up(source: str, adapter: str | None, expected: str, adapters: Path) -> None:
    (adapters / "empty").mkdir()
    shutil.copy(adapters / "lora" / CONFIG, adapters / "empty")
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(source, adapter=adapter)


def change_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces tensors, by the ends of their names; None takes one out, a new name adds one."""
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    for end, array in changes.items():
        name = next((name for name in state if name.endswith(end.replace("__", "."))), end.replace("__", "."))
        state.pop(name, None)
        if array is not None:
            state[name] = array
    save_file(state, path)


NUMBERS = np.ones((4, 32), np.float32)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"attn__c_attn__lora_A__weight": NUMBERS[:, :31]}, "has shape [4, 31], not [4, 32]: it was trained on 'base'"),
    ({"attn__c_attn__lora_B__weight": None}, "lacks B of h.0.attn.c_attn"),
    ({"attn__c_attn__lora_A__weight": NUMBERS.astype(np.int32)}, "not floating-point numbers"),
    ({"transformer__h__5__attn__c_attn__lora_A__weight": NUMBERS}, "this model has no h.5.attn.c_attn.weight"),
    ({"base_model__model__score__weight": NUMBERS}, "this model has no score.weight"),
    ({"base_model__model__lm_head__bias": NUMBERS[0]}, "this model has no wte.bias"),
    ({"transformer__h__0__mlp__c_fc__lora_A__weight": None, "transformer__h__0__mlp__c_fc__lora_B__weight": None,
      "transformer__h__0__mlp__c_fc__lora_B__bias": NUMBERS[0]}, "lacks A of h.0.mlp.c_fc"),
    ({"prompt_embeddings": NUMBERS}, "'prompt_embeddings' is no part of a LoRA or IA3 adapter"),
    ({"base_model__model__transformer__wte__weight": NUMBERS[:, :31]}, "tensor base_model.model.transformer.wte.weight has shape"),
    ({"base_model__model__transformer__wte__weight": NUMBERS[0]}, "tensor base_model.model.transformer.wte.weight has shape"),
    ({"base_model__model__transformer__ln_f__weight": NUMBERS[0, :5]}, "has shape [5]"),
])  # fmt: skip
def test_tensors_that_do_not_fit(changes: dict[str, Any], expected: str, adapters: Path) -> None:
    change_tensors(adapters / "lora", **changes)
    assert expected in refused(Path("lora"))


@pytest.mark.parametrize(("name", "settings", "expected"), [
    ("lora", {"lora_alpha": "ten"}, "lora_alpha is 'ten'"),
    ("lora", {"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ("lora", {"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ("lora_biases", {"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ("lora", {"alpha_pattern": {"(a+)+": 3}}, "can't use the pattern '(a+)+': it repeats too much"),
    ("lora", {"alpha_pattern": {".*" * 9: 3}}, "it repeats too much"),
    ("lora", {"alpha_pattern": {"[": 3}}, "can't use the pattern '['"),
    ("lora", {"alpha_pattern": [1]}, "can't use alpha_pattern [1]"),
    ("tokens", {"trainable_token_indices": [3, 20]}, "trainable_token_indices are [3, 20], not tokens of wte"),
    ("tokens", {"trainable_token_indices": [3, -1]}, "not tokens of wte"),
    ("tokens", {"trainable_token_indices": [3]}, "has shape [2, 32], not [1, 32]"),
    ("tokens", {"trainable_token_indices": {"wpe": [3, 18]}}, "not tokens of wte"),
    ("dora", {"base_model_name_or_path": 3}, "names none"),
])  # fmt: skip
def test_settings_that_do_not_fit(name: str, settings: dict[str, Any], expected: str, adapters: Path) -> None:
    edit(adapters / name, **settings)
    assert expected in refused(Path(name))


def test_numbers_that_are_none_are_named(adapters: Path) -> None:
    change_tensors(adapters / "lora", attn__c_attn__lora_A__weight=np.full((4, 32), np.nan, np.float32))
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_attn\.weight"):
        Checkpoint.open("lora").tensor("h.0.attn.c_attn.weight")
