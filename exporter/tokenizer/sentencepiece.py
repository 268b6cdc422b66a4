"""sentencepiece's models, as the content of a tokenizer.json.

A model is a protobuf message: pieces with their scores, and how texts are normalised before they are cut.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto

What is made of it depends on the class that reads it. Those of transformers 5 (transformers/models/*/tokenization_*.py) each have
a normaliser and a splitter of their own, and T5's, XLNet's and ALBERT's expect the unknown token at a fixed id. GPTSw3Tokenizer
lets sentencepiece itself cut texts.
"""

import base64
import logging
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from gpt2onnx.errors import CheckpointError

from ...models import limits, protobuf
from ...models.config import read_small

SPACE = "▁"
# Fields of ModelProto and of the messages in it.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_ALGORITHM, _BYTE_FALLBACK, _UNKNOWN_ID, _UNKNOWN_PIECE = 3, 35, 40, 45
_TABLE, _DUMMY_PREFIX, _FEWER_SPACES, _ESCAPES = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
# Letters of a piece; sentencepiece's own limit is 16 unless told otherwise.
_LONGEST_PIECE = 256
_EXTRA_IDS, _MOST_EXTRA_IDS = 100, 10_000
# GPT-SW3's tokenizer removes the first letters, and replaces the second ones by spaces, before sentencepiece sees a text.
_DROPPED = r"[\x00-\x08\x0b-\x1f\x{7f}-\x{9f}\x{a0}\x{ad}\x{200b}]"
_SPACES = r"[\x{2002}\x{2003}\x{2005}\x{2008}\x{2009}\x{200a}\x{202f}\x{3000}\x{fffc}]"
_log = logging.getLogger(__name__)
_Part = dict[str, Any]


class Piece(NamedTuple):
    """A piece of a model.

    Attributes:
        kind: 1 for a plain one; 3 for a control token, which no text makes; 4 for one that is never cut.
    """

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """A sentencepiece model.

    Attributes:
        pieces: by their ids.
        algorithm: 1 for Unigram, 2 for BPE.
        table: of the normaliser's replacements, as sentencepiece compiles it; empty for none.
        dummy_prefix: put a space before a text.
        fewer_spaces: drop spaces at both ends, and all but one elsewhere.
        escapes: write a space as U+2581.
    """

    path: Path
    pieces: tuple[Piece, ...]
    algorithm: int
    unknown_id: int
    unknown_piece: str
    byte_fallback: bool
    table: bytes
    dummy_prefix: bool
    fewer_spaces: bool
    escapes: bool

    @property
    def ids(self) -> dict[str, int]:
        """Each piece's id."""
        return {piece.text: index for index, piece in enumerate(self.pieces)}


def read_model(path: Path) -> Model:
    """Reads a .model file.

    Raises:
        CheckpointError: it can't be read, is too large, or isn't a sentencepiece model of kind Unigram or BPE.
    """
    content = read_small(path, limits.SENTENCEPIECE)
    try:
        messages = protobuf.messages(content)
        pieces = tuple(map(_piece, messages.get(_PIECES, [])))
        trainer, normalizer = (b"".join(messages.get(field, [])) for field in (_TRAINER, _NORMALIZER))
        numbers, flags = protobuf.numbers(trainer), protobuf.numbers(normalizer)
        texts, tables = protobuf.messages(trainer), protobuf.messages(normalizer)
        unknown_piece = texts.get(_UNKNOWN_PIECE, [b"<unk>"])[-1].decode("utf-8")
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a whole sentencepiece model: {error}") from error
    algorithm = numbers.get(_ALGORITHM, _UNIGRAM)
    if not pieces or algorithm not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"{path} is no sentencepiece model of kind Unigram or BPE")
    return Model(
        path,
        pieces,
        algorithm,
        numbers.get(_UNKNOWN_ID, 0),
        unknown_piece,
        bool(numbers.get(_BYTE_FALLBACK, 0)),
        tables.get(_TABLE, [b""])[-1],
        bool(flags.get(_DUMMY_PREFIX, 1)),
        bool(flags.get(_FEWER_SPACES, 1)),
        bool(flags.get(_ESCAPES, 1)),
    )


