"""Tokenizers of sentencepiece models: the bundle's ids and texts are those of transformers' own classes.

golden/make_sentencepiece.py had sentencepiece train the models.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import damaged, ends_well, inputs
from support.golden import FOLDER, Golden
from support.isolated import COMMAND_LINE, run
from support.tokenizer_files import TEXTS, Judge, odd_texts, write

from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.exporter.tokenizer.sentencepiece import read_model
from gpt2onnx.models import limits
from gpt2onnx.runtime.text.tokenizer import Tokenizer

MODELS = FOLDER / "sentencepiece"
MANY = [
    *TEXTS,
    "私は今日、学校へ行きました。 東京は日本の首都です。",
    "Det var en gång en flicka\u2003som  hette\u3000Rödluvan.\u00ad \uff21\uff22 ½",
    "print('hej')<|python|>def f(x): <|javascript|> 12345 <|endoftext|>\n\n\tja",
    "<s> <unk>a</s>b [MASK] c<mask>  d <eop><eod>. (x) [PAD][CLS] y [SEP] <extra_id_0>z<extra_id_99>",
    "``quoted'' ▁ already ▁▁there ▁",
    *odd_texts(),
]
# What rinna/japanese-gpt2-medium has.
RINNA = {
    "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
    "mask_token": "[MASK]", "extra_ids": 0, "additional_special_tokens": [], "sp_model_kwargs": {}, "do_lower_case": True,
}  # fmt: skip
WITH_A_SPACE = {
    "__type": "AddedToken",
    "content": "<|endoftext|>",
    "normalized": True,
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("japanese", RINNA | {"tokenizer_class": "T5Tokenizer"}),
    ("japanese", {"tokenizer_class": "ReformerTokenizer"}),
    ("t5", {"tokenizer_class": "T5Tokenizer"}),
    ("t5", {"tokenizer_class": "T5TokenizerFast", "extra_ids": 3, "additional_special_tokens": ["<extra_id_0>"]}),
    ("xlnet", {"tokenizer_class": "XLNetTokenizer"}),
    ("xlnet", {"tokenizer_class": "XLNetTokenizer", "do_lower_case": True, "additional_special_tokens": ["<eop>", "<eod>"]}),
    ("albert", {"tokenizer_class": "AlbertTokenizer"}),
    ("albert", {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True, "add_prefix_space": False}),
    ("reformer", {"tokenizer_class": "ReformerTokenizer", "add_eos_token": True}),
    ("llama", {"tokenizer_class": "LlamaTokenizer"}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": True}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "pad_token": "<pad>"}),
    ("sw3", {"tokenizer_class": "GPTSw3Tokenizer"}),
    ("sw3", {"tokenizer_class": "GPTSw3Tokenizer", "additional_special_tokens": ["<new>"], "eos_token": WITH_A_SPACE}),
    ("sw3_spaces", {"tokenizer_class": "GPTSw3Tokenizer"}),
    # Pieces that are never cut, as special tokens.
    ("xlnet", {"tokenizer_class": "XLNetTokenizer", "pad_token": "<eop>"}),
    ("xlnet", {"tokenizer_class": "XLNetTokenizer", "added_tokens_decoder": {"8": WITH_A_SPACE | {"content": "<eop>", "special": True}}}),
    ("sw3", {"tokenizer_class": "LlamaTokenizer", "pad_token": "<|python|>"}),
    # Names of special tokens don't take the place of the model's own.
    ("xlnet", {"tokenizer_class": "XLNetTokenizer", "extra_special_tokens": {"image_token": "<image>"}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def judge(golden: Golden) -> Judge:
    return Judge(golden)


def checkpoint(folder: Path, model: str, settings: dict[str, Any]) -> Path:
    llama = str(settings.get("tokenizer_class")).startswith("Llama")
    shutil.copyfile(MODELS / f"{model}.model", folder / ("tokenizer.model" if llama else "spiece.model"))
    return write(folder, tokenizer_config_json=settings)


@pytest.mark.parametrize(("model", "settings"), CASES, ids=str)
def test_ids_and_texts(model: str, settings: dict[str, Any], judge: Judge, tmp_path: Path) -> None:
    judge.assert_agrees([model, settings], checkpoint(tmp_path, model, settings), MANY)


def test_the_class_that_config_json_names(judge: Judge, tmp_path: Path) -> None:
    """As the first of rinna's models have it, beside special_tokens_map.json."""
    shutil.copyfile(MODELS / "japanese.model", tmp_path / "spiece.model")
    roles = {name: value for name, value in RINNA.items() if name.endswith("_token")}
    write(tmp_path, config_json={"tokenizer_class": "T5Tokenizer"}, special_tokens_map_json=roles)
    write(tmp_path, config_json={"tokenizer_class": "T5Tokenizer"}, tokenizer_config_json={"extra_ids": 0})
    judge.assert_agrees("class in config.json", tmp_path)


def test_another_unknown_token_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5 has T5's unknown token at id 2 whatever the model says."""
    (tmp_path / "target").mkdir()
    with caplog.at_level(logging.WARNING):
        write_tokenizer(
            checkpoint(tmp_path, "japanese", RINNA | {"tokenizer_class": "T5Tokenizer"}),
            {"vocab_size": 300},
            tmp_path / "target",
        )
    assert "letters that no piece has become </s>" in caplog.text
    ids = Tokenizer(tmp_path / "target" / "tokenizer.json").encode("☃", add_special_tokens=False)
    assert ids[-1] == 2


