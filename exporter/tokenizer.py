"""Brings a checkpoint's tokenizer into the bundle as tokenizer.json, whatever form it has."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpt2onnx.errors import CheckpointError

from ..models.bundle import TOKENIZER
from ..models.config import read_json

_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(checkpoint: Path, config: Mapping[str, Any], target: Path) -> None:
    """Writes tokenizer.json and its companions into the folder `target`.

    Args:
        checkpoint: folder with tokenizer.json, or with vocab.json and merges.txt.
        config: the checkpoint's config.json.
        target: an existing folder.

    Raises:
        CheckpointError: there is no tokenizer, or it can't be read.
    """
    if (checkpoint / TOKENIZER).is_file():
        shutil.copyfile(checkpoint / TOKENIZER, target / TOKENIZER)
    elif (checkpoint / "vocab.json").is_file() and (checkpoint / "merges.txt").is_file():
        tokenizer = byte_level_bpe(checkpoint / "vocab.json", checkpoint / "merges.txt")
        tokenizer.save(str(target / TOKENIZER))
    else:
        raise CheckpointError(f"{checkpoint} has no tokenizer: neither {TOKENIZER} nor vocab.json with merges.txt")
    try:
        size = Tokenizer.from_file(str(target / TOKENIZER)).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # tokenizers raises no narrower type
        raise CheckpointError(f"{checkpoint / TOKENIZER} can't be read: {error}") from error
    if size > config["vocab_size"]:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has {size} tokens, config.json a vocab_size of only {config['vocab_size']}"
        )
    for name in _COMPANIONS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    if not (target / "tokenizer_config.json").exists():
        minimal = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        (target / "tokenizer_config.json").write_text(json.dumps(minimal, indent=2) + "\n", encoding="utf-8")


def byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's tokenizer from its original two files.

    Args:
        vocab: JSON object from token to id (vocab.json, or OpenAI's encoder.json).
        merges: one merge a line (merges.txt, or OpenAI's vocab.bpe).

    Raises:
        CheckpointError: a file can't be read or doesn't hold such a vocabulary.
    """
    ids = read_json(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        merged = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        pairs = [(left, right) for left, right in merged]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # tokenizers raises no narrower type
        raise CheckpointError(f"{vocab} and {merges.name} don't make a tokenizer: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in ids:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
