"""Tokenizers that can't read some or any text: one line of error, no trace of a panic, and a job goes on."""

import base64
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bundles import sign
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from tokenizers import Regex as TokenizerRegex
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram, WordLevel, WordPiece

import gpt2onnx
from gpt2onnx.errors import BundleError, CheckpointError, PromptError
from gpt2onnx.models.bundle import TOKENIZER
from gpt2onnx.runtime.text.tokenizer import Tokenizer

# Their vocabularies lack the token for unknown words.
WITHOUT_UNKNOWN = {
    "WordLevel": WordLevel({"a": 0}, unk_token="[UNK]"),
    "WordPiece": WordPiece({"a": 0}, unk_token="[UNK]"),
    "Unigram": Unigram([("a", -1.0)]),
}
BROKEN: dict[str, dict[str, Any]] = {
    "a length of nothing": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a table that isn't one": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a token that isn't there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        }
    },
}
ENDLESS = {"type": "Split", "pattern": {"Regex": "(a+)+$|((x*)*)*y"}, "behavior": "Isolated", "invert": False}
LONG = "a" * 40 + "b"


@pytest.mark.parametrize("kind", WITHOUT_UNKNOWN)
def test_without_a_token_for_unknown_words(
    kind: str,
    make_checkpoint: MakeCheckpoint,
    command_line: CommandLine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = make_checkpoint()
    (source / TOKENIZER).write_text(HuggingFaceTokenizer(WITHOUT_UNKNOWN[kind]).to_str())
    with caplog.at_level(logging.WARNING):
        folder = gpt2onnx.export(source, tmp_path / "bundle").folder
    assert "no token for unknown words" in caplog.text
    done = command_line("verify", folder)
    assert (done.code, done.err) == (0, f"warning: {caplog.messages[0].partition(': ')[2]}\n")
    requests = "".join(json.dumps({"id": name, "prompt": name, "max_new_tokens": 1}) + "\n" for name in ("a", "Ä", "a"))
    done = command_line("generate", "-m", folder, "--input", "-", stdin=requests)
    assert done.code == 0
    known, unknown, again = map(json.loads, done.out.splitlines())
    assert known["prompt_ids"] == again["prompt_ids"] == [0]
    assert set(unknown) == {"id", "error"}
    assert "can't read the text" in unknown["error"]
    assert command_line("tokens", "-m", folder, "Ä").err.count("\n") == 1


@pytest.mark.parametrize("fault", BROKEN)
def test_that_read_no_text(
    fault: str, tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((tales_bundle / TOKENIZER).read_text("utf-8")) | BROKEN[fault]
    (tmp_path / TOKENIZER).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"can't (be read|read any text): .+") as caught:
        Tokenizer(tmp_path / TOKENIZER)
    assert "\n" not in str(caught.value)
    for path in tales_checkpoint.iterdir():
        if path.name != TOKENIZER:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}.* can't (be read|read any text): .+") as refused:
        gpt2onnx.export(tmp_path, tmp_path / "bundle")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()
    assert capfd.readouterr().err == ""


def replacements(count: int, pattern: dict[str, str], new: str) -> list[dict[str, Any]]:
    return [{"type": "Replace", "pattern": pattern, "content": new}] * count


PIECE = {"Sequence": {"id": "A", "type_id": 0}}
GROWING: dict[str, dict[str, Any]] = {
    "a normaliser": {"normalizer": {"type": "Sequence", "normalizers": replacements(5, {"String": "a"}, "a" * 100)}},
    "an expression that matches nothing": {
        "normalizer": {"type": "Sequence", "normalizers": replacements(20, {"Regex": ""}, "a")}
    },
    "sequences in sequences": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": replacements(5, {"String": "a"}, "a" * 9)}] * 5,
        }
    },
    "a decoder": {"decoder": {"type": "Sequence", "decoders": replacements(5, {"String": "a"}, "a" * 100)}},
    "a splitter": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ]
            * 31,
        }
    },
    "a template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [PIECE] * 6000,
            "pair": [PIECE],
            "special_tokens": {},
        }
    },
    "a table": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(bytes(4) + b"a" * 6000 + b"\0").decode(),
        }
    },
    "many steps": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 40}},
}


@pytest.mark.parametrize("kind", GROWING)
def test_that_make_far_too_much_of_a_text(
    kind: str, tales_checkpoint: Path, tales_bundle: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    """Even an added token would be rewritten, while the file is opened."""
    content = json.loads((tales_bundle / TOKENIZER).read_text("utf-8")) | GROWING[kind]
    content["added_tokens"].append(
        content["added_tokens"][0] | {"content": "aaa", "normalized": True, "special": False}
    )
    (tmp_path / TOKENIZER).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"can make a text .* times as long|has 41 steps") as caught:
        Tokenizer(tmp_path / TOKENIZER)
    assert "\n" not in str(caught.value)
    for path in tales_checkpoint.iterdir():
        if path.name != TOKENIZER:
            (tmp_path / path.name).symlink_to(path)
    done = command_line("export", tmp_path, tmp_path / "bundle", "--no-twin")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "that may be" in done.err
    bundle = shutil.copytree(tales_bundle, tmp_path / "whole")
    shutil.copy(tmp_path / TOKENIZER, bundle)
    sign(bundle)
    assert "that may be" in command_line("verify", bundle).err


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([
            normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(), normalizers.StripAccents(),
            normalizers.Lowercase(), normalizers.Replace(TokenizerRegex(" {2,}"), " ")]), "pre_tokenizer": pre_tokenizers.Metaspace()},
        {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
         "post_processor": processors.TemplateProcessing("[CLS] $0 [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)])},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
         "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(), "post_processor": processors.ByteLevel(), "decoder": decoders.ByteLevel()},
    ],
    ids=["ALBERT", "BERT", "Llama", "GPT-2"],
)  # fmt: skip
def test_known_tokenizers_are_allowed(parts: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(tmp_path / TOKENIZER))
    assert Tokenizer(tmp_path / TOKENIZER).encode("a")


def test_a_file_of_hundreds_of_megabytes(tmp_path: Path) -> None:
    with (tmp_path / TOKENIZER).open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(BundleError, match="more than the 67,108,864 bytes"):
        Tokenizer(tmp_path / TOKENIZER)


def test_a_regular_expression_that_takes_forever(
    tales_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((tales_bundle / TOKENIZER).read_text("utf-8")) | {"pre_tokenizer": ENDLESS}
    (tmp_path / TOKENIZER).write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path / TOKENIZER)
    for read in (tokenizer.encode, tokenizer.encode_with_spans):
        with pytest.raises(PromptError, match=r"can't read the text: .*retry-limit") as caught:
            read(LONG)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("b")
