"""Tokenizers that only transformers can convert."""

import json
import shutil
from pathlib import Path

import pytest
from support.tokenizer_files import differences, in_transformers, write
from transformers.convert_slow_tokenizer import import_protobuf

from gpt2onnx.exporter.tokenizer.convert import write_tokenizer


def sentencepiece_model(folder: Path) -> None:
    """A small sentencepiece model as spiece.model, written down as its protocol buffer."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    special = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]"]
    pieces = [*special, "▁", "▁he", "llo", "今", "天", *"abcdefghijklmnopqrstuvwxyz.,!"]
    for index, piece in enumerate(pieces):
        entry = model.pieces.add()
        entry.piece, entry.score = piece, -float(index)
        entry.type = 2 if index == 0 else 3 if index < len(special) else 1
    (folder / "spiece.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "AlbertTokenizer"])
def test_sentencepiece_goes_through_transformers(class_name: str, tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    settings = {"tokenizer_class": class_name, "unk_token": "<unk>", "eos_token": "</s>", "extra_ids": 0}
    write(tmp_path, tokenizer_config_json=settings)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_tokenizer(tmp_path, json.loads((tmp_path / "config.json").read_text()), bundle)
    assert differences(bundle, in_transformers(tmp_path)) == []
    # The bundle is a checkpoint for others, so transformers must read the same from it.
    shutil.copyfile(tmp_path / "config.json", bundle / "config.json")
    assert differences(bundle, in_transformers(bundle)) == []
