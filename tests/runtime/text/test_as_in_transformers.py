"""A tokenizer is called as those of transformers, and what it returns is continued as transformers continues it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.golden import Golden
from support.reference import Reference
from support.tokenizer_files import GPT2_FILES, write
from support.versions import skip_with_transformers_4

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.models.tales import FOLDER
from gpt2onnx.runtime.text.tokenizer import Tokenizer

TEXTS = ["Once upon a time", "The king", "It's   the <|endoftext|> end 👋🏽."]
END = 8191
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

# The same call of both tokenizers.
CONFIG = {"model_type": "gpt2", "vocab_size": 50257}
CALLS: dict[str, Callable[[Any], Any]] = {
    "a text": lambda tokenizer: dict(tokenizer(TEXTS[0])),
    "attributes": lambda tokenizer: [tokenizer(TEXTS[0]).input_ids, tokenizer(TEXTS[0]).attention_mask],
    "an empty text": lambda tokenizer: dict(tokenizer("")),
    "texts": lambda tokenizer: dict(tokenizer(TEXTS)),
    "without special tokens": lambda tokenizer: dict(tokenizer(TEXTS, add_special_tokens=False)),
    "padding": lambda tokenizer: dict(tokenizer(TEXTS, padding=True)),
    "to the longest": lambda tokenizer: dict(tokenizer(TEXTS[:2], padding="longest")),
    "arrays": lambda tokenizer: listed(tokenizer(TEXTS, padding=True, return_tensors="np")),
    "an array of one": lambda tokenizer: listed(tokenizer(TEXTS[0], return_tensors="np")),
    "length": len,
    "vocabulary": lambda tokenizer: tokenizer.vocab_size,
    "roles": lambda tokenizer: [[getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")] for role in ROLES],
    "pieces": lambda tokenizer: [tokenizer.tokenize(text) for text in TEXTS],
    "ids to tokens": lambda tokenizer: tokenizer.convert_ids_to_tokens([0, 300, END]),
    "id to token": lambda tokenizer: tokenizer.convert_ids_to_tokens(300),
    "ids of an array to tokens": lambda tokenizer: tokenizer.convert_ids_to_tokens(
        tokenizer(TEXTS[0], return_tensors="np").input_ids[0]
    ),
    "tokens to ids": lambda tokenizer: tokenizer.convert_tokens_to_ids(["ĠOnce", "<|endoftext|>", "no such token"]),
    "token to id": lambda tokenizer: tokenizer.convert_tokens_to_ids("Ġking"),
    "text of ids": lambda tokenizer: tokenizer.decode(tokenizer(TEXTS[2]).input_ids),
    "text without": lambda tokenizer: tokenizer.decode(tokenizer(TEXTS[2]).input_ids, skip_special_tokens=True),
    "text of an id": lambda tokenizer: tokenizer.decode(300),
    "texts of ids": lambda tokenizer: tokenizer.batch_decode(tokenizer(TEXTS).input_ids),
    "texts without": lambda tokenizer: tokenizer.batch_decode(tokenizer(TEXTS).input_ids, skip_special_tokens=True),
}


def listed(encoding: Any) -> dict[str, Any]:
    """Arrays and their type, as JSON."""
    return {name: [array.tolist(), str(array.dtype)] for name, array in encoding.items()}


def in_transformers(folder: Path = FOLDER) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2's tokenizer.json."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(GPT2_FILES, CONFIG, folder)
    return (folder / "tokenizer.json").read_text("utf-8")


@pytest.fixture
def tokenizer(tales_bundle: Path) -> Tokenizer:
    """The embedded model's, on which a test may set roles."""
    return Tokenizer(tales_bundle / "tokenizer.json")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_it_gives_in_transformers(name: str, side: str, tokenizer: Tokenizer, golden: Golden) -> None:
    def asked(of: Any) -> Any:
        of.pad_token, of.padding_side = of.eos_token, side
        return CALLS[name](of)

    assert asked(tokenizer) == golden.answer([name, side, TEXTS], lambda: asked(in_transformers()))


