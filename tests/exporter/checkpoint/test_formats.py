"""Checkpoints of TensorFlow and of llama.cpp: read as those wrote them; damaged ones are refused in one line.

golden/make_formats.py had TensorFlow and the package gguf write the files.
"""

import json
import random
import re
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from support import torch_files
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.fuzzing import ASKED
from support.golden import FOLDER
from support.weight_files import State, refused
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplitter

import gpt2onnx
from gpt2onnx.errors import CheckpointError, install_command
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.tokenizer.convert import write_tokenizer
from gpt2onnx.models import limits
from gpt2onnx.serving.chat_template import ChatTemplate

FILES = FOLDER / "formats"
GGUF = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


@pytest.fixture
def numbers() -> State:
    """The weights that were saved, by their names in GPT2LMHeadModel."""
    saved = np.load(FILES / "numbers.npz")
    names = {"g": "weight", "w": "weight", "b": "bias"}

    def ours(name: str) -> str:
        *place, kind = name.removeprefix("h0/").split("/")
        if not place:
            return f"{name}.weight"
        return f"{'h.0.' if name.startswith('h0/') else ''}{'.'.join(place)}.{names[kind]}"

    return {ours(name): array[0] if (array := saved[name]).ndim == 3 else array for name in saved.files}


@pytest.fixture
def tensorflow(tmp_path: Path) -> Path:
    return shutil.copytree(FILES / "tensorflow", tmp_path / "run1")


# TensorFlow


@pytest.mark.parametrize("name", ["", "model-2", "model-2.index"])
def test_tensorflow_checkpoint(name: str, tensorflow: Path, numbers: State) -> None:
    opened = Checkpoint.open(str(tensorflow / name))
    assert (opened.config.n_head, opened.config.n_positions, opened.config.activation_function) == (4, 8, "gelu_new")
    numbers["wpe.weight"] = numbers["wpe.weight"] + 1  # by the second step
    for weight, array in numbers.items():
        assert np.array_equal(opened.tensor(weight), array), weight


def test_an_earlier_tensorflow_checkpoint(tensorflow: Path, numbers: State) -> None:
    assert np.array_equal(Checkpoint.open(str(tensorflow / "model-1")).tensor("wpe.weight"), numbers["wpe.weight"])
    (tensorflow / "checkpoint").unlink()
    assert "name the one to export, such as" in refused(tensorflow)
    (tensorflow / "model-2.index").unlink()
    assert np.array_equal(Checkpoint.open(str(tensorflow)).tensor("wpe.weight"), numbers["wpe.weight"])


def test_a_tensorflow_checkpoint_is_exported(tensorflow: Path, tmp_path: Path) -> None:
    made = gpt2onnx.export(tensorflow, tmp_path / "bundle")
    model = gpt2onnx.load(made.folder)
    assert len(model.generate([1, 2], max_new_tokens=3).sequences[0].token_ids) == 3


def test_a_tensorflow_checkpoint_without_hparams(tensorflow: Path) -> None:
    (tensorflow / "hparams.json").unlink()
    assert "the number of attention heads can't be read off the weights" in refused(tensorflow)
    (tensorflow / "config.json").write_text('{"n_head": 2}')
    assert Checkpoint.open(str(tensorflow)).config.n_head == 2


def test_a_tensorflow_checkpoint_without_its_data(tensorflow: Path) -> None:
    (tensorflow / "model-2.data-00000-of-00001").unlink()
    assert "model-2.data-00000-of-00001 is missing" in refused(tensorflow)


