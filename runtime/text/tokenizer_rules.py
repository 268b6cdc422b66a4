"""How much a tokenizer.json may make of a text, checked before the tokenizers library opens it.

Each step rewrites the output of the one before. A few hundred bytes of replacements can turn one letter into billions, even
while the file is opened: added tokens are rewritten then.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from ...models import limits

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Most letters that a step makes of one, where the file doesn't say; 1 for the others.
# https://www.unicode.org/faq/normalization.html
_GROWTH = {"BertNormalizer": 3, "ByteLevel": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}


class _File(msgspec.Struct):
    """The parts of a file that rewrite texts; the vocabulary is skipped."""

    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


def parts(content: bytes) -> dict[str, Any]:
    """The parts of a tokenizer.json that rewrite texts.

    Raises:
        ValueError: it isn't a JSON object.
    """
    try:
        return msgspec.structs.asdict(msgspec.json.decode(content, type=_File))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def fault(content: Mapping[str, Any]) -> str | None:
    """Why a tokenizer's parts could make too much of a text, in words behind "it"; None where they can't."""
    for names in (PARTS[:-1], PARTS[-1:]):  # into tokens, and back
        growths = [_growth(step) for name in names for step in _steps(content.get(name))]
        if len(growths) > limits.TOKENIZER_STEPS:
            return f"has {len(growths):,} steps, more than the {limits.TOKENIZER_STEPS} that may be"
        if (growth := math.prod(growths)) > limits.TOKENIZER_GROWTH:
            return f"can make a text {growth:,} times as long, more than the {limits.TOKENIZER_GROWTH:,} that may be"
    return None


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """What a part is made of, sequences of sequences taken apart."""
    pending = [part]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("type"), str) and one["type"] != "Sequence":
                yield one
            pending += one.values()
        elif isinstance(one, list):
            pending += one


def _growth(step: Mapping[str, Any]) -> int:
    match step:
        case {"type": "Replace", "content": str(new)}:
            # An expression may match between letters.
            plain = isinstance(step.get("pattern"), Mapping) and step["pattern"].get("String")
            return max(1, len(new)) if plain else 1 + len(new)
        case {"type": "Prepend", "prepend": str(new)}:
            return 1 + len(new)
        case {"type": "TemplateProcessing"}:
            return max(len(form) if isinstance(form, list) else 1 for form in (step.get("single"), step.get("pair")))
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            return _longest_entry(table)
    return _GROWTH.get(step["type"], 1)


def _longest_entry(table: str) -> int:
    """Bytes of the longest text in sentencepiece's table of replacements: a trie, before it its size, behind it the texts."""
    try:
        content = base64.b64decode(table)
    except binascii.Error:
        return 1  # the library refuses it
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
