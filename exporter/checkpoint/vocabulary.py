"""The files of a folder that hold a tokenizer's vocabulary, in any supported form."""

from pathlib import Path

from ...models.bundle import TOKENIZER

BYTE_LEVEL = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, and OpenAI's
WORD_PIECES = "vocab.txt"
CHARACTERS = "meta.pkl"  # nanoGPT's
_NAMES = (TOKENIZER, *(name for pair in BYTE_LEVEL for name in pair), WORD_PIECES, CHARACTERS)


def vocabulary_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder's tokenizer, sentencepiece models last; none if it has no tokenizer."""
    named = (path for name in _NAMES if (path := folder / name).is_file())
    return (*named, *sorted(folder.glob("*.model")))