# llama.cpp


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind: str, numbers: State) -> None:
    opened = Checkpoint.open(str(FILES / f"{kind}.gguf"))
    assert (opened.config.n_head, opened.config.n_positions, opened.tied) == (4, 8, True)
    assert opened.raw_config["eos_token_id"] == 259
    for name, array in numbers.items():
        found = opened.tensor(name)
        assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
        if array.ndim == 1 or name == "wpe.weight" or kind == "F32":
            assert np.array_equal(found, array), name
        elif kind in ("F16", "BF16"):
            assert np.abs(found - array).max() <= np.abs(array).max() * 2.0 ** (-11 if kind == "F16" else -8), name
        else:
            # Blocks of 32 weights of an output in steps of their largest divided by 127 or 8, itself rounded to half precision.
            stored = array if name == "wte.weight" else array.T
            errors = np.abs((found if name == "wte.weight" else found.T) - stored).reshape(-1, 32)
            largest = np.abs(stored).reshape(-1, 32).max(1, keepdims=True)
            assert (errors <= largest * (0.57 / 127 if kind == "Q8_0" else 1.01 / 8)).all(), name
            assert errors.max() > 0


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    made = gpt2onnx.export(FILES / "F32.gguf", tmp_path / "bundle")
    tokenizer = gpt2onnx.load(made.folder).tokenizer
    content = json.loads((made.folder / "tokenizer.json").read_text("utf-8"))["model"]
    reference = HuggingFaceTokenizer(BPE(content["vocab"], [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    reference.pre_tokenizer, reference.decoder = ByteLevelSplitter(add_prefix_space=False), ByteLevel()
    for text in ("hello the theme", "Grüße\n 👋🏽", ""):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>") == [*reference.encode("a").ids, 259]
    assert tokenizer.decode([259], skip_special_tokens=True) == ""


def with_text(content: bytes, key: str, text: str) -> bytes:
    """A GGUF file with a further setting. Spaces behind the text keep the tensors' places multiples of 32."""
    text += " " * (-(20 + len(key) + len(text)) % 32)
    parts = [each for word in (key, text) for each in (struct.pack("<Q", len(word)), word.encode())]
    parts.insert(2, struct.pack("<I", gguf.GGUFValueType.STRING))
    (count,) = struct.unpack_from("<Q", content, 16)
    return content[:16] + struct.pack("<Q", count + 1) + b"".join(parts) + content[24:]


def test_the_chat_template_of_a_gguf_file(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}\n"
    content = with_text((FILES / "F32.gguf").read_bytes(), gguf.Keys.Tokenizer.CHAT_TEMPLATE, template)
    (tmp_path / "chat.gguf").write_bytes(content)
    made = gpt2onnx.export(tmp_path / "chat.gguf", tmp_path / "bundle")
    assert (made.folder / "chat_template.jinja").read_text("utf-8").rstrip(" ") == template
    asked = ChatTemplate.of_bundle(made.folder, None)
    assert asked is not None
    assert asked.render([{"role": "user", "content": "hello"}]).rstrip() == "hello"


def test_a_fault_in_the_tokenizer_of_a_gguf_file_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, path = (FILES / "F32.gguf").read_bytes(), tmp_path / "odd.gguf"
    assert content.count(b"h e") == 1
    path.write_bytes(content.replace(b"h e", b"h \x01"))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}/vocab\.json and merges\.txt don't make a tok"):
        gpt2onnx.export(path, tmp_path / "bundle")
    path.write_bytes(content)
    with Checkpoint.open(str(path)).tokenizer_folder() as folder:
        (folder / "added_tokens.json").write_text('{"<new>": 260}')
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["added_tokens_decoder"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        write_tokenizer(folder, {"vocab_size": 260}, tmp_path)
    assert "odd.gguf: left out added tokens" in caplog.text


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    content = (FILES / "F32.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(content.replace(b"gpt2", b"phi2", 1))
    assert "its architecture is 'phi2'" in refused(tmp_path / "other.gguf")


@pytest.mark.parametrize("types", [3, 0.5, True])
def test_gguf_with_one_type_for_all_tokens(types: float, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_key_value(gguf.Keys.Tokenizer.TOKEN_TYPE, types, gguf.GGUFValueType.get_type(types))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "odd.gguf is not a whole GGUF file" in refused(tmp_path / "odd.gguf")


def test_openai_s_names_beside_settings_that_are_a_text(numbers: State, tmp_path: Path) -> None:
    state = {f"model/{name}": array for name, array in np.load(FILES / "numbers.npz").items()}
    torch_files.save({"model": state, "hparams": "117M"}, tmp_path / "mine.pt")
    assert "the number of attention heads can't be read off the weights" in refused(tmp_path)
    opened = Checkpoint.open(str(tmp_path), n_head=4)
    assert np.array_equal(opened.tensor("wte.weight"), numbers["wte.weight"])


# What lies beside


def test_a_folder_of_the_trainers_checkpoints(tmp_path: Path) -> None:
    for step in (500, 1000, 90):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert f"checkpoint-90, checkpoint-500, checkpoint-1000: name one, such as {tmp_path}/checkpoint-1000" in refused(
        tmp_path
    )
    state = {"best_model_checkpoint": "/where/it/was/trained/checkpoint-500"}
    (tmp_path / "checkpoint-1000" / "trainer_state.json").write_text(json.dumps(state))
    assert f"such as {tmp_path}/checkpoint-500" in refused(tmp_path)
    for damaged in (b"{", bytes(limits.JSON + 1)):
        (tmp_path / "checkpoint-1000" / "trainer_state.json").write_bytes(damaged)
        assert f"name one, such as {tmp_path}/checkpoint-1000" in refused(tmp_path)


def test_a_state_dict_without_a_configuration(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, command_line: CommandLine
) -> None:
    whole = make_checkpoint(n_embd=128, n_head=2, n_layer=2, vocab_size=300, n_positions=32)
    shutil.copy(whole / "model.safetensors", tmp_path / "mine.safetensors")
    source = tmp_path / "mine.safetensors"
    opened, reference = Checkpoint.open(str(source)), Checkpoint.open(str(whole))
    assert opened.config == reference.config
    assert "2 are taken, of 64 each" in caplog.text
    caplog.clear()
    assert Checkpoint.open(str(source), n_head=4).config.n_head == 4
    assert caplog.text == ""
    assert command_line("export", source, tmp_path / "bundle", "--n-head", 4).code == 0
    assert gpt2onnx.load(tmp_path / "bundle").config.n_head == 4
    with pytest.raises(CheckpointError, match="says n_head 2, not 4"):
        Checkpoint.open(str(whole), n_head=4)


# Both


def flipped(content: bytes) -> list[bytes]:
    """The content damaged in many ways, in other ones in each run of `make fuzz`."""
    seed = random.randrange(2**32) if ASKED else 0
    print(f"seed {seed}")
    generator = random.Random(seed)
    made = [content[:size] for size in (0, 1, 40, len(content) // 2, len(content) - 1)]
    for _ in range(int(ASKED or 150)):
        broken = bytearray(content)
        # Mostly in front, where the structure is.
        for _ in range(generator.choice((1, 1, 4))):
            broken[generator.randrange(min(len(content), generator.choice((200, 8_000, len(content)))))] ^= (
                generator.randrange(1, 256)
            )
        made.append(bytes(broken))
    return made


def attempt(source: Path, names: list[str]) -> tuple[str | None, State]:
    """The message with which a checkpoint is refused, or its weights."""
    try:
        opened = Checkpoint.open(str(source))
        return None, {name: opened.tensor(name) for name in names}
    except CheckpointError as error:
        return str(error), {}


@pytest.mark.parametrize("name", ["tensorflow/model-2.index", "tensorflow/model-2.data-00000-of-00001", "Q8_0.gguf"])
def test_damaged_files(name: str, tmp_path: Path, numbers: State) -> None:
    place = shutil.copytree(FILES, tmp_path / "files")
    content = (place / name).read_bytes()
    source = place / name.replace(".data-00000-of-00001", ".index")
    numbers["wpe.weight"] = numbers["wpe.weight"] + 1
    outcomes = set()
    for broken in flipped(content):
        (place / name).write_bytes(broken)
        error, read = attempt(source, list(numbers))
        outcomes.add(error is None)
        assert error is None or "\n" not in error
        # GGUF has no checksums.
        assert name == "Q8_0.gguf" or all(np.array_equal(read[weight], numbers[weight]) for weight in read)
    assert False in outcomes


def test_gguf_with_infinite_scales(tmp_path: Path, numbers: State) -> None:
    content = (FILES / "Q8_0.gguf").read_bytes()
    (tmp_path / "odd.gguf").write_bytes(content[:-4096] + b"\x00\x7c" * 2048)  # infinity in half precision
    error, _ = attempt(tmp_path / "odd.gguf", list(numbers))
    assert error is not None
    assert "infinite numbers" in error


@pytest.mark.parametrize(("source", "package"), [("tensorflow", "google_crc32c"), ("F32.gguf", "gguf")])
def test_the_package_that_a_format_needs(source: str, package: str, command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line("export", FILES / source, tmp_path / "bundle", without=(package,))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert install_command("formats") in done.err
    assert not list(tmp_path.iterdir())
