"""GPT-2's tokenisation, and text that grows token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import END_OF_TEXT
from support.golden import Golden
from support.tokenizer_files import GPT2_FILES, gpt2_in_transformers, odd_texts

import gpt2onnx
from gpt2onnx.errors import BundleError
from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.text.stop_strings import StopStrings
from gpt2onnx.runtime.text.tokenizer import Tokenizer

GPT2 = {"model_type": "gpt2", "vocab_size": 50257}  # its config.json, as far as it matters here

TEXTS = [
    "",
    " ",
    "hello, world!",
    "It's 12:34 o'clock; they'll've gone  by   now.",
    "line one\nline two\n\n\tindented \r\n end ",
    "Grüße, naïve café — “quoted” …",
    "私は日本語を少し話します。한국어도 조금.",
    "👋🏽 family: 👨‍👩‍👧‍👦 flag: 🇳🇿 done",
    "é as one, é as two characters",
    "zero\u200bwidth \u00a0nbsp \u2028separator",
    f"before{END_OF_TEXT}after",
    "a" * 300,
    "1234567890" * 20,
]
# Every character that UTF-8 can hold.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(GPT2_FILES, GPT2, folder)
    return Tokenizer(folder / "tokenizer.json")


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces that tokens give one after another, the rest at the end last."""
    stream = tokenizer.stream(StopStrings(stop))
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_known_ids_of_gpt2(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hello, world!") == [31373, 11, 995, 0]
    sentence = "Natural language processing helps computers understand text."
    assert tokenizer.encode(sentence) == [35364, 3303, 7587, 5419, 9061, 1833, 2420, 13]
    assert tokenizer.encode(END_OF_TEXT) == [50256]


@pytest.mark.parametrize("samples", [TEXTS, odd_texts()], ids=["texts", "odd texts"])
def test_ids_are_those_of_transformers(samples: list[str], tokenizer: Tokenizer, golden: Golden) -> None:
    def live() -> list[list[object]]:
        reference = gpt2_in_transformers()
        encoded = [reference.encode(sample) for sample in samples]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [[ids, reference.decode(ids, **options)] for ids in encoded]

    for sample, (ids, text) in zip(samples, golden.answer(["GPT-2", samples], live), strict=True):
        assert tokenizer.encode(sample) == ids, ascii(sample)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, ascii(sample)


@given(sample=text)
@settings(max_examples=200)
def test_any_text_comes_back(sample: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_embedded_tokenizer_loads_in_transformers_with_the_same_ids(
    tales_checkpoint: Path, tales_model: gpt2onnx.Model, golden: Golden
) -> None:
    def live() -> list[list[int]]:
        import transformers

        reference = transformers.AutoTokenizer.from_pretrained(tales_checkpoint)
        return [reference.encode(sample) for sample in TEXTS]

    for sample, ids in zip(TEXTS, golden.answer(["tales", TEXTS], live), strict=True):
        assert tales_model.tokenizer.encode(sample) == ids, sample


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', "utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("padding", [{"strategy": {"Fixed": 10**12}}, {"pad_to_multiple_of": 10**12}], ids=str)
def test_padding_of_the_file_s_own_takes_no_memory(padding: dict[str, Any], tmp_path: Path) -> None:
    usual = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    content = json.loads((FOLDER / "tokenizer.json").read_text("utf-8")) | {"padding": usual | pad | padding}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert Tokenizer(tmp_path / "tokenizer.json").encode("Once") == Tokenizer(FOLDER / "tokenizer.json").encode("Once")


@pytest.mark.parametrize("sample", TEXTS)
def test_pieces_make_the_text_and_break_no_character(sample: str, tokenizer: Tokenizer) -> None:
    sample = sample.replace(END_OF_TEXT, "")
    pieces = streamed(tokenizer, tokenizer.encode(sample))
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "", "text that could have been shown before"


@pytest.mark.parametrize("sample", ["a👋b", "日本語", "né", "👨‍👩‍👧‍👦", "\U00010348"])
def test_a_character_of_many_tokens_comes_with_its_last_one(sample: str, tokenizer: Tokenizer) -> None:
    """One token a byte, as a model may well write it."""
    ids = [token for byte in sample.encode() for token in byte_ids(tokenizer)[byte]]
    stream = tokenizer.stream()
    shown = b""
    for index, token in enumerate(ids):
        shown += stream.push(token).encode()
        whole = sample.encode()[: index + 1].decode("utf-8", "ignore").encode()
        assert shown == whole, f"after byte {index}"
    assert stream.finish() == ""


def byte_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Of each byte, the id of the token that is this byte: the first 256, by the order that GPT-2 gives them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    return [[order.index(byte)] for byte in range(256)]


@given(ids=st.lists(st.integers(0, 255), max_size=12))
@settings(max_examples=500)
def test_pieces_of_any_bytes_make_their_text(ids: list[int], tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.data(), sample=st.text("ab 👋é", max_size=30))
@settings(max_examples=300)
def test_nothing_of_a_stop_string_is_shown(data: st.DataObject, sample: str, tokenizer: Tokenizer) -> None:
    stop = tuple(data.draw(st.lists(st.text("ab 👋é", min_size=1, max_size=5), min_size=1, max_size=3)))
    ids = tokenizer.encode(sample)
    # Decoding ends with the first token that completes a stop string.
    texts = [tokenizer.decode(ids[: count + 1]) for count in range(len(ids))]
    count = next((index + 1 for index, part in enumerate(texts) if any(string in part for string in stop)), len(ids))
    places = [text.find(string) for text in texts[count - 1 : count] for string in stop if string in text]
    final = texts[count - 1][: min(places, default=None)] if ids else ""

    stream, shown = tokenizer.stream(StopStrings(stop)), ""
    for token in ids[:count]:
        shown += stream.push(token)
        assert final.startswith(shown), "text was shown that had to be taken back"
    assert shown + stream.finish() == final
    assert not any(string in final for string in stop)


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(letter)[0] for letter in "abxabcz"]
    assert streamed(tokenizer, ids, ("abc",)) == ["", "", "abx", "", "", "", "", ""]
    assert streamed(tokenizer, ids, ("bcd", "q")) == ["a", "", "bx", "a", "", "", "bcz", ""]
