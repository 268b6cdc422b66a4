"""Writes tests/golden/adapters: small adapters as peft saves them, and the weights that peft merges them to.

Needs peft, transformers and PyTorch: `pip install peft`, then `python tests/golden/make_adapters.py`.
"""

import contextlib
import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "adapters"
VOCABULARY, GROWN = 20, 23


def save_base(folder: Path, *, tied: bool) -> None:
    """A network with random numbers in all of its weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=6, n_embd=32, n_layer=1, n_head=2, n_inner=32, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)


def lora(**options: object) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn"]} | options
    return LoraConfig(task_type="CAUSAL_LM", **options)


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: lora(
        target_modules=["c_attn", "c_proj", "c_fc"],
        rank_pattern={"c_fc": 2, r"h\.0\.mlp\.c_proj": 3},
        alpha_pattern={r"^transformer\.h\.\d+\.attn\.c_attn": 5, "mlp.c_proj": 7},
    ),
    "rslora": lambda: lora(use_rslora=True, bias="all", target_modules=["wte", "wpe", "c_fc"]),
    "lora_biases": lambda: lora(r=1, bias="lora_only", lora_bias=True, target_modules=["mlp.c_proj"]),
    "dora": lambda: lora(use_dora=True, target_modules=["wte", "c_fc"]),
    "dora_head": lambda: lora(use_dora=True, target_modules=["lm_head"]),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    ),
    "saved_embedding": lambda: lora(r=1, target_modules=["mlp.c_proj"], modules_to_save=["wte", "ln_f"]),
    "grown": lambda: lora(r=1, target_modules=["mlp.c_proj"]),
    "grown_lora": lambda: lora(target_modules=["wte"]),
    "grown_saved": lambda: lora(r=1, target_modules=["mlp.c_proj"], modules_to_save=["wte", "lm_head"]),
    "grown_tokens": lambda: lora(r=1, target_modules=["mlp.c_proj"], trainable_token_indices={"wte": [21, 3]}),
    "tokens": lambda: lora(r=1, target_modules=["mlp.c_proj"], trainable_token_indices=[3, 18]),
    "untied_heads": lambda: lora(target_modules=["wte", "lm_head"]),
    "untied_ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]),
}


def load(name: str) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained("untied" if name.startswith("untied") else "base")
    if name.startswith("grown"):
        torch.manual_seed(2)
        model.resize_token_embeddings(GROWN)
    return model


def make(name: str) -> dict[str, np.ndarray]:
    """Saves an adapter as if it had been trained; the weights that merging changes."""
    model = get_peft_model(load(name), ADAPTERS[name]())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(name, safe_serialization=name != "dora")
    (Path(name) / "README.md").unlink()
    # Sets have another order in each run.
    config = json.loads((Path(name) / "adapter_config.json").read_text())
    in_order = {key: sorted(value) if key.endswith("_modules") and value else value for key, value in config.items()}
    (Path(name) / "adapter_config.json").write_text(json.dumps(in_order, indent=2) + "\n")
    before = load("untied" if name.startswith("untied") else "base").state_dict()
    after = PeftModel.from_pretrained(load(name), name).eval().merge_and_unload().state_dict()
    # A tied head is in the state, too.
    head = after["lm_head.weight"]
    if torch.equal(head, after["transformer.wte.weight"]):
        del after["lm_head.weight"]
    return {
        key: value.numpy()
        for key, value in after.items()
        if key not in before or value.shape != before[key].shape or not torch.equal(value, before[key])
    } | ({"lm_head.weight": head.numpy()} if "lm_head.weight" in after else {})


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    # From inside, so that the files don't name a folder of this machine.
    with contextlib.chdir(FOLDER):
        save_base(Path("base"), tied=True)
        save_base(Path("untied"), tied=False)
        for adapter in ADAPTERS:
            merged = make(adapter)
            ours = {key.removeprefix("transformer."): value for key, value in merged.items()}
            np.savez_compressed(Path(adapter) / "merged.npz", **ours)
    versions = {name: version(name) for name in ("peft", "transformers", "torch")}
    (FOLDER / "made_with.json").write_text(json.dumps(versions | {"python": platform.python_version()}) + "\n")
