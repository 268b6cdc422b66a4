"""Checkpoints of all kinds that are damaged, hostile or absurd: read, or refused in one line, in bounded time and memory."""

import dataclasses
import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.checkpoints import MakeCheckpoint
from support.fuzzing import damaged, ends_well, inputs, odd_values, write_json
from support.golden import FOLDER
from support.weight_files import TINY

from gpt2onnx.errors import CheckpointError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
from gpt2onnx.exporter.checkpoint.formats import open_weights
from gpt2onnx.exporter.checkpoint.formats.torch_file import read_checkpoint_file
from gpt2onnx.models.shapes import weight_shapes

MEBIBYTE = 2**20
# Importing what reads checkpoints takes some 250 MiB of addresses; what is left is for the file.
MOST_MEMORY = 1500 * MEBIBYTE


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(n_embd=8, n_layer=1, n_head=2)


@pytest.fixture(scope="module")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint of the architecture that PyTorch's files have."""
    return make_checkpoint(**TINY)


@pytest.fixture(scope="module")
def whole(tiny: Path) -> dict[str, bytes]:
    """A checkpoint's weights in each of the forms that there are; the pickles are PyTorch's own."""
    return {
        "model.safetensors": (tiny / "model.safetensors").read_bytes(),
        "pytorch_model.bin": (FOLDER / "torch_files" / "float32.pt").read_bytes(),
        "old.pt": (FOLDER / "torch_files" / "float32_legacy.pt").read_bytes(),
    }


@pytest.fixture
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's folder without weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in tiny.glob("*.json"):
        shutil.copy(path, folder)
    return folder


def read_all(folder: Path) -> int:
    """Opens a checkpoint and reads its weights, as an export does."""
    opened = Checkpoint.open(str(folder))
    for name in opened._weights:
        opened.tensor(name)
    return len(opened._weights)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "old.pt"])
def test_damaged_weights(name: str, whole: dict[str, bytes], place: Path) -> None:
    @inputs(few=60)
    @given(damaged(whole[name]))
    def check(content: bytes) -> None:
        (place / name).write_bytes(content)
        ends_well(lambda: read_all(place))

    check()