def _piece(message: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for field, value in protobuf.fields(message, 0, len(message)):
        if isinstance(value, slice):
            text = message[value].decode("utf-8") if field == _TEXT else text
        elif field == _SCORE:
            (score,) = struct.unpack("<f", struct.pack("<I", value))
        elif field == _KIND:
            kind = value
    if len(text) > _LONGEST_PIECE or not math.isfinite(score):
        raise ValueError("a piece is too long, or its score no number")
    return Piece(text, score, kind)


@dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers that reads sentencepiece models.

    Attributes:
        content: makes a tokenizer.json of a model and tokenizer_config.json, without added tokens.
        before: roles of the tokens that it puts before every text.
        after: and of those behind it.
        matches_raw: added tokens are found in a text before it is normalised.
    """

    content: Callable[[Model, Mapping[str, Any]], _Part]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    matches_raw: bool = False


def _t5(model: Model, settings: Mapping[str, Any]) -> _Part:
    extra = [[text, 0.0] for text in reversed(_extra_ids(settings))]
    steps = [_precompiled(model)] if model.table else []
    return _of_words(model, steps, unknown_id=2, extra=extra)


def _xlnet(model: Model, settings: Mapping[str, Any]) -> _Part:
    return _of_words(model, _like_bert(model, lower=bool(settings.get("do_lower_case", False))), unknown_id=0)


def _albert(model: Model, settings: Mapping[str, Any]) -> _Part:
    accents, lower = bool(settings.get("keep_accents", False)), bool(settings.get("do_lower_case", True))
    steps = _like_bert(model, lower=lower, accents=accents)
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    return _of_words(model, steps, unknown_id=1, scheme=scheme)


def _llama(model: Model, settings: Mapping[str, Any]) -> _Part:
    _expect(model, _BPE)
    prefix = settings.get("add_prefix_space") in (None, True)
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    decoder = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "model": _bpe(model, model.ids, byte_fallback=True),
        "pre_tokenizer": _metaspace(scheme, split=False),
        "decoder": _sequence("decoders", decoder + _first_space(prefix)),
    }


def _reformer(model: Model, settings: Mapping[str, Any]) -> _Part:
    _expect(model, _BPE)
    unknown = settings.get("unk_token", "<unk>")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    steps = [_precompiled(model), _replace({"Regex": " {2,}"}, " ")] if model.table else []
    return {
        "model": _bpe(model, model.ids) | {"unk_token": unknown},
        "normalizer": _sequence("normalizers", steps),
        "pre_tokenizer": _metaspace("always"),
        "decoder": _metaspace("always"),
    }


def _gpt_sw3(model: Model, settings: Mapping[str, Any]) -> _Part:
    """What sentencepiece itself does, behind GPT-SW3's own normaliser."""
    if model.algorithm != _BPE:
        raise CheckpointError(f"{model.path} is no BPE model, which GPTSw3Tokenizer reads: save a tokenizer.json there")
    steps = [_replace({"Regex": _DROPPED}, ""), _replace({"Regex": _SPACES}, " "), {"type": "NFC"}]
    if model.table:
        steps.append(_precompiled(model))
    if model.fewer_spaces:
        # sentencepiece looks for those at the end when they are escaped already.
        ends = rf"\A +|[ {SPACE}]+\z" if model.escapes else r"\A +| +\z"
        steps += [_replace({"Regex": ends}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.escapes:
        steps.append(_replace({"String": " "}, SPACE))
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    order = {piece.text: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    whole = sorted((piece.text for piece in model.pieces if piece.kind == _USER_DEFINED and piece.text), key=len)
    pattern = "|".join(re.escape(text) for text in reversed(whole))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    decoder = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    strips = model.dummy_prefix or model.fewer_spaces
    bpe = _bpe(model, order, byte_fallback=model.byte_fallback)
    return {
        # No merges make those that are never cut.
        "model": bpe | {"unk_token": model.unknown_piece, "ignore_merges": bool(whole)},
        "normalizer": _sequence("normalizers", steps),
        "pre_tokenizer": split if whole else None,
        "decoder": _sequence("decoders", decoder + _first_space(strips)),
    }


CLASSES: Mapping[str, TokenizerClass] = {
    "T5Tokenizer": TokenizerClass(_t5, after=("eos_token",)),
    "XLNetTokenizer": TokenizerClass(_xlnet, after=("sep_token", "cls_token")),
    "AlbertTokenizer": TokenizerClass(_albert, before=("cls_token",), after=("sep_token",)),
    "LlamaTokenizer": TokenizerClass(_llama),
    "ReformerTokenizer": TokenizerClass(_reformer),
    "GPTSw3Tokenizer": TokenizerClass(_gpt_sw3, matches_raw=True),
}


def added_tokens(model: Model, class_name: str, settings: Mapping[str, Any]) -> list[AddedToken]:
    """The pieces that count as added tokens: control tokens, which are special, and those that are never cut."""
    tokens = [
        AddedToken(piece.text, normalized=False, special=piece.kind == _CONTROL)
        for piece in model.pieces
        if piece.kind in (_CONTROL, _USER_DEFINED)
    ]
    if class_name == "T5Tokenizer" and not any("<extra_id_" in token.content for token in tokens):
        tokens += [AddedToken(text, special=True) for text in _extra_ids(settings)]
    return tokens


def _extra_ids(settings: Mapping[str, Any]) -> list[str]:
    """The tokens that T5's class adds to a model's pieces."""
    count = settings.get("extra_ids", _EXTRA_IDS)
    return [f"<extra_id_{index}>" for index in range(min(count, _MOST_EXTRA_IDS) if isinstance(count, int) else 0)]


def _of_words(
    model: Model, steps: list[_Part], *, unknown_id: int, scheme: str = "always", extra: list[list[Any]] | None = None
) -> _Part:
    """A Unigram model of words between spaces."""
    _expect(model, _UNIGRAM)
    vocab = [[piece.text, piece.score] for piece in model.pieces] + (extra or [])
    if unknown_id >= len(vocab):
        raise CheckpointError(f"{model.path} has {len(vocab)} pieces: it isn't of this tokenizer's class")
    if unknown_id != model.unknown_id:
        _log.warning(
            "%s: letters that no piece has become %s, as this tokenizer's class in transformers 5 has it; sentencepiece has %s",
            model.path,
            vocab[unknown_id][0],
            model.unknown_piece,
        )
    return {
        "model": {"type": "Unigram", "unk_id": unknown_id, "vocab": vocab, "byte_fallback": False},
        "normalizer": _sequence("normalizers", steps),
        "pre_tokenizer": _sequence("pretokenizers", [{"type": "WhitespaceSplit"}, _metaspace(scheme)]),
        "decoder": _metaspace(scheme),
    }


def _expect(model: Model, algorithm: int) -> None:
    """Warns where a class takes a model for one of another kind."""
    if model.algorithm != algorithm:
        _log.warning(
            "%s: texts are cut as this tokenizer's class in transformers 5 does, which is not what sentencepiece does",
            model.path,
        )


def _bpe(model: Model, order: Mapping[str, Any], *, byte_fallback: bool = False) -> _Part:
    """A BPE model that merges whatever makes a piece, the first pieces of an order first."""
    found = []
    for text, place in order.items():
        cuts = range(1, len(text))
        found += [(place, cut, text) for cut in cuts if text[:cut] in order and text[cut:] in order]
        if len(found) > limits.MERGES:
            raise CheckpointError(f"{model.path} has more than {limits.MERGES:,} merges: is it another file?")
    return {
        "type": "BPE",
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": model.ids,
        "merges": [[text[:cut], text[cut:]] for _, cut, text in sorted(found)],
    }


def _like_bert(model: Model, *, lower: bool, accents: bool = False) -> list[_Part]:
    """The normaliser that XLNet and ALBERT share."""
    steps = [_replace({"String": quotes}, '"') for quotes in ("``", "''")]
    steps += [] if accents else [{"type": "NFKD"}, {"type": "StripAccents"}]
    steps += [{"type": "Lowercase"}] if lower else []
    return steps + ([_precompiled(model)] if model.table else [])


def _precompiled(model: Model) -> _Part:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.table).decode("ascii")}


def _replace(pattern: Mapping[str, str], content: str) -> _Part:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(scheme: str, *, split: bool = True) -> _Part:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def _first_space(dropped: bool) -> list[_Part]:
    return [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dropped else []


def _sequence(name: str, steps: list[_Part]) -> _Part | None:
    return {"type": "Sequence", name: steps} if steps else None
