"""Tokenizers that can't read some or any text: one line of error, no trace of a panic, and a job goes on."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from tokenizers import Tokenizer as HuggingFaceTokenizer
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