def test_pieces_that_the_network_has_no_rows_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T5's class adds 100 pieces, which a network trained without them doesn't have."""
    pieces = len(read_model(MODELS / "t5.model").pieces)
    (tmp_path / "target").mkdir()
    write_tokenizer(
        checkpoint(tmp_path, "t5", {"tokenizer_class": "T5Tokenizer"}), {"vocab_size": pieces}, tmp_path / "target"
    )
    Tokenizer(tmp_path / "target" / "tokenizer.json").check(pieces, thorough=True)
    assert "no rows for: <extra_id_" in caplog.text


@pytest.mark.parametrize("class_name", ["CpmTokenizer", "CamembertTokenizer", None])
def test_other_classes_are_refused(class_name: str | None, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    settings = {} if class_name is None else {"tokenizer_class": class_name}
    with pytest.raises(CheckpointError, match="doesn't tell how a") as caught:
        write_tokenizer(checkpoint(tmp_path, "xlnet", settings), {"vocab_size": 300}, tmp_path / "target")
    assert (class_name or "GPT2Tokenizer") in str(caught.value)
    assert len(str(caught.value)) - len(str(tmp_path)) < 250
    assert "\n" not in str(caught.value)


def test_neither_transformers_nor_sentencepiece_is_needed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "sw3", {"tokenizer_class": "GPTSw3Tokenizer"})
    program = (
        "import sys; from pathlib import Path; from gpt2onnx.exporter.tokenizer.convert import write_tokenizer;"
        "folder = Path(sys.argv[1]); (folder / 'target').mkdir(); write_tokenizer(folder, {'vocab_size': 700}, folder / 'target')"
    )
    without = ("sentencepiece", "transformers", "torch", "google.protobuf")
    status, _, err = run(program, folder, without=without)
    assert (status, err) == (0, "")
    assert (folder / "target" / "tokenizer.json").is_file()


# Files that are damaged or hostile.


def message(number: int, content: bytes) -> bytes:
    """A field of a protobuf message that holds a text or a message."""
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def convert(folder: Path, content: bytes, class_name: str) -> object:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "target").mkdir(parents=True)
    write(folder, tokenizer_config_json={"tokenizer_class": class_name})
    (folder / "spiece.model").write_bytes(content)
    return ends_well(lambda: write_tokenizer(folder, {"vocab_size": 100_000}, folder / "target"))


@pytest.mark.parametrize(("model", "class_name"), [("t5", "T5Tokenizer"), ("sw3", "GPTSw3Tokenizer"), ("xlnet", "LlamaTokenizer")])  # fmt: skip
def test_damaged_models(model: str, class_name: str, tmp_path: Path) -> None:
    @inputs(few=40)
    @given(damaged((MODELS / f"{model}.model").read_bytes()))
    def check(content: bytes) -> None:
        convert(tmp_path / "odd", content, class_name)

    check()


@inputs(few=40)
@given(st.data())
def test_tables_of_replacements_that_are_damaged(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    table = read_model(MODELS / "t5.model").table
    pieces = b"".join(message(1, message(1, text)) for text in (b"a", b"b", b"<unk>", b"</s>"))
    content = pieces + message(3, message(2, data.draw(damaged(table))))
    convert(tmp_path_factory.getbasetemp() / "table", content, "T5Tokenizer")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no sentencepiece model"),
        (b"not a model", "is not a whole sentencepiece model"),
        (message(1, message(1, b"\xff\xfe")), "is not a whole sentencepiece model"),
        (message(1, message(1, b"a") + b"\x15\x00\x00\xc0\x7f"), "its score no number"),
        (message(1, message(1, b"a" * 257)), "a piece is too long"),
        (message(1, message(1, b"a")), "has 1 pieces: it isn't of this tokenizer's class"),
        (message(1, message(1, b"a")) + message(2, b"\x18\x04"), "no sentencepiece model of kind Unigram or BPE"),
        (bytes(limits.SENTENCEPIECE + 1), "has more than the 16,777,216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told(content: bytes, words: str, tmp_path: Path) -> None:
    assert words in str(convert(tmp_path / "odd", content, "AlbertTokenizer"))


def test_many_merges(tmp_path: Path) -> None:
    """All texts of two letters up to a length: each merges wherever it is cut."""
    texts = [f"{number:b}"[1:].encode() for number in range(2, 2**17)]
    content = b"".join(message(1, message(1, text)) for text in texts)
    assert "has more than 1,000,000 merges" in str(convert(tmp_path / "odd", content, "LlamaTokenizer"))


def test_a_table_that_makes_texts_long(tmp_path: Path) -> None:
    table = (4).to_bytes(4, "little") + bytes(4) + b"x" * 100_000
    content = message(1, message(1, b"a")) + message(3, message(2, table))
    assert "can make a text" in str(convert(tmp_path / "odd", content, "T5Tokenizer"))


def test_a_broken_model_ends_an_export_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "other_formats" / "mlx", tmp_path / "model")
    (tmp_path / "model" / "spiece.model").write_bytes(b"broken")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    status, out, err = run(COMMAND_LINE, "export", tmp_path / "model", tmp_path / "bundle")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "spiece.model is not a whole sentencepiece model" in err
