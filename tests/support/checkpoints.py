"""Small random GPT-2 checkpoints, as transformers writes them, made without PyTorch: the same weights on every machine."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

# Writes a small random checkpoint, given fields of its config.json, and returns its folder.
MakeCheckpoint = Callable[..., Path]

END_OF_TEXT = "<|endoftext|>"
ALL_BYTES_AND_END = 257  # entries of a byte-level vocabulary without merges
SMALL = {"vocab_size": ALL_BYTES_AND_END, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
# transformers' own defaults, in its order.
DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu_new", "add_cross_attention": False, "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.3, "layer_norm_epsilon": 1e-5, "model_type": "gpt2",
    "n_inner": None, "pad_token_id": None, "reorder_and_upcast_attn": False, "resid_pdrop": 0.1,
    "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "tie_word_embeddings": True,
    "torch_dtype": "float32", "use_cache": True,
}  # fmt: skip


def random_checkpoint(parent: Path, settings: dict[str, Any], seed: int = 0) -> Path:
    """Writes a checkpoint with a byte-level tokenizer.

    All tensors are random, biases and norms too, so that none can be left out unnoticed; with an `initializer_range` of 0.3
    the likeliest tokens lie far apart.

    Args:
        parent: where its folder appears.
        settings: fields of config.json; SMALL and DEFAULTS give the others.
        seed: of the weights.

    Returns:
        The folder, whose name says which settings and seed it was made with.
    """
    config = DEFAULTS | SMALL | settings
    end = min(config["vocab_size"], ALL_BYTES_AND_END) - 1
    config = {"bos_token_id": end, "eos_token_id": end} | config
    made_with = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:10]
    folder = parent / f"random-{made_with}"
    folder.mkdir(parents=True)

    architecture = GPT2Config.from_dict(config)
    draw = np.random.RandomState(seed)
    dtype = ml_dtypes.bfloat16 if config["torch_dtype"] == "bfloat16" else np.dtype(config["torch_dtype"])
    weights = {}
    for name, shape in weight_shapes(architecture, tied=architecture.tie_word_embeddings).items():
        scale, middle = config["initializer_range"], 0.0
        if len(shape) == 1:
            scale, middle = 0.1, float(".ln_" in f".{name}" and name.endswith(".weight"))
        elif name.endswith("c_proj.weight"):
            scale /= (2 * architecture.n_layer) ** 0.5
        stored = name if name.startswith("lm_head") else f"transformer.{name}"
        weights[stored] = (middle + scale * draw.standard_normal(shape)).astype(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config[name] is not None}
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True} | ends))
    byte_tokenizer(architecture.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def scale_channels(source: Path, folder: Path, factor: float) -> Path:
    """Writes a checkpoint that computes what another one computes, with some channels larger than in that.

    Three channels behind each norm of a block, and three of each attention's values, are scaled; the weights behind are divided.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "training"))
    weights = {name: array.astype(np.float32) for name, array in load_file(source / "model.safetensors").items()}
    config = GPT2Config.from_file(source / "config.json")
    random = np.random.RandomState(0)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        for norm, behind in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            channels = random.choice(config.n_embd, 3, replace=False)
            weights[f"{block}.{norm}.weight"][channels] *= factor
            weights[f"{block}.{norm}.bias"][channels] *= factor
            weights[f"{block}.{behind}.weight"][channels] /= factor
        channels = random.choice(config.n_embd, 3, replace=False)
        weights[f"{block}.attn.c_attn.weight"][:, 2 * config.n_embd + channels] *= factor
        weights[f"{block}.attn.c_attn.bias"][2 * config.n_embd + channels] *= factor
        weights[f"{block}.attn.c_proj.weight"][channels] /= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def byte_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: a token for each byte, printable ones first, while there is room, then the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters[: vocab_size - 1])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
