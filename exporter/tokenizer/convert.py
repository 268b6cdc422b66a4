"""Converts a checkpoint's tokenizer, in any supported form, to the bundle's tokenizer.json.

The files mean what they mean to transformers 5's GPT2Tokenizer, BertTokenizer, EsmTokenizer and TokenizersBackend.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpt2onnx.errors import BundleError, CheckpointError, MissingExtraError

from ...models import limits
from ...models.bundle import CHAT_TEMPLATE, TOKENIZER
from ...models.config import read_json
from ...models.messages import one_line, shown
from ...runtime.host import native
from ...runtime.text import special_tokens, tokenizer_rules
from ...runtime.text.special_tokens import text as text_of
from ...runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from .known import CHARACTERS, GPT2_VOCABULARIES, characters, gpt2

_SETTINGS = "tokenizer_config.json"
_COMPANIONS = (_SETTINGS, special_tokens.OLDER, "added_tokens.json", CHAT_TEMPLATE)
_BYTE_LEVEL_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_WORD_PIECE_FILE = "vocab.txt"
_log = logging.getLogger(__name__)


def write_tokenizer(checkpoint: Path, config: Mapping[str, Any], target: Path) -> bool:
    """Writes tokenizer.json and its companions into the folder `target`, if the checkpoint has a tokenizer.

    Args:
        checkpoint: folder with tokenizer.json; with vocab.json and merges.txt; with BERT's vocab.txt; with a
            sentencepiece model; with nanoGPT's meta.pkl; or with none of them, for GPT-2's own vocabulary.
        config: the checkpoint's config.json, with vocab_size.
        target: an existing folder.

    Returns:
        Whether it has one.

    Raises:
        CheckpointError: it can't be read, is incomplete, or has more tokens than the network.
        MissingExtraError: it is a sentencepiece model, which only transformers can convert.
    """
    files = _TokenizerFiles.read(checkpoint, config)
    sentencepiece = sorted(checkpoint.glob("*.model"))
    if (checkpoint / TOKENIZER).is_file():
        tokenizer = files.from_tokenizer_json(target)
    elif files.class_name == "BertTokenizer" and (checkpoint / _WORD_PIECE_FILE).is_file():
        tokenizer = files.from_word_pieces()
    elif files.class_name == "EsmTokenizer" and (checkpoint / _WORD_PIECE_FILE).is_file():
        tokenizer = files.from_whole_tokens()
        # EsmTokenizer itself reads no tokenizer.json.
        roles = {role: text_of(token) for role, token in files.special.items() if token is not None}
        _write_settings(target, {**files.settings, **roles, "tokenizer_class": "PreTrainedTokenizerFast"})
    elif pair := next(
        (pair for pair in _BYTE_LEVEL_FILES if all((checkpoint / name).is_file() for name in pair)), None
    ):
        tokenizer = files.from_byte_level_bpe(*pair)
    elif sentencepiece:
        tokenizer = _convert_sentencepiece(checkpoint, target)
    elif (checkpoint / _WORD_PIECE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint}: {_WORD_PIECE_FILE} doesn't tell how a {shown(files.class_name)} cuts texts: put a tokenizer.json there,"
            f" or take {_WORD_PIECE_FILE} away to export without a tokenizer"
        )
    elif (checkpoint / CHARACTERS).is_file():
        tokenizer, files = characters(checkpoint / CHARACTERS), replace(files, class_name="PreTrainedTokenizerFast")
    elif config["vocab_size"] in GPT2_VOCABULARIES:
        tokenizer = files.from_nothing()
        _log.warning("%s has no tokenizer: GPT-2's own is taken, which has the same vocabulary", checkpoint)
    elif halves := [name for pair in _BYTE_LEVEL_FILES for name in pair if (checkpoint / name).is_file()]:
        raise CheckpointError(f"{checkpoint} has {halves[0]} alone: a tokenizer is vocab.json with merges.txt")
    else:
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
        (target / TOKENIZER).write_text(_compact(json.loads(tokenizer.to_str())), encoding="utf-8")
    for name in _COMPANIONS:
        if (checkpoint / name).is_file() and not (target / name).exists():
            shutil.copyfile(checkpoint / name, target / name)
    if not (target / _SETTINGS).exists():
        defaults = special_tokens.DEFAULTS.get(files.class_name, {})
        _write_settings(target, {"tokenizer_class": files.class_name, **defaults})
    try:
        if not RuntimeTokenizer(target / TOKENIZER).reads_any_text:
            _log.warning("%s: the tokenizer has no token for unknown words: a text with one is an error", checkpoint)
    except BundleError as error:
        raise CheckpointError(str(error).replace(str(target), str(checkpoint))) from error
    return True


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def _compact(content: dict[str, Any]) -> str:
    """A tokenizer.json without white space, and with merges in the shorter of their two forms."""
    model = content.get("model") or {}
    merges = model.get("merges")
    if isinstance(merges, list) and all(isinstance(pair, list) and " " not in "".join(pair) for pair in merges):
        content = content | {"model": model | {"merges": [" ".join(pair) for pair in merges]}}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _without_added_tokens_from(end: int, tokenizer: Tokenizer, checkpoint: Path) -> Tokenizer:
    """Drops added tokens with ids from `end` on, such as an untrained padding token: the network has no rows for them."""
    content = json.loads(tokenizer.to_str())
    dropped = [token["content"] for token in content["added_tokens"] if token["id"] >= end]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < end]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if any(index >= end for index in tokenizer.encode("").ids):
        raise CheckpointError(f"{checkpoint}: the tokenizer begins texts with a token that the network has no row for")
    _log.warning("%s: left out added tokens that the network has no rows for: %s", checkpoint, ", ".join(dropped)[:200])
    return tokenizer


def _byte_level_bpe(vocab: Path, merges: Path, *, add_prefix_space: bool) -> Tokenizer:
    """A tokenizer like GPT-2's from its two files, without special tokens.

    Args:
        vocab: JSON object from token to id (vocab.json, or OpenAI's encoder.json).
        merges: one merge a line (merges.txt, or OpenAI's vocab.bpe).
        add_prefix_space: encode a text's first word as if a space stood before it.

    Raises:
        CheckpointError: a file can't be read, or the two don't fit together.
    """
    ids = read_json(vocab)
    with native.raising(lambda reason: CheckpointError(f"{vocab} and {merges.name} don't make a tokenizer: {reason}")):
        lines = merges.read_text(encoding="utf-8").split("\n")
        merged = (line.split(" ") for line in lines if line and not line.startswith("#version"))
        pairs = [(left, right) for left, right in merged]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class _TokenizerFiles:
    """The settings of a tokenizer: the small files beside its vocabulary.

    Attributes:
        class_name: of transformers, without the ending "Fast".
        settings: tokenizer_config.json.
        special: special tokens by their role, as text or with their properties; None for a role without a token.
        extra: special tokens without a role.
        added: further tokens, by ascending id.
    """

    folder: Path
    class_name: str
    settings: Mapping[str, Any]
    special: Mapping[str, Any]
    extra: tuple[Any, ...]
    added: tuple[AddedToken, ...]

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> "_TokenizerFiles":
        settings = _read_if_there(folder / _SETTINGS)
        bert = (folder / _WORD_PIECE_FILE).is_file() and not (folder / "vocab.json").is_file()
        class_name = special_tokens.class_of(
            settings.get("tokenizer_class") or config.get("tokenizer_class"),
            otherwise="BertTokenizer" if bert else "GPT2Tokenizer",
        )
        by_id = settings.get("added_tokens_decoder")
        # The older files count only if tokenizer_config.json doesn't list the added tokens.
        older = _read_if_there(folder / special_tokens.OLDER) if by_id is None else {}
        special = special_tokens.by_role(class_name, settings, older)
        extra = _listed(settings.get("extra_special_tokens")) or _listed(settings.get("additional_special_tokens"))
        if by_id is None:
            roles = {text_of(token) for token in [*special.values(), *extra] if token is not None}
            by_id = [
                (index, {"content": token, "special": token in roles, "normalized": token not in roles})
                for token, index in _read_if_there(folder / "added_tokens.json").items()
            ]
            extra = extra or _listed(older.get("additional_special_tokens"))
        try:
            pairs = by_id.items() if isinstance(by_id, dict) else by_id
            in_order = sorted(((int(index), token) for index, token in pairs), key=lambda pair: pair[0])
            added = tuple(_added_token(token, special=False) for _, token in in_order)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: the added tokens can't be read: {shown(error)}") from error
        return cls(folder, class_name, settings, special, extra, added)

    def from_tokenizer_json(self, target: Path) -> Tokenizer:
        """Takes tokenizer.json as it is, without white space, unless the settings change it."""
        path = self.folder / TOKENIZER
        content = read_json(path, limits.TOKENIZER_JSON)
        if fault := tokenizer_rules.fault(content):
            raise CheckpointError(f"{path} {fault}")
        with native.raising(lambda reason: CheckpointError(f"{path} can't be read: {reason}")):
            as_it_is = Tokenizer.from_str(json.dumps(content))
            tokenizer = Tokenizer.from_str(json.dumps(self._with_settings(content)))
        self._add_tokens(tokenizer)
        if tokenizer.to_str() == as_it_is.to_str():
            (target / TOKENIZER).write_text(_compact(content), encoding="utf-8")
        return tokenizer

    def from_byte_level_bpe(self, vocab: str, merges: str) -> Tokenizer:
        prefix_space = bool(self.settings.get("add_prefix_space", False))
        tokenizer = _byte_level_bpe(self.folder / vocab, self.folder / merges, add_prefix_space=prefix_space)
        self._add_tokens(tokenizer)
        before, after = (
            self.special.get(name) if self.settings.get(f"add_{name}") else None for name in ("bos_token", "eos_token")
        )
        if before or after:
            tokenizer.post_processor = self._template(tokenizer, before, after)
        return tokenizer

    def from_nothing(self) -> Tokenizer:
        """GPT-2's own tokenizer."""
        tokenizer = gpt2()
        self._add_tokens(tokenizer)
        return tokenizer

    def from_word_pieces(self) -> Tokenizer:
        """BERT's tokenizer, which Chinese GPT-2 models use."""
        path = self.folder / _WORD_PIECE_FILE
        with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
            pieces = models.WordPiece.read_file(str(path))
            tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=text_of(self.special["unk_token"])))
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.settings.get("tokenize_chinese_chars", True),
            strip_accents=self.settings.get("strip_accents"),
            lowercase=self.settings.get("do_lower_case", True),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        self._add_tokens(tokenizer)
        tokenizer.post_processor = self._template(tokenizer, self.special["cls_token"], self.special["sep_token"])
        return tokenizer

    def from_whole_tokens(self) -> Tokenizer:
        """ESM's tokenizer of proteins: cuts texts at spaces, and at the tokens wherever they are."""
        path = self.folder / _WORD_PIECE_FILE
        with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
            tokens = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            ids = {token: index for index, token in enumerate(tokens)}
            tokenizer = Tokenizer(models.WordLevel(ids, unk_token=text_of(self.special["unk_token"])))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._add_tokens(tokenizer)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
        tokenizer.post_processor = self._template(tokenizer, self.special["cls_token"], self.special["eos_token"])
        return tokenizer

    def _template(self, tokenizer: Tokenizer, before: Any, after: Any) -> processors.TemplateProcessing:
        """Puts special tokens before and after every text."""
        first, last = [text_of(before)] if before else [], [text_of(after)] if after else []
        return processors.TemplateProcessing(
            single=[*first, "$A", *last],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(first + last)],
        )

    def _with_settings(self, content: dict[str, Any]) -> dict[str, Any]:
        """A tokenizer.json with the prefix space and the case of tokenizer_config.json."""
        splitter, normalizer = content.get("pre_tokenizer") or {}, content.get("normalizer") or {}
        if self.class_name == "GPT2Tokenizer" and splitter.get("type") == "ByteLevel":
            prefix_space = self.settings.get("add_prefix_space", splitter.get("add_prefix_space"))
            return content | {"pre_tokenizer": splitter | {"add_prefix_space": prefix_space}}
        if self.class_name == "BertTokenizer" and normalizer.get("type") == "BertNormalizer":
            names = {
                "do_lower_case": "lowercase",
                "strip_accents": "strip_accents",
                "tokenize_chinese_chars": "handle_chinese_chars",
            }
            said = {names[name]: value for name, value in self.settings.items() if name in names}
            return content | {"normalizer": normalizer | said}
        return content

    def _add_tokens(self, tokenizer: Tokenizer) -> None:
        """Adds the tokens that the settings list and the tokenizer lacks. Their order gives their ids."""
        order = {name: place for place, name in enumerate(special_tokens.ROLES)}
        by_role = sorted(self.special.items(), key=lambda item: order.get(item[0], len(order)))
        named = [token for _, token in by_role if token is not None]
        tokens = list(self.added)
        known = {token.content for token in [*tokens, *tokenizer.get_added_tokens_decoder().values()]}
        for token in [*named, *self.extra]:
            if text_of(token) not in known:
                known.add(text_of(token))
                try:
                    tokens.append(_added_token(token, special=True))
                except TypeError as error:
                    raise CheckpointError(
                        f"{self.folder}: special token {shown(token)} can't be read: {error}"
                    ) from error
        roles = {text_of(token) for token in named}
        for token in tokens:
            token.special = token.special or token.content in roles
        tokenizer.add_tokens(tokens)


