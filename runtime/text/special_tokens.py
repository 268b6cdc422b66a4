"""The special tokens that a tokenizer's settings name, by their roles, as transformers 5 reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2onnx.errors import BundleError, CheckpointError

from ...models.bundle import SPECIAL_TOKENS
from ...models.config import read_if_there

END_OF_TEXT = "<|endoftext|>"
# In transformers' order.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Special tokens of a tokenizer whose files name no others.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "EsmTokenizer": {name: f"<{name[:3]}>" for name in ("eos_token", "unk_token", "pad_token", "cls_token")}
    | {"mask_token": "<mask>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "XLNetTokenizer": _SENTENCEPIECE
    | {"sep_token": "<sep>", "pad_token": "<pad>", "cls_token": "<cls>"}
    | {"mask_token": {"content": "<mask>", "lstrip": True, "normalized": True}},
    "AlbertTokenizer": {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>", "sep_token": "[SEP]"}
    | {"pad_token": "<pad>", "cls_token": "[CLS]", "mask_token": "[MASK]"},
    "LlamaTokenizer": _SENTENCEPIECE,
    "ReformerTokenizer": {"eos_token": "</s>", "unk_token": "<unk>"},
    "GPTSw3Tokenizer": {"bos_token": "<s>", "eos_token": END_OF_TEXT, "unk_token": "<unk>", "pad_token": "<pad>"},
}
# Classes of transformers that are BertTokenizer by another name.
_LIKE_BERT = {
    f"{name}Tokenizer"
    for name in (
        "ConvBert", "DistilBert", "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Electra", "LayoutLM", "Lxmert",
        "MobileBert", "Splinter", "SqueezeBert",
    )
}  # fmt: skip


def class_of(name: object, otherwise: str = "GPT2Tokenizer") -> str:
    """The class of transformers that a `tokenizer_class` stands for, without the ending "Fast"."""
    name = name.removesuffix("Fast") if isinstance(name, str) else otherwise
    return "BertTokenizer" if name in _LIKE_BERT else name


def by_role(class_name: str, settings: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens as text, or as a mapping with their `content`; None for a role that has none.

    Args:
        class_name: see `class_of`.
        settings: tokenizer_config.json.
        older: special_tokens_map.json, which counts only if the settings don't list the added tokens.
    """
    special = dict(DEFAULTS.get(class_name, {}))
    special |= {name: settings[name] for name in settings if name.endswith("_token") and is_token(settings[name])}
    special |= {name: None for name in ROLES if settings.get(name, "") is None}
    return special | {name: token for name, token in older.items() if name.endswith("_token") and is_token(token)}


def is_token(value: object) -> bool:
    """Whether a value of these files can be a token."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def text(token: Any) -> str:
    """A token's text."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def in_folder(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens of a folder's tokenizer as text, by role; `settings` is its tokenizer_config.json."""
    listed = settings.get("added_tokens_decoder") is not None
    older = {} if listed else settings_of(folder / SPECIAL_TOKENS)
    found = by_role(class_of(settings.get("tokenizer_class")), settings, older)
    return {role: text(token) for role, token in found.items() if token is not None}


def settings_of(path: Path) -> dict[str, Any]:
    """A JSON file of a bundle's tokenizer; an empty object where there is none. Raises BundleError if it can't be read."""
    try:
        return read_if_there(path)
    except CheckpointError as error:
        raise BundleError(str(error)) from error
