"""A model without a tokenizer on the command line."""

import json
from pathlib import Path

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.reference import Reference

import gpt2onnx


def test_a_model_without_a_tokenizer(
    tmp_path: Path,
    command_line: CommandLine,
    make_checkpoint: MakeCheckpoint,
    reference_of: type[Reference],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Token ids in and out; text with a tokenizer from elsewhere."""
    folder, bundle = make_checkpoint(vocab_size=257), tmp_path / "bundle"
    reference = reference_of(folder)
    elsewhere = tmp_path / "tokenizer"
    elsewhere.mkdir()
    (folder / "tokenizer.json").rename(elsewhere / "tokenizer.json")
    done = command_line("export", folder, bundle, "--no-parity")
    assert done.code == 0
    assert "has no tokenizer, so the bundle takes and gives token ids" in caplog.text
    assert command_line("verify", bundle).code == 0

    ((expected),) = reference.tokens([5, 6, 7], max_new_tokens=6)
    ids = command_line("generate", "-m", bundle, "--prompt-ids", "5,6,7", "--max-new-tokens", 6)
    assert (ids.code, ids.out) == (0, ",".join(map(str, expected)) + "\n")
    record = json.loads(
        command_line("generate", "-m", bundle, "--prompt-ids", "5,6,7", "--max-new-tokens", 6, "--json").out
    )
    assert (record["sequences"][0]["token_ids"], record["sequences"][0]["text"]) == (expected, "")

    for asked in (("tell",), ("--prompt-ids", "5,6", "--stop", "x")):
        done = command_line("generate", "-m", bundle, *asked)
        assert (done.code, done.out.strip()) == (1, "")
        assert "the model has no tokenizer" in done.err
    own = gpt2onnx.load(make_checkpoint(vocab_size=257)).generate("tell", max_new_tokens=6)
    assert gpt2onnx.load(bundle, tokenizer=elsewhere).generate("tell", max_new_tokens=6).text == own.text
    text = command_line("generate", "tell", "-m", bundle, "--tokenizer", elsewhere, "--max-new-tokens", 6)
    assert (text.code, text.out) == (0, own.text + "\n")
    wrong = command_line("generate", "tell", "-m", bundle, "--tokenizer", tmp_path / "nowhere")
    assert (wrong.code, wrong.err.count("\n")) == (1, 1)
    assert "nowhere has no tokenizer" in wrong.err
