"""Whatever form a checkpoint's tokenizer has, its ids and texts in the bundle are those of transformers."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.checkpoints import END_OF_TEXT, MakeCheckpoint, byte_tokenizer
from support.commands import CommandLine
from support.golden import Golden
from support.systems import UNREADABLE, linux
from support.tokenizer_files import GPT2_FILES, TEXTS, Judge, differences, in_transformers, write
from tokenizers import decoders, models, normalizers, pre_tokenizers

import gpt2onnx
from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.runtime.text.tokenizer import Tokenizer

END = 1000  # most tests need only the first merges of GPT-2's vocabulary


@pytest.fixture(scope="module")
def judge(golden: Golden) -> Judge:
    return Judge(golden)


@pytest.fixture(scope="module")
def first_merges() -> tuple[str, str]:
    """vocab.json and merges.txt of the first END tokens."""
    ids = json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))
    vocabulary = {token: index for token, index in ids.items() if index < END} | {END_OF_TEXT: END}
    lines = (GPT2_FILES / "vocab.bpe").read_text("utf-8").split("\n")
    return json.dumps(vocabulary), "\n".join(lines[: 1 + END - 256]) + "\n"


@pytest.fixture
def byte_level(first_merges: tuple[str, str], tmp_path: Path) -> Path:
    for name, content in zip(("vocab.json", "merges.txt"), first_merges, strict=True):
        (tmp_path / name).write_text(content, "utf-8")
    return tmp_path


NEW = {"lstrip": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    {
        "nothing else": {},
        "prefix space": {"tokenizer_config_json": {"add_prefix_space": True}},
        "CodeGen's class": {"tokenizer_config_json": {"tokenizer_class": "CodeGenTokenizer"}},
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
def test_vocab_json_and_merges(files: tuple[str, dict[str, Any]], byte_level: Path, judge: Judge) -> None:
    judge.assert_agrees(files[0], write(byte_level, **files[1]))


def test_tokens_with_a_role_are_special_even_if_tokenizer_json_says_otherwise(
    first_merges: tuple[str, str], tmp_path: Path, judge: Judge
) -> None:
    """As after `tokenizer.add_tokens(["<end>"])`, `tokenizer.eos_token = "<end>"`, and saving: texts end without it."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for name, content in zip(("vocab.json", "merges.txt"), first_merges, strict=True):
        (tmp_path / name).write_text(content, "utf-8")
    write_tokenizer(write(tmp_path), {"vocab_size": END + 8}, plain)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    tokenizer = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    tokenizer.add_tokens(["<end>", "<pad>", "<other>"])
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    write(
        tmp_path,
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config_json=roles,
        special_tokens_map_json={"pad_token": "<pad>"},
    )
    judge.assert_agrees("roles of plain tokens", tmp_path, [*TEXTS, "a<pad> deal<end>", "<other> one<end>"])


def with_hugging_face_s_names(folder: Path) -> None:
    """GPT-2's whole vocabulary."""
    folder.mkdir()
    for openai, hugging_face in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(GPT2_FILES / openai, folder / hugging_face)


def test_openai_s_own_file_names_and_all_of_its_vocabulary(golden: Golden, tmp_path: Path) -> None:
    own, bundle = (tmp_path / name for name in ("own", "bundle"))
    for folder in (own, bundle):
        folder.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(GPT2_FILES / name, own / name)
    write_tokenizer(own, {"vocab_size": 50257}, bundle)

    def live() -> Any:
        with_hugging_face_s_names(tmp_path / "named")
        return in_transformers(write(tmp_path / "named"))

    assert differences(bundle, golden.answer(["GPT-2's own", TEXTS], live)) == []


