"""Converts a checkpoint's tokenizer, in any supported form, to the bundle's tokenizer.json."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpt2onnx.errors import BundleError, CheckpointError

from ...models.bundle import ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from ...models.config import read_small, write_json
from ...runtime.text import special_tokens
from ...runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from ..checkpoint.formats.saved import check_fetched
from ..checkpoint.vocabulary import BYTE_LEVEL, CHARACTERS, WORD_PIECES, vocabulary_files
from .files import TokenizerFiles, compact
from .known import GPT2_VOCABULARIES, characters

_COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE)
_log = logging.getLogger(__name__)


def write_tokenizer(checkpoint: Path, config: Mapping[str, Any], target: Path) -> bool:
    """Writes tokenizer.json and its companions into the folder `target`, if the checkpoint has a tokenizer.

    Args:
        checkpoint: folder with tokenizer.json; with vocab.json and merges.txt; with BERT's vocab.txt; with a
            sentencepiece model; with nanoGPT's meta.pkl; or with none of them, for GPT-2's own vocabulary.
        config: the checkpoint's config.json, with vocab_size.

    Returns:
        Whether it has one.

    Raises:
        CheckpointError: it can't be read, is incomplete, of a class that isn't built here, or has more tokens than the network.
    """
    files = TokenizerFiles.read(checkpoint, config)
    try:
        tokenizer, files = _read(files, config, target)
    except CheckpointError:
        for path in vocabulary_files(checkpoint):
            check_fetched(path)  # a pointer explains more than what it broke
        raise
    if tokenizer is None:
        return False
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if largest >= config["vocab_size"]:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has ids up to {largest}, config.json a vocab_size of {config['vocab_size']}"
        )
    if any(index >= config["vocab_size"] for index in tokenizer.get_added_tokens_decoder()):
        (target / TOKENIZER).unlink(missing_ok=True)
        tokenizer = _without_added_tokens_from(config["vocab_size"], tokenizer, checkpoint)
    if not (target / TOKENIZER).exists():
        # Not by tokenizer.save, which raises no OSError.
        (target / TOKENIZER).write_text(compact(json.loads(tokenizer.to_str())), encoding="utf-8")
    for name in _COMPANIONS:
        if (checkpoint / name).is_file() and not (target / name).exists():
            (target / name).write_bytes(read_small(checkpoint / name))
    if not (target / TOKENIZER_CONFIG).exists():
        defaults = special_tokens.DEFAULTS.get(files.class_name, {})
        write_json(target / TOKENIZER_CONFIG, {"tokenizer_class": files.class_name, **defaults})
    try:
        if not RuntimeTokenizer(target / TOKENIZER).reads_any_text:
            _log.warning("%s: the tokenizer has no token for unknown words: a text with one is an error", checkpoint)
    except BundleError as error:
        raise CheckpointError(str(error).replace(str(target), str(checkpoint))) from error
    return True


def _read(files: TokenizerFiles, config: Mapping[str, Any], target: Path) -> tuple[Tokenizer | None, TokenizerFiles]:
    """The tokenizer, and its files with the class that they stand for; None: there is none."""
    checkpoint = files.folder
    names = [path.name for path in vocabulary_files(checkpoint)]
    if TOKENIZER not in names and WORD_PIECES in names:
        check_fetched(checkpoint / WORD_PIECES)  # any lines are word pieces
    if TOKENIZER in names:
        tokenizer = files.from_tokenizer_json(target)
    elif files.class_name == "BertTokenizer" and WORD_PIECES in names:
        tokenizer = files.from_word_pieces()
    elif files.class_name == "EsmTokenizer" and WORD_PIECES in names:
        tokenizer = files.from_whole_tokens()
        files.write_general_settings(target)
    elif pair := next((pair for pair in BYTE_LEVEL if set(pair) <= set(names)), None):
        tokenizer = files.from_byte_level_bpe(*pair)
    elif pieces := [name for name in names if name.endswith(".model")]:
        tokenizer = files.from_sentencepiece(checkpoint / pieces[0], config["vocab_size"])
        files.write_general_settings(target)
    elif WORD_PIECES in names:
        raise files.of_another_class(WORD_PIECES)
    elif CHARACTERS in names:
        return characters(checkpoint / CHARACTERS), replace(files, class_name="PreTrainedTokenizerFast")
    elif config["vocab_size"] in GPT2_VOCABULARIES:
        tokenizer = files.from_nothing()
        _log.warning("%s has no tokenizer: GPT-2's own is taken, which has the same vocabulary", checkpoint)
    elif names:
        raise CheckpointError(f"{checkpoint} has {names[0]} alone: a tokenizer is vocab.json with merges.txt")
    else:
        return None, files
    return tokenizer, files


def _without_added_tokens_from(end: int, tokenizer: Tokenizer, checkpoint: Path) -> Tokenizer:
    """Drops added tokens with ids from `end` on, such as an untrained padding token: the network has no rows for them."""
    content = json.loads(tokenizer.to_str())
    dropped = [token["content"] for token in content["added_tokens"] if token["id"] >= end]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < end]
    tokenizer = Tokenizer.from_str(json.dumps(content | {"padding": None}))
    if any(index >= end for index in tokenizer.encode("").ids):
        raise CheckpointError(f"{checkpoint}: the tokenizer begins texts with a token that the network has no row for")
    _log.warning("%s: left out added tokens that the network has no rows for: %s", checkpoint, ", ".join(dropped)[:200])
    return tokenizer
