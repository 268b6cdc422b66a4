"""GPT-2's tokenisation of random texts against transformers."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizer_files import GPT2_FILES, gpt2_in_transformers

from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.runtime.text.tokenizer import Tokenizer

# Every character that UTF-8 can hold.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(GPT2_FILES, {"model_type": "gpt2", "vocab_size": 50257}, folder)
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def reference() -> Any:
    return gpt2_in_transformers()


@given(sample=text)
@settings(max_examples=200)
def test_ids_of_any_text_are_those_of_transformers(sample: str, tokenizer: Tokenizer, reference: Any) -> None:
    ids = tokenizer.encode(sample)
    assert ids == reference.encode(sample)
    assert tokenizer.decode(ids) == sample
