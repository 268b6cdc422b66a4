"""Writes tests/golden/sentencepiece: small models that sentencepiece itself trained, with the pieces that published ones have.

    python tests/golden/make_sentencepiece.py

needs sentencepiece.
"""

import io
import os
from pathlib import Path
from typing import Any

import sentencepiece

FOLDER = Path(__file__).parent / "sentencepiece"
SENTENCES = """\
Once upon a time there was a little girl named Lily. She liked to play in the park.
It's a nice day, isn't it? The value is 12,345 and 67; he'll've gone to the clock.
Before we proceed any further, hear me speak. Speak, speak. You are all resolved.
def f(x): return {'a': x[0] ** 2, "b": x != None} # done
Svenska är kul, och ett vackert språk. Det var en gång en liten flicka som hette Rödluvan.
Grüße, naïve café, “quoted” … ÄÖÜ ß. L'année dernière à l'école.
私は今日、学校へ行きました。猫が好きです。犬も好きです。
日本語のモデルを作る。東京は日本の首都です。カタカナとひらがな。
今天天气很好。我们去公园吧。他在学校学习中文。
두 사람이 한국어를 조금 합니다. Привет, мир! Как дела?
""".splitlines()
# A few replacements of NFKC, whose whole table is 240 kB.
REPLACEMENTS = ["FF21\t41", "FF76\t30AB", "FF85\t30CA", "A0\t20", "3000\t20", "AD\t", "200B\t20", "BD\t31 2044 32"]


def train(name: str, **options: Any) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (FOLDER / f"{name}.model").write_bytes(model.getvalue())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    os.chdir(FOLDER)  # a model names the file of its replacements
    rules = Path("rules.tsv")
    rules.write_text("\n".join(REPLACEMENTS) + "\n")
    control = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    unigram = {"model_type": "unigram", "vocab_size": 400, "character_coverage": 0.98}
    bpe = {"model_type": "bpe", "vocab_size": 620}
    plain = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train("japanese", **unigram, control_symbols=control)  # rinna's
    train("t5", **unigram, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_tsv=str(rules))
    train(
        "xlnet",
        **unigram,
        control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
        user_defined_symbols=["<eop>", ".", "("],
        normalization_rule_tsv=str(rules),
    )
    train("albert", **unigram, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=control[1:], normalization_rule_tsv=str(rules))  # fmt: skip
    train("reformer", **bpe, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_tsv=str(rules))
    train("llama", **bpe, **plain)
    # GPT-SW3's
    code = ["<|javascript|>", "<|python|>"]
    sw3 = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "eos_piece": "<|endoftext|>", "split_digits": True}
    train("sw3", **bpe, **plain, **sw3, user_defined_symbols=code)
    train("sw3_spaces", **bpe, **sw3, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False)
    rules.unlink()


if __name__ == "__main__":
    main()