def test_before_anything_is_set(tokenizer: Tokenizer, golden: Golden) -> None:
    def asked(of: Any) -> Any:
        return [of.padding_side, *CALLS["roles"](of)]

    assert asked(tokenizer) == golden.answer("as loaded", lambda: asked(in_transformers()))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config_json": {"model_max_length": 1024}},
        {"tokenizer_config_json": {"pad_token": "<|endoftext|>", "unk_token": None, "padding_side": "left"}},
        {"tokenizer_config_json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}},
        {"tokenizer_config_json": {}, "special_tokens_map_json": {"pad_token": "!", "eos_token": {"content": "?"}}},
    ],
    ids=str,
)
def test_roles_of_a_checkpoint(files: dict[str, Any], gpt2_tokenizer: str, tmp_path: Path, golden: Golden) -> None:
    skip_with_transformers_4("files of tokenizers mean something else")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write(tmp_path, tokenizer_json=gpt2_tokenizer, **files)
    write_tokenizer(tmp_path, CONFIG, bundle)

    def asked(of: Any) -> Any:
        return [of.padding_side, *CALLS["roles"](of)]

    assert asked(Tokenizer(bundle / "tokenizer.json")) == golden.answer(files, lambda: asked(in_transformers(tmp_path)))


def test_no_texts(tales_model: gpt2onnx.Model) -> None:
    encoding = tales_model.tokenizer([])
    assert encoding == {"input_ids": [], "attention_mask": []}
    assert tales_model.generate(**encoding) == []


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generate_takes_what_the_tokenizer_returns(
    options: dict[str, Any],
    tokenizer: Tokenizer,
    tales_model: gpt2onnx.Model,
    tales_reference: Reference,
    golden: Golden,
) -> None:
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"

    def live() -> list[list[int]]:
        theirs = in_transformers()
        theirs.pad_token, theirs.padding_side = theirs.eos_token, "left"
        inputs = theirs(TEXTS[:2], return_tensors="pt", padding=True)
        output = tales_reference.model.generate(
            **inputs, max_new_tokens=5, pad_token_id=theirs.pad_token_id, do_sample=False, **options
        )
        new: list[list[int]] = output[:, inputs.input_ids.shape[1] :].tolist()
        return new

    expected = golden.answer(["generate", TEXTS[:2], options], live)
    for inputs in (
        tokenizer(TEXTS[:2], padding=True),
        tokenizer(TEXTS[:2], padding=True, return_tensors="np"),
        tokenizer(TEXTS[:2]),
    ):
        results = tales_model.generate(**inputs, max_new_tokens=5, **options)
        assert [result.sequences[0].token_ids for result in results] == expected
        ids, mask = inputs.input_ids, inputs.attention_mask
        again = tales_model.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
        assert [result.sequences[0].token_ids for result in again] == expected
    one = tokenizer(TEXTS[0])
    for result in (
        tales_model.generate(**one, max_new_tokens=5, **options),
        tales_model.generate(one.input_ids, max_new_tokens=5, **options),
        tales_model.generate(input_ids=one.input_ids, max_new_tokens=5, **options),
        *tales_model.generate(**tokenizer(TEXTS[0], return_tensors="np"), max_new_tokens=5, **options),
    ):
        assert result.sequences[0].token_ids == expected[0]
        assert result.prompt == TEXTS[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.tokenizer("a", padding=True), "padding needs a pad token"),
        (lambda model: model.tokenizer("a", padding="max_length"), "padding must be true, false or 'longest'"),
        (lambda model: model.tokenizer("a", return_tensors="pt"), "return_tensors must be 'np' or left out, not 'pt'"),
        (lambda model: model.tokenizer(["a", "b c d"], return_tensors="np"), "make no array: padding=True"),
        (lambda model: model.generate(), "give prompts or input_ids"),
        (lambda model: model.generate("a", input_ids=[1]), "give prompts or input_ids"),
        (lambda model: model.generate("a", attention_mask=[1]), "attention_mask must have 0 or 1 for each token id"),
        (lambda model: model.generate(["a"], attention_mask=[[1]]), "attention_mask must have 0 or 1"),
        (lambda model: model.generate([1, 2], attention_mask=[1]), "attention_mask must have 0 or 1"),
        (lambda model: model.generate([[1, 2]], attention_mask=[1, 1]), "attention_mask must have 0 or 1"),
        (lambda model: model.generate(np.ones((1, 2), int), attention_mask=1), "attention_mask must have 0 or 1"),
    ],
)
def test_wrong_calls(call: Callable[[gpt2onnx.Model], Any], message: str, tales_model: gpt2onnx.Model) -> None:
    with pytest.raises(OptionError, match=message):
        call(tales_model)


def test_a_side_that_is_none(tokenizer: Tokenizer) -> None:
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "top"
    with pytest.raises(OptionError, match="padding_side must be 'left' or 'right', not 'top'"):
        tokenizer(TEXTS, padding=True)
