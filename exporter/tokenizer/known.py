"""Tokenizers for checkpoints without one: GPT-2's own, and the characters of a nanoGPT data set.

gpt2_merges.txt.gz is the list of merges that OpenAI published with GPT-2 (https://github.com/openai/gpt-2,
under the licence beside the file). The whole vocabulary follows from it.
"""

import gzip
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2onnx.errors import CheckpointError

from ...models.config import GPT2Config
from ...runtime.host import native
from ...runtime.text.special_tokens import END_OF_TEXT
from ..checkpoint.formats.torch_file import read_plain_pickle
from ..checkpoint.vocabulary import CHARACTERS

# Tokens of GPT-2's vocabulary, and the same rounded up to a multiple of 64, as nanoGPT and others do.
GPT2_VOCABULARIES = (GPT2Config.vocab_size, 50304)


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, without special tokens."""
    merges = gzip.decompress(Path(__file__).with_name("gpt2_merges.txt.gz").read_bytes()).decode("utf-8")
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in merges.rstrip("\n").split("\n"))]
    # One letter stands for each byte; printable ones come first.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(left + right for left, right in pairs), END_OF_TEXT]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def characters(path: Path) -> Tokenizer:
    """One token for each character, as nanoGPT's data/shakespeare_char/prepare.py numbers them in meta.pkl.

    Raises:
        CheckpointError: the file can't be read or holds no such table.
    """
    content = read_plain_pickle(path)
    ids = content.get("stoi") if isinstance(content, dict) else None
    if not isinstance(ids, dict) or not all(
        isinstance(letter, str) and len(letter) == 1 and isinstance(index, int) and index >= 0
        for letter, index in ids.items()
    ):
        raise CheckpointError(f"{path} has no table from characters to ids: it isn't nanoGPT's {CHARACTERS}")
    # Without merges each character is a token. Encoding drops characters outside the table.
    with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
