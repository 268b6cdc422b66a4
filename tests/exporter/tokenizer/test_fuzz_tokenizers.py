"""Tokenizers that are damaged, hostile or absurd: converted, or refused in one line."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import ALL_BYTES_AND_END, byte_tokenizer
from support.fuzzing import damaged, ends_well, inputs, odd_values, write_json

from gpt2onnx.exporter.tokenizer.convert import write_tokenizer

TOKENS = st.fixed_dictionaries(
    {"content": st.text(max_size=3)}, optional=dict.fromkeys(("lstrip", "normalized", "special", "id"), odd_values)
)
WHOLE = byte_tokenizer(ALL_BYTES_AND_END).to_str().encode()
SETTINGS = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "clean_up_tokenization_spaces": True, "bos_token": "<s>", "add_bos_token": True, "added_tokens_decoder": {"256": {"content": "<|endoftext|>", "special": True}}}  # fmt: skip


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Empties one folder again and again, with an empty folder `target` in it."""
    folder = tmp_path_factory.mktemp("odd")

    def empty() -> Path:
        shutil.rmtree(folder)
        (folder / "target").mkdir(parents=True)
        return folder

    return empty


def convert(folder: Path, vocabulary: int) -> object:
    return ends_well(lambda: write_tokenizer(folder, {"vocab_size": vocabulary}, folder / "target"))


@inputs(few=75)
@given(st.data())
def test_tokenizers_that_are_damaged(empty_folder: Callable[[], Path], data: st.DataObject) -> None:
    folder = empty_folder()
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(SETTINGS)), odd_values, max_size=2))
    write_json(folder / "tokenizer_config.json", SETTINGS | changes)
    (folder / "tokenizer.json").write_bytes(data.draw(damaged(WHOLE)) if data.draw(st.booleans()) else WHOLE)
    if data.draw(st.booleans()):
        roles = st.sampled_from(["bos_token", "pad_token", "additional_special_tokens"])
        write_json(folder / "special_tokens_map.json", data.draw(st.dictionaries(roles, odd_values | TOKENS)))
        added = st.dictionaries(st.text(max_size=4), odd_values, max_size=3)
        write_json(folder / "added_tokens.json", data.draw(added))
    convert(folder, ALL_BYTES_AND_END)


@pytest.mark.parametrize(
    ("file", "content"),
    [("added_tokens.json", added) for added in ({"": []}, {"<a>": math.inf}, {"<a>": 7, "<b>": 7}, {"<a>": "x"}, {"<a>": {}}, {"\ud800": 260}, {"<a>": 10**400})]
    + [("tokenizer_config.json", SETTINGS | odd) for odd in ({"add_bos_token": "\ud800"}, {"pad_token": {"content": "<p>", "lstrip": "x"}}, {"bos_token": {"content": "\ud800"}}, {"tokenizer_class": "\ud800"})],
    ids=ascii,
)  # fmt: skip
def test_tokens_that_were_once_too_odd(file: str, content: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(WHOLE)
    write_json(tmp_path / file, content)
    (tmp_path / "target").mkdir()
    outcome = convert(tmp_path, 300)
    assert file == "added_tokens.json" or isinstance(outcome, str)


@inputs(few=50)
@given(st.data())
def test_vocabularies_that_are_damaged(empty_folder: Callable[[], Path], data: st.DataObject) -> None:
    folder = empty_folder()

    def broken(content: bytes) -> bytes:
        return data.draw(st.one_of(damaged(content), st.binary(max_size=40)))

    if data.draw(st.sampled_from(["bpe", "bpe", "pieces"])) == "bpe":
        odd = data.draw(st.dictionaries(st.text(max_size=3), odd_values, max_size=2))
        write_json(folder / "vocab.json", {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3} | odd)
        (folder / "merges.txt").write_bytes(broken(b"#version: 0.2\na b\n"))
    else:
        (folder / "vocab.txt").write_bytes(broken(b"[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n##b\n"))
    convert(folder, 100)