def zipped(program: bytes) -> bytes:
    """A file as torch.save makes it, with this pickle and one storage of 64 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


STORAGE = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + b"K\x10tQ"


def tensor(shape: bytes, strides: bytes, offset: bytes = b"K\x00") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + strides + b"\x89Nt" + b"R"


# Programs that a pickle machine without limits would run: code, endless work, endless memory. Each is the content of
# {"wte.weight": …}, or all of it.
HOSTILE: dict[str, bytes] = {
    "eval": b"cbuiltins\neval\n" + b"(" + word("1") + b"tR",
    "system": b"cposix\nsystem\n(" + word("true") + b"tR",
    "system by its parts": word("os") + word("system") + b"\x93(" + word("true") + b"tR",
    "a dotted name": b"\x80\x04" + word("collections") + word("OrderedDict.fromkeys.__class__") + b"\x93)R",
    "a name that is no text": b"K\x01K\x02\x93",
    "inst": b"(ios\nsystem\n",
    "obj": b"(cos\nsystem\no",
    "an extension": b"\x82\x01",
    "new with keywords": b"ccollections\nOrderedDict\n)}\x92",
    "getattr through an attribute": b"ccollections\nOrderedDict\n)R}" + word("items") + b"cbuiltins\ngetattr\nsb",
    "changed functions": b"ctorch._utils\n_rebuild_parameter\nN}" + word("__code__") + b"Ns\x86b)R",
    "a script's function": b"c__main__\nrun\n)R",
    "a script's object with arguments": b"c__main__\nGPTConfig\n(K\x01t\x81",
    "a persistent id that is none": b"K\x01Q",
    "a persistent id of text": b"Pstorage\n",
    "a dictionary in itself": b"}q\x00" + word("wte.weight") + b"h\x00s",
    "a list in itself": b"]q\x00h\x00a",
    "hashes without end": b"}" + b")" + b"2\x86" * 60 + b"Ns",
    "set of hashes without end": b"\x8f(" + b")" + b"2\x86" * 60 + b"\x90",
    "ordered hashes without end": b"ccollections\nOrderedDict\n(](" + b"()" + b"2\x86" * 60 + b"Nt" + b"e" + b"tR",
    "keys that collide": b"}(" + b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(1, 40000)) + b"u",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "tuples in tuples": b")" + b"\x85" * 100_000,
    "dictionaries in dictionaries": (b"}" + word("a")) * 50_000 + b"N" + b"s" * 50_000,
    "mappings of one mapping": b"}q\x00(" + b"".join(word(f"{n}") + b"}" for n in range(20_000)) + b"u" + b"".join(b"0}q" + bytes([level]) + b"(" + b"".join(word(f"{n}") + b"h" + bytes([level - 1]) for n in range(20_000)) + b"u" for level in range(1, 7)),
    "a module in itself": b"c__torch__\nNet\n)\x81q\x00}" + word("a") + b"h\x00sb",
    "modules in modules": (b"c__torch__\nNet\n)\x81}" + word("a")) * 50_000 + b"N" + b"sb" * 50_000,
    "copies of a long list": b"](" + b"N" * 100_000 + b"eq\x00" + b"0ctorch\nSize\nq\x01(" + b"h\x01h\x00\x85R" * 500_000 + b"t",
    "sets of a long list": b"](" + b"K\x01" * 100_000 + b"eq\x00" + b"0cbuiltins\nset\nq\x01(" + b"h\x01h\x00\x85R" * 500_000 + b"t",
    "records of a large state": b"}(" + b"".join(word(f"{n:06}") + b"N" for n in range(50_000)) + b"uq\x00" + b"(" + b"c__main__\nA\n)\x81h\x00b" * 50_000 + b"t",
    "items of a script's object": b"c__main__\nA\n)\x81(" + word("a") + b"NK\x01N" + b"u(" + b"NN" + b"e",
    "a script's object in itself": b"c__main__\nA\n)\x81q\x00" + word("a") + b"h\x00sh\x00b",
    "odd items of a script's object": b"c__main__\nA\n)\x81(Nu",
    "keys of a list": b"](NNu",
    "copies of a long mapping": b"}(" + b"".join(word(f"{n:05}") + b"N" for n in range(10_000)) + b"uq\x000ccollections\nCounter\nq\x01(" + b"h\x01h\x00\x85R" * 50_000 + b"t",
    "a tensor of no type": b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\x00))\x89NNtR",
    "a tensor of a type that is no text": b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\x00))\x89N]tR",
    "a tensor of larger numbers than its storage": b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\x00K\x10\x85K\x01\x85\x89Nctorch\nuint64\ntR",
    "two million instructions": b"N0" * 1_000_000 + b"N",
    "a text of 2**60 letters": b"\x8d" + struct.pack("<Q", 2**60) + b"x",
    "bytes of 4 GiB": b"B\xff\xff\xff\xff",
    "a negative length": b"T\xff\xff\xff\xff",
    "a number of 2 GiB": b"\x8b\xff\xff\xff\x7f",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "a memo far away": b"Nr\xff\xff\xff\xff",
    "a memo that isn't there": b"h\x07",
    "marks only": b"(" * 1000,
    "nothing": b"",
    "10 GB of zeros by a stride of 0": tensor(b"M\xff\xffM\xff\x7f\x86", b"K\x00K\x00\x86"),
    "an exabyte": tensor(b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85", b"K\x00\x85"),
    "a shape of 100,000 axes": tensor(b"(" + b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"2" * 99_999 + b"t", b"(" + b"K\x00" * 100_000 + b"t"),
    "a shape of huge numbers": tensor(b"\x8b\x00\x00\x10\x00" + b"\x7f" * MEBIBYTE + b"\x85", b"K\x01\x85"),
    "a shape of truths": tensor(b"\x88\x85", b"\x88\x85"),
    "a storage of no type": b"(" + word("storage") + b"N" + word("0") + word("cpu") + b"K\x10tQ",
}  # fmt: skip


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_pickles(trick: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    inside = b"\x80\x02}" + word("wte.weight") + HOSTILE[trick] + b"s."
    path.write_bytes(zipped(inside))
    if trick not in LARGE_PICKLES:  # those are read by a process of its own, with an end to its memory
        outcome = ends_well(lambda: read_checkpoint_file(path, levels=6) is not None)
    if trick in ("eval", "system", "system by its parts", "a dotted name"):
        assert "refused" in str(outcome)
    if trick in LONG_PICKLES:  # one program, one machine
        return
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(legacy + b"\x80\x02" + HOSTILE[trick] + b"." + pickle.dumps([], 2))
    ends_well(lambda: read_checkpoint_file(path) is not None)


# What follows is read by processes of its own, with an end to their memory.

BOMBS = ("a compressed pickle", "a compressed byteorder", "a pickle of zeros", "a list of members without end")


def bomb(name: str, path: Path) -> None:
    """A small file that stands for a large one."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        match name:
            case "a compressed pickle":
                archive.writestr("archive/data.pkl", bytes(150 * MEBIBYTE))
            case "a compressed byteorder":
                archive.writestr("archive/byteorder", bytes(150 * MEBIBYTE))
                archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"}.")
            case "a pickle of zeros":
                archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"N0" * (40 * MEBIBYTE))
            case "a list of members without end":
                for number in range(1_000):
                    archive.writestr(zipfile.ZipInfo(f"archive/data/{number:020000}"), b"")
                archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"}.")