@pytest.mark.parametrize("vocabulary", [50257, 50304])
def test_a_checkpoint_without_a_tokenizer_has_gpt2_s_own_where_it_fits(
    vocabulary: int, golden: Golden, tmp_path: Path
) -> None:
    """As GPTModel's and nanoGPT's, which are trained with that and saved without it."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_tokenizer(tmp_path, {"vocab_size": vocabulary}, bundle)

    def live() -> Any:
        with_hugging_face_s_names(tmp_path / "named")
        return in_transformers(write(tmp_path / "named", config_json={"vocab_size": vocabulary}))

    assert differences(bundle, golden.answer(["GPT-2's own", TEXTS], live)) == []
    vocab = json.loads((bundle / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert vocab == json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))


def test_the_characters_of_a_nanogpt_data_set(golden: Golden, tmp_path: Path) -> None:
    letters = sorted(set("First Citizen:\nBefore we proceed any further, hear me speak. é今"))
    ids = {letter: index for index, letter in enumerate(letters)}
    table = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(letters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_tokenizer(tmp_path, {"vocab_size": len(ids)}, bundle)
    write(bundle)
    texts = ["First Citizen:\nBefore we proceed", "  speak.  \n\n é今", "F"]

    def live() -> Any:
        import transformers

        reference = transformers.AutoTokenizer.from_pretrained(bundle)
        return [[reference.encode(text), reference.decode(reference.encode(text))] for text in texts]

    wanted = [[[ids[letter] for letter in text], text] for text in texts]
    tokenizer = Tokenizer(bundle / "tokenizer.json")
    assert [[tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))] for text in texts] == wanted
    assert golden.answer(["characters", texts], live) == wanted


@pytest.mark.parametrize(
    "content",
    [{"stoi": {"ab": 1}}, {"stoi": {"a": -1}}, {"stoi": {"a": 2**40}}, {"stoi": {"\ud800": 0}}, {}, [1], Path("x")],
    ids=ascii,
)
def test_another_meta_pkl_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"meta\.pkl"):
        write_tokenizer(tmp_path, {"vocab_size": 10}, tmp_path)


def test_tokenizer_json_comes_along_without_its_layout(byte_level: Path, judge: Judge) -> None:
    judge.save("byte level", write(byte_level))
    for name in ("vocab.json", "merges.txt"):
        (byte_level / name).unlink(missing_ok=True)
    bundle = judge.assert_agrees("tokenizer.json", byte_level)
    found, given = (tokenizers.Tokenizer.from_file(str(each / "tokenizer.json")) for each in (bundle, byte_level))
    assert found.to_str() == given.to_str()
    sizes = [(each / "tokenizer.json").stat().st_size for each in (bundle, byte_level)]
    assert sizes[0] < sizes[1] / 2, "GPT-2's own would take 3.6 MB of a bundle instead of 1.4"


def test_settings_beside_tokenizer_json_count(byte_level: Path, judge: Judge) -> None:
    judge.save("byte level", write(byte_level))
    path = byte_level / "tokenizer_config.json"
    settings = {"add_prefix_space": True, "pad_token": "<pad>", "additional_special_tokens": ["<sep>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    judge.assert_agrees("settings beside tokenizer.json", byte_level)


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "GPT2Tokenizer"}], ids=str)
def test_tokenizer_json_keeps_its_normaliser_and_splitter(
    settings: dict[str, Any], byte_level: Path, tmp_path: Path
) -> None:
    """GPT2Tokenizer of transformers 5 drops both (docs/differences.md)."""
    bpe = models.BPE.from_file(str(byte_level / "vocab.json"), str(byte_level / "merges.txt"))
    trained = tokenizers.Tokenizer(bpe)
    trained.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    digits = pre_tokenizers.Digits(individual_digits=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trained.decoder = decoders.ByteLevel()
    trained.save(str(write(tmp_path, tokenizer_config_json=settings) / "tokenizer.json"))
    (tmp_path / "bundle").mkdir()
    write_tokenizer(tmp_path, {"vocab_size": END + 1}, tmp_path / "bundle")
    mine = Tokenizer(tmp_path / "bundle" / "tokenizer.json")
    for text in ("HELLO 12345 ﬁne Café", "The  Fox\n2024"):
        assert mine.encode(text) == trained.encode(text).ids


def test_any_other_tokenizer_json_stays_what_it_is(judge: Judge, tmp_path: Path) -> None:
    letters = sorted({letter for text in TEXTS for letter in text})[:-40]  # the others are unknown
    pieces = ["▁", "▁he", "llo", "▁and", "ing", "▁the", "ti", "今天", *letters]
    scored = [("<unk>", 0.0), *((piece, -1 - index / 100) for index, piece in enumerate(pieces))]
    unigram = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(["<unk>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": True,
    }
    judge.assert_agrees("unigram", write(tmp_path, tokenizer_config_json=settings))


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
        {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False},
        {"tokenizer_class": "ElectraTokenizerFast", "strip_accents": False},
        {"tokenizer_class": "MobileBertTokenizer", "do_lower_case": True},
        {"tokenizer_class": "BertTokenizerFast", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "<pad>"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_bert_s_word_pieces(form: str, settings: dict[str, Any] | None, judge: Judge, tmp_path: Path) -> None:
    pieces = "\n".join(dict.fromkeys(PIECES)) + "\n"
    # As the Chinese models have it: config.json names the tokenizer's class.
    files = {"config_json": {"tokenizer_class": "BertTokenizer"}, "vocab_txt": pieces}
    if settings is not None:
        files["tokenizer_config_json"] = settings
    write(tmp_path, **files)
    if form == "tokenizer.json":
        judge.save(["pieces", settings], tmp_path)
        (tmp_path / "vocab.txt").unlink()
    judge.assert_agrees(["pieces", settings], tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab", "unk_token": "[UNK]"},
        {"tokenizer_class": "RoFormerTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
    ],
    ids=str,
)
def test_other_classes_with_word_pieces_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """They cut words by rules of their own, such as MeCab's and jieba's."""
    write(tmp_path, vocab_txt="\n".join(dict.fromkeys(PIECES)) + "\n", tokenizer_config_json=settings)
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match="doesn't tell how") as caught:
        write_tokenizer(tmp_path, {"vocab_size": 50300}, tmp_path / "target")
    assert settings["tokenizer_class"] in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["Roberta", "Bart", "Longformer", "CLIP", "Whisper", "Blenderbot", "Qwen2", "GPTNeoX", "Mine"]
)
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_other_classes_with_merges_are_refused(place: str, name: str, byte_level: Path) -> None:
    """They put tokens around texts, cut numbers into digits, begin texts with a space, or have other special tokens."""
    settings = {"tokenizer_class": f"{name}TokenizerFast"}
    write(byte_level, config_json=settings if place == "config.json" else {}, tokenizer_config_json={})
    (byte_level / place).write_text(json.dumps(settings))
    (byte_level / "target").mkdir()
    with pytest.raises(CheckpointError, match=f"vocab.json doesn't tell how a '{name}Tokenizer' cuts texts") as caught:
        write_tokenizer(byte_level, settings | {"vocab_size": 50300}, byte_level / "target")
    assert "put a tokenizer.json there, as AutoTokenizer of transformers saves it" in str(caught.value)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_general_class_with_merges_is_gpt2_s(name: str, byte_level: Path) -> None:
    found = []
    for settings in ({"tokenizer_class": name}, {"tokenizer_class": "GPT2Tokenizer"}):
        write(byte_level, tokenizer_config_json=settings | {"eos_token": END_OF_TEXT})
        target = byte_level / settings["tokenizer_class"]
        target.mkdir()
        write_tokenizer(byte_level, {"vocab_size": END + 1}, target)
        found.append([Tokenizer(target / "tokenizer.json").encode(text) for text in TEXTS])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["do_lower_case", "tokenize_chinese_chars", "strip_accents"])
def test_a_setting_of_bert_s_that_is_a_text(name: str, tmp_path: Path) -> None:
    write(tmp_path, vocab_txt="\n".join(dict.fromkeys(PIECES)), tokenizer_config_json={name: "yes"})
    (tmp_path / "target").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json can't be used: [^\n]*'str'[^\n]*$"):
        write_tokenizer(tmp_path, {"vocab_size": 300}, tmp_path / "target")


PROTEINS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>", "hello", "is"]


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "EsmTokenizer"},
        {
            "tokenizer_class": "EsmTokenizer",
            "cls_token": "<mask>",
            "eos_token": "-",
            "additional_special_tokens": ["<new>"],
        },
    ],
    ids=str,
)
def test_esm_s_whole_tokens(settings: dict[str, Any], judge: Judge, tmp_path: Path) -> None:
    write(tmp_path, vocab_txt="\n".join(PROTEINS) + "\n", tokenizer_config_json=settings)
    judge.assert_agrees(["proteins", settings], tmp_path)


def test_cleaned_text_grows_into_the_same_text(judge: Judge, tmp_path: Path) -> None:
    """Token by token, whatever the next token does to spaces that were already there."""
    settings = {"clean_up_tokenization_spaces": True}
    write(
        tmp_path,
        config_json={"tokenizer_class": "BertTokenizer"},
        vocab_txt="\n".join(dict.fromkeys(PIECES)),
        tokenizer_config_json=settings,
    )
    tokenizer = Tokenizer(judge.assert_agrees(["pieces", settings], tmp_path) / "tokenizer.json")
    unique = list(dict.fromkeys(PIECES))
    some = [unique.index(token) for token in ("it", "'", "s", "n't", "t", ".", ",", "re", "天", "a")]
    sequences = [[first, second, third] * 3 for first in some for second in some for third in some]

    def live() -> list[str]:
        import transformers

        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        return [reference.decode(ids) for ids in sequences]

    shown_early = 0
    for ids, text in zip(sequences, judge.golden.answer(["cleaned up", sequences], live), strict=True):
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        shown_early += any(pieces)
        assert "".join([*pieces, stream.finish()]) == text, ids
    assert shown_early > len(sequences) / 4


def spoil(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "vocab.json alone"),
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


@linux
def test_a_file_that_can_t_be_read_is_named(byte_level: Path) -> None:
    (byte_level / "chat_template.jinja").symlink_to(UNREADABLE)
    target = byte_level / "target"
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"can't read .*chat_template\.jinja"):
        write_tokenizer(byte_level, {"vocab_size": END + 1}, target)


def test_an_added_token_that_the_network_has_no_row_for_is_left_out(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, command_line: CommandLine, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a padding token of a fine-tuned model; in transformers, a text with it ends in an index error."""
    checkpoint = make_checkpoint()
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert tokenizer.encode("<pad>").ids == [257]
    done = command_line("export", checkpoint, tmp_path / "bundle", "--no-parity")
    assert done.code == 0, done.err
    assert "no rows for: <pad>" in caplog.text
    assert command_line("verify", tmp_path / "bundle").code == 0
    model = gpt2onnx.load(tmp_path / "bundle", threads=1)
    assert model.tokenizer.decode(model.generate("<pad>", max_new_tokens=1).prompt_ids) == "<pad>"


def test_tokens_before_every_text_need_a_row(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no row"):
        gpt2onnx.export(checkpoint, tmp_path / "bundle")