def _listed(tokens: Any) -> tuple[Any, ...]:
    """Tokens of a list, or of a mapping by name."""
    values = tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    return tuple(token for token in values if special_tokens.is_token(token))


def _added_token(token: Any, *, special: bool) -> AddedToken:
    """A token with its properties in a file."""
    if isinstance(token, str):
        return AddedToken(token, special=special)
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    properties = {"special": special} | {name: token[name] for name in names if name in token}
    return AddedToken(token["content"], **properties)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # sys.modules holds no real module under this name
        return False


def _convert_sentencepiece(checkpoint: Path, target: Path) -> Tokenizer:
    """Lets transformers convert a sentencepiece model, as it would for itself."""
    purpose = f"Converting the sentencepiece tokenizer of {checkpoint}"
    for package in ("transformers", "sentencepiece"):
        if not _is_installed(package):
            raise MissingExtraError(purpose, package, "optimum")
    from transformers import AutoTokenizer  # noqa: TID251  # the one place that converts with it

    try:
        AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True).save_pretrained(str(target))
        return Tokenizer.from_file(str(target / TOKENIZER))
    except Exception as error:  # its many converters raise any type
        reason = one_line(error)[:150]
        raise CheckpointError(
            f"{checkpoint}: transformers can't convert the sentencepiece tokenizer: {reason}"
        ) from error