LONG_PICKLES = ("two million instructions", "records of a large state", "sets of a long list")
LARGE_PICKLES = ("copies of a long list", "keys that collide", "a shape of 100,000 axes", "lists in lists")
LONG_LINES, LONG_HEADER = "long lines", "a header of 90 MB"


def safetensors_file(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


HEADERS: dict[str, bytes] = {
    "a header of 2**63 bytes": safetensors_file(b"{}", 2**63),
    "a header with 100,000 brackets": safetensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "10 GB that aren't there": safetensors_file(b'{"wte.weight":{"dtype":"F32","shape":[50000,50000],"data_offsets":[0,10000000000]}}'),
    "an overflow": safetensors_file(b'{"wte.weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "offsets backwards": safetensors_file(b'{"wte.weight":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + bytes(4),
    "a type of tomorrow": safetensors_file(b'{"wte.weight":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    "no dictionary": safetensors_file(b"[]"),
    "no bytes": b"",
    "one byte": b"\x01",
}  # fmt: skip

READ = textwrap.dedent("""
    import json, os, re, sys, time
    from gpt2onnx.errors import Gpt2OnnxError
    from gpt2onnx.exporter.checkpoint.formats import open_weights
    from pathlib import Path

    def most_memory():  # unlike getrusage's, not that of the process that started this one
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

    def read(path):
        begin, before = time.process_time(), most_memory()
        try:
            weights = open_weights(Path(path))
            for array in weights.arrays.values():
                array.read()
            told = f"read {len(weights.arrays)}"
        except Gpt2OnnxError as error:
            told = f"{type(error).__name__} {error}"
        print(json.dumps([path, told, time.process_time() - begin, (most_memory() - before) / 1024]), flush=True)

    for path in sys.argv[1:]:
        if not (child := os.fork()):
            read(path)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps([path, "died", 0, 0]), flush=True)
""")


@dataclasses.dataclass(frozen=True)
class Told:
    """What a process said of a file, its seconds, and its MiB."""

    outcome: str
    seconds: float
    memory: float


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Told]]:
    """What reading each of these files comes to, in a process for each, which has its modules from one that forks."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from Linux's /proc")
    folder = tmp_path_factory.mktemp("alone")
    names = {}

    def place(name: str, suffix: str) -> Path:
        path = folder / f"{len(names)}{suffix}"
        names[str(path)] = name
        return path

    for name in BOMBS:
        bomb(name, place(name, ".bin"))
    for name in LARGE_PICKLES:
        place(name, ".bin").write_bytes(zipped(b"\x80\x02}" + word("wte.weight") + HOSTILE[name] + b"s."))
    place(LONG_LINES, ".bin").write_bytes(b"\x80\x02(" + 1200 * (b"V" + b"a" * 65000 + b"\n") + b"l.")
    for name, content in HEADERS.items():
        place(name, ".safetensors").write_bytes(content)
    place(LONG_HEADER, ".safetensors").write_bytes(safetensors_file(b'{"a":"' + b"x" * 90_000_000 + b'"}'))

    done = subprocess.run(
        [sys.executable, "-c", READ, *names],
        capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY)),
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = {names[path]: Told(*rest) for path, *rest in map(json.loads, done.stdout.splitlines())}
    for name, each in found.items():
        print(f"{name}: {each.outcome[:200]!r}; {each.seconds:.2f} s, {each.memory:.0f} MiB")
        assert each.outcome != "died", f"{name}: {done.stderr[-2000:]}"
        assert "\n" not in each.outcome, name
    yield found
    shutil.rmtree(folder)


# Most seconds, and MiB, of each.
LIMITS = (
    dict.fromkeys([*BOMBS, LONG_LINES], (20, 100))
    | dict.fromkeys(LARGE_PICKLES, (20, 800))
    | dict.fromkeys([*HEADERS, LONG_HEADER], (5, 300))
)


@pytest.mark.parametrize("name", LIMITS)
def test_hostile_files_stay_small(name: str, told: dict[str, Told]) -> None:
    assert name in LARGE_PICKLES or told[name].outcome.startswith("CheckpointError"), told[name]
    seconds, memory = LIMITS[name]
    assert told[name].seconds < seconds
    assert told[name].memory < memory


# Instructions with an argument that suits them, for programs that nobody would write.
_PIECES = st.sampled_from(
    [bytes([code]) for code in b"(012}])NRbaseudlt.\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94Q"]
    + [b"K\x05", b"M\x01\x02", b"J\xff\xff\xff\xff", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"I7\n", b"F1.5\n", b"L9L\n"]
    + [b"G" + struct.pack(">d", 0.5), b"\x8a\x01\xff", word("wte.weight"), word("model"), word("storage"), word("0"), word("cpu")]
    + [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"cbuiltins\nset\n"]
    + [b"ctorch\nFloatStorage\n", b"c__main__\nGPTConfig\n", b"ctorch._utils\n_rebuild_parameter\n", b"cos\nsystem\n"]
    + [STORAGE, tensor(b"K\x04K\x04\x86", b"K\x04K\x01\x86"), tensor(b"K\x10\x85", b"K\x01\x85"), word("wte.weight") + tensor(b"K\x10\x85", b"K\x01\x85") + b"s"]
)  # fmt: skip


@inputs(few=200)
@given(st.lists(_PIECES, max_size=25), st.booleans())
def test_programs_nobody_would_write(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], mapping: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "program.bin"
    path.write_bytes(zipped(b"\x80\x02" + b"}" * mapping + b"".join(pieces) + b"."))

    def read() -> int:
        weights = open_weights(path)
        return sum(array.read().size for array in weights.arrays.values())

    ends_well(read)


CONFIG_NAMES = st.sampled_from(
    ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "model_type", "hidden_size", "n_ctx", "bos_token_id", "eos_token_id", "add_cross_attention", "tokenizer_class", "transformers.js_config"]
)  # fmt: skip


@inputs(few=75)
@given(st.dictionaries(CONFIG_NAMES, odd_values, min_size=1, max_size=3))
@example({"n_layer": 10**18})
@example({"n_embd": 10**400})
@example({"model_type": "\ud800"})
@example({"hidden_size": "\ud800"})
def test_configurations_that_cannot_be(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object]
) -> None:
    import gpt2onnx

    folder = tmp_path_factory.getbasetemp() / "odd_config"
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        shutil.copy(path, folder)
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(folder / "config.json", config | changes)
    ends_well(lambda: gpt2onnx.export(folder, tmp_path_factory.getbasetemp() / "odd_bundle", force=True))


# Other programs' files


OTHERS = FOLDER / "other_formats"
OTHER_FILES = [
    "llm_c_bf16/gpt2.bin",
    "mingpt_2020/model.pt",
    "mlx_3bit/model.safetensors",
    "mlx_3bit/config.json",
    "onnx/model.onnx",
    "h5/tf_model.h5",
    "keras_preset/model.weights.h5",
    "flax/flax_model.msgpack",
    "fsdp/pytorch_model_fsdp_0/.metadata",
    "fsdp/pytorch_model_fsdp_0/__1_0.distcp",
    "rust/rust_model.ot",
    "torchscript/model.pt",
    "megatron/iter_0000100/mp_rank_01/model_optim_rng.pt",
    "megatron_0/release/mp_rank_00/model_optim_rng.pt",
    "gptq/gptq_model-4bit-16g.safetensors",
    "gptq/quantize_config.json",
]


@pytest.mark.parametrize("name", OTHER_FILES)
def test_damaged_files_of_other_programs(name: str, tmp_path: Path) -> None:
    part, file = name.split("/", 1)
    folder = shutil.copytree(OTHERS / part, tmp_path / part)

    @inputs(few=60)
    @given(damaged((OTHERS / name).read_bytes()))
    def check(content: bytes) -> None:
        (folder / file).write_bytes(content)
        ends_well(lambda: read_all(folder))

    check()


# Adapters of peft


ADAPTERS = FOLDER / "adapters"
ADAPTER_OPTIONS = st.sampled_from(sorted(json.loads((ADAPTERS / "lora" / "adapter_config.json").read_text())))


def merge(folder: Path) -> None:
    """Opens a base with an adapter and reads its weights."""
    opened = Checkpoint.open(str(ADAPTERS / "base"), adapter=str(folder))
    for name in weight_shapes(opened.config, tied=opened.tied):
        with suppress(CheckpointError):  # one that isn't finite
            opened.tensor(name)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("name", ["lora", "ia3", "tokens", "grown_saved"])
def test_damaged_adapters(name: str, file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ADAPTERS / name, tmp_path / name)

    @inputs(few=40)
    @given(damaged((ADAPTERS / name / file).read_bytes()))
    def check(content: bytes) -> None:
        (folder / file).write_bytes(content)
        ends_well(lambda: merge(folder))

    check()


@pytest.mark.parametrize("name", ["lora", "dora_head", "tokens"])
def test_adapters_with_odd_options(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ADAPTERS / name, tmp_path / name)
    config = json.loads((folder / "adapter_config.json").read_text())

    @inputs(few=60)
    @given(st.dictionaries(ADAPTER_OPTIONS, odd_values, min_size=1, max_size=3), st.dictionaries(st.text(), odd_values))
    @example({}, {"(.*a){4}b": 1, "(?i)x": 2, "a{99999999999}": 3})
    @example({}, {"(" * 5000 + ")" * 5000: 1})
    @example({}, {"[[a]": 1, "h.0": 10**400})
    def check(changes: dict[str, object], patterns: dict[str, object]) -> None:
        write_json(folder / "adapter_config.json", config | {"alpha_pattern": patterns} | changes)
        ends_well(lambda: merge(folder))

    check()


# Made when they are needed: they are large.
JSON_BOMBS: dict[str, Callable[[], bytes]] = {
    "70 MB": lambda: b'{"n_layer": "' + b"x" * 70_000_000 + b'"}',
    "100,000 brackets": lambda: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "500 brackets": lambda: b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    "unclosed": lambda: b'{"a": ' + b"[" * 10_000_000,
    "a number of a million digits": lambda: b'{"n_layer": ' + b"9" * 1_000_000 + b"}",
    "not UTF-8": lambda: b'{"a": "\xff"}',
    "NUL": lambda: b"\0" * 100,
    "a byte order mark": lambda: b'\xef\xbb\xbf{"model_type": "gpt2"}',
}


@pytest.mark.parametrize("name", JSON_BOMBS)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
        "vocab.json",
    ],
)
def test_json_without_end(name: str, file: str, whole: dict[str, bytes], place: Path, tmp_path: Path) -> None:
    import gpt2onnx

    if file != "model.safetensors.index.json":
        (place / "model.safetensors").write_bytes(whole["model.safetensors"])
    if file == "vocab.json":
        (place / "tokenizer.json").unlink()
        (place / "merges.txt").write_text("")
    (place / file).write_bytes(JSON_BOMBS[name]())
    outcome = ends_well(lambda: gpt2onnx.export(place, tmp_path / "bundle"))
    assert file == "special_tokens_map.json" or isinstance(outcome, str)
    assert isinstance(outcome, str) == (not (tmp_path / "bundle").exists())
