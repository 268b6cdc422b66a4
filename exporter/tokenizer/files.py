"""The files of a checkpoint's tokenizer, and the tokenizer that they make.

They mean what they mean to transformers 5's GPT2Tokenizer, BertTokenizer, EsmTokenizer and TokenizersBackend, and to the
classes that sentencepiece.py has. But a tokenizer.json is kept where such a class would take its vocabulary alone, and rebuild the
rest: the model was trained with the file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpt2onnx.errors import CheckpointError

from ...models import limits
from ...models.bundle import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from ...models.config import read_if_there, read_json, write_json
from ...models.messages import shown
from ...runtime.host import native
from ...runtime.text import special_tokens, tokenizer_rules
from ...runtime.text.special_tokens import text as text_of
from ..checkpoint.vocabulary import WORD_PIECES
from . import sentencepiece
from .known import gpt2

_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # of special tokens without a role; the second is older
# Classes whose vocab.json and merges.txt are read as GPT-2's are; others cut texts, or put tokens around them, in ways of their own.
_LIKE_GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer", "PreTrainedTokenizer", "TokenizersBackend")


@dataclass(frozen=True)
class TokenizerFiles:
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
    def read(cls, folder: Path, config: Mapping[str, Any]) -> "TokenizerFiles":
        settings = read_if_there(folder / TOKENIZER_CONFIG)
        bert = (folder / WORD_PIECES).is_file() and not (folder / "vocab.json").is_file()
        class_name = special_tokens.class_of(
            settings.get("tokenizer_class") or config.get("tokenizer_class"),
            otherwise="BertTokenizer" if bert else "GPT2Tokenizer",
        )
        by_id = settings.get("added_tokens_decoder")
        # The older files count only if tokenizer_config.json doesn't list the added tokens.
        older = read_if_there(folder / SPECIAL_TOKENS) if by_id is None else {}
        special = special_tokens.by_role(class_name, settings, older)
        extra = next((tokens for name in _EXTRA if (tokens := _listed(settings.get(name)))), ())
        if by_id is None:
            roles = {text_of(token) for token in [*special.values(), *extra] if token is not None}
            by_id = [
                (index, {"content": token, "special": token in roles, "normalized": token not in roles})
                for token, index in read_if_there(folder / ADDED_TOKENS).items()
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
            (target / TOKENIZER).write_text(compact(content), encoding="utf-8")
        return tokenizer

    def from_byte_level_bpe(self, vocab: str, merges: str) -> Tokenizer:
        if self.class_name not in _LIKE_GPT2:
            raise self.of_another_class(vocab)
        prefix_space = bool(self.settings.get("add_prefix_space", False))
        tokenizer = _byte_level_bpe(self.folder / vocab, self.folder / merges, add_prefix_space=prefix_space)
        self._add_tokens(tokenizer)
        self._add_ends(tokenizer)
        return tokenizer

    def from_nothing(self) -> Tokenizer:
        """GPT-2's own tokenizer."""
        tokenizer = gpt2()
        self._add_tokens(tokenizer)
        return tokenizer

    def from_word_pieces(self) -> Tokenizer:
        """BERT's tokenizer, which Chinese GPT-2 models use."""
        path = self.folder / WORD_PIECES
        with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
            pieces = models.WordPiece.read_file(str(path))
            tokenizer = Tokenizer(models.WordPiece(pieces, unk_token=text_of(self.special["unk_token"])))
        with native.raising(
            lambda reason: CheckpointError(f"{self.folder / TOKENIZER_CONFIG} can't be used: {reason}")
        ):
            tokenizer.normalizer = normalizers.BertNormalizer(
                clean_text=True,
                handle_chinese_chars=self.settings.get("tokenize_chinese_chars", True),
                strip_accents=self.settings.get("strip_accents"),
                lowercase=self.settings.get("do_lower_case", True),
            )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        self._add_tokens(tokenizer)
        self._add_template(tokenizer, ("cls_token",), ("sep_token",))
        return tokenizer

    def from_whole_tokens(self) -> Tokenizer:
        """ESM's tokenizer of proteins: cuts texts at spaces, and at the tokens wherever they are."""
        path = self.folder / WORD_PIECES
        with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
            tokens = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            ids = {token: index for index, token in enumerate(tokens)}
            tokenizer = Tokenizer(models.WordLevel(ids, unk_token=text_of(self.special["unk_token"])))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._add_tokens(tokenizer)
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
        self._add_template(tokenizer, ("cls_token",), ("eos_token",))
        return tokenizer

    def from_sentencepiece(self, path: Path, rows: int) -> Tokenizer:
        """The tokenizer that the class makes of a sentencepiece model. `rows` is the number of the network's embeddings."""
        kind = sentencepiece.CLASSES.get(self.class_name)
        if kind is None:
            raise self.of_another_class(path.name)
        model = sentencepiece.read_model(path)
        content = kind.content(model, self.settings)
        if isinstance(vocabulary := content["model"]["vocab"], list):
            # T5's class adds pieces that the network may have no rows for.
            del vocabulary[max(rows, len(model.pieces)) :]
        if fault := tokenizer_rules.fault(content):
            raise CheckpointError(f"{path} {fault}")
        with native.raising(lambda reason: CheckpointError(f"{path} doesn't make a tokenizer: {reason}")):
            tokenizer = Tokenizer.from_str(json.dumps(content))
        files = self._matching_raw() if kind.matches_raw else self
        files._add_tokens(tokenizer)
        if not kind.matches_raw and not any(isinstance(self.settings.get(name), list) for name in _EXTRA):
            # Those that the settings describe, or give a role, keep what they were added with.
            told = {text_of(token) for token in self.special.values() if token} | {
                token.content for token in self.added
            }
            pieces = sentencepiece.added_tokens(model, self.class_name, self.settings)
            tokenizer.add_tokens([token for token in pieces if token.content not in told])
        if kind.before or kind.after:
            self._add_template(tokenizer, kind.before, kind.after)
        elif not kind.matches_raw:
            self._add_ends(tokenizer)
        return tokenizer

    def of_another_class(self, name: str) -> CheckpointError:
        """The error for a vocabulary of a class that isn't built here."""
        return CheckpointError(
            f"{self.folder / name} doesn't tell how a {shown(self.class_name)} cuts texts: put a {TOKENIZER} there, as AutoTokenizer"
            f" of transformers saves it, or take {name} away to export without a tokenizer"
        )

    def _matching_raw(self) -> "TokenizerFiles":
        """The same, with added tokens that are found in a text before it is normalised."""
        special, extra = ([token and _raw(token) for token in tokens] for tokens in (self.special.values(), self.extra))
        names = ("content", "single_word", "lstrip", "rstrip", "special")
        added = [{name: getattr(token, name) for name in names} | {"normalized": False} for token in self.added]
        return replace(
            self,
            special=dict(zip(self.special, special, strict=True)),
            extra=tuple(extra),
            added=tuple(_added_token(token, special=False) for token in added),
        )

    def write_general_settings(self, target: Path) -> None:
        """A tokenizer_config.json for a class that itself reads no tokenizer.json, or cuts texts in a way of its own."""
        roles = {role: text_of(token) for role, token in self.special.items() if token is not None}
        write_json(target / TOKENIZER_CONFIG, {**self.settings, **roles, "tokenizer_class": "PreTrainedTokenizerFast"})

    def _add_ends(self, tokenizer: Tokenizer) -> None:
        """Puts the tokens that the settings ask for before and after every text."""
        before, after = (
            (name,) if self.settings.get(f"add_{name}") and self.special.get(name) else ()
            for name in ("bos_token", "eos_token")
        )
        if before or after:
            self._add_template(tokenizer, before, after)

    def _add_template(self, tokenizer: Tokenizer, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        """Puts the special tokens of these roles before and after every text."""
        first, last = (
            [text_of(token) for role in roles if (token := self.special.get(role))] for roles in (before, after)
        )
        tokenizer.post_processor = processors.TemplateProcessing(
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
        # Those that the tokenizer has already, but not as special ones.
        present = tokenizer.get_added_tokens_decoder().values()
        tokens += [token for token in present if token.content in roles and not token.special]
        for token in tokens:
            token.special = token.special or token.content in roles
        tokenizer.add_tokens(tokens)


def _raw(token: Any) -> dict[str, Any]:
    """A special token that is found in a text before it is normalised. GPTSw3Tokenizer knows its text only."""
    return {"content": text_of(token), "normalized": False}


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


def compact(content: dict[str, Any]) -> str:
    """A tokenizer.json without white space, and with merges in the shorter of their two forms."""
    model = content.get("model") or {}
    merges = model.get("merges")
    if isinstance(merges, list) and all(isinstance(pair, list) and " " not in "".join(pair) for pair in merges):
        content = content | {"model": model | {"merges": [" ".join(pair) for pair in merges]}}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
