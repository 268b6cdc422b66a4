"""What a bundle says of itself is checked: no byte, file, link, graph or tokenizer of it can lie.

GPT2ONNX_FLIPS=all has every byte of every file flipped, and each left out; otherwise all of the manifest's and of
small files', and some of the others'.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.bundles import edit_graphs, sign
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.systems import posix

import gpt2onnx
from gpt2onnx.errors import BackendError, BundleError
from gpt2onnx.models import graph_rules
from gpt2onnx.models.bundle import GRAPH, MANIFEST, RAGGED_GRAPH, TOKENIZER, WEIGHTS, Bundle, Manifest
from gpt2onnx.runtime.engine import graphs
from gpt2onnx.runtime.engine.runner import Runner

ALL = os.environ.get("GPT2ONNX_FLIPS") == "all"
FLIPS, SMALL = 150, 1_000  # bytes of a file that are flipped; all bytes of a file up to SMALL


@pytest.fixture(scope="module")
def bundle(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("whole") / "bundle", dtype="int8").folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(bundle, tmp_path / "bundle")


def files_of(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def positions(path: Path) -> Iterator[int]:
    size = path.stat().st_size
    if ALL or size <= SMALL or path.name == MANIFEST:
        yield from range(size)
    else:
        yield from {0, size - 1, *random.Random(size).sample(range(size), FLIPS)}


def test_whole_bundle_verifies(copy: Path, command_line: CommandLine) -> None:
    done = command_line("verify", copy, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"] == len(files_of(copy)) - 1


def test_the_check_tells_how_far_it_is(copy: Path) -> None:
    moves: list[tuple[int, int]] = []
    Bundle.open(copy).verify(lambda done, total: moves.append((done, total)))
    size = sum(path.stat().st_size for path in files_of(copy) if path.name != MANIFEST)
    assert {total for _, total in moves} == {size}
    assert moves == sorted(moves)
    assert moves[-1] == (size, size)
    assert len(moves) > size / 2**21, "large files move it, too"


def test_any_flipped_byte_is_found(copy: Path) -> None:
    generator = random.Random(0)
    found = 0
    for path in files_of(copy):
        with path.open("r+b", buffering=0) as file:
            for position in positions(path):
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 1 << generator.randrange(8)]))
                with pytest.raises(BundleError) as caught:
                    Bundle.open(copy).verify()
                assert path.name in str(caught.value) or str(copy) in str(caught.value)
                file.seek(position)
                file.write(bytes([byte]))
                found += 1
    Bundle.open(copy).verify()
    print(f"{found} flipped bytes, all found")


def test_any_missing_byte_is_found(copy: Path) -> None:
    found = 0
    for path in files_of(copy):
        content = path.read_bytes()
        chosen = list(positions(path)) if path.name == MANIFEST else (0, len(content) // 2, len(content) - 1)
        for position in chosen:
            path.write_bytes(content[:position] + content[position + 1 :])
            with pytest.raises(BundleError):
                Bundle.open(copy)
            found += 1
        path.write_bytes(content)
    Bundle.open(copy).verify()
    print(f"{found} missing bytes, all found")


def test_generate_verifies_where_it_is_asked_to(copy: Path, command_line: CommandLine) -> None:
    with (copy / WEIGHTS).open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    done = command_line("generate", "Once", "-m", copy, "--verify")
    assert (done.code, done.out) == (1, "")
    assert Path(WEIGHTS).name in done.err
    with pytest.raises(BundleError, match=WEIGHTS):
        gpt2onnx.load(copy, verify=True)


def test_missing_files_are_found_when_it_is_opened(copy: Path) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(copy)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["onnx/other.onnx", "note.txt", "deep/er/file"])
def test_foreign_file_is_found(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name} is not in the manifest"):
        Bundle.open(copy).verify()


def test_settings_that_the_manifest_does_not_list_are_never_read(copy: Path) -> None:
    manifest = Manifest.read(copy)
    files = {name: record for name, record in manifest.files.items() if name != "tokenizer_config.json"}
    dataclasses.replace(manifest, files=files).write(copy)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json is not in the manifest"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"format_version": 0},
        {"format_version": True},
        {"format_version": "1"},
        {"files": {"../outside": {"size": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}},
        {"files": {"a/../../outside": {"size": 1, "sha256": "0"}}},
        {"files": {"onnx\\..\\outside": {"size": 1, "sha256": "0"}}},
        {"files": {"C:outside": {"size": 1, "sha256": "0"}}},
        {"files": {"a\0b": {"size": 1, "sha256": "0"}}},
        {"files": {"x" * 5000: {"size": 1, "sha256": "0"}}},
        {"files": {"\udcff": {"size": 1, "sha256": "0"}}},
        {"files": {"": {"size": 1, "sha256": "0"}}},
        {"files": {"a": {"size": "1", "sha256": "0"}}},
        {"files": {"a": 3}},
        {"files": []},
        {"files": {}},
        {"parity": 3},
        {"source": ["tales"]},
        {"dtype": "fp17"},
        {"graph": "weird"},
        {"block_size": -5},
        {"unknown": 1},
    ],
    ids=lambda change: str(change)[:40].encode("ascii", "backslashreplace").decode(),
)
@pytest.mark.parametrize("signed", [True, False])
def test_manifest_that_cannot_be_right_is_refused(copy: Path, change: dict[str, Any], signed: bool) -> None:
    manifest = json.loads((copy / MANIFEST).read_text()) | change
    if "files" in change and isinstance(manifest["files"], dict):
        manifest["files"] = (
            {**json.loads((copy / MANIFEST).read_text())["files"], **change["files"]} if manifest["files"] else {}
        )
    if signed:
        manifest["sha256"] = ""
        digest = hashlib.sha256((json.dumps(manifest) + "\n").encode()).hexdigest()
        manifest["sha256"] = digest
    (copy / MANIFEST).write_text(json.dumps(manifest) + "\n")
    with pytest.raises(BundleError) as caught:
        Bundle.open(copy)
    assert "\n" not in str(caught.value)
    assert signed or len(change) == 1


def leads_outside(name: str) -> Callable[[Path], object]:
    def link(bundle: Path) -> None:
        outside = bundle.parent / "outside"
        shutil.move(bundle / name, outside)
        (bundle / name).symlink_to(os.path.relpath(outside, (bundle / name).parent))

    return link


@pytest.mark.parametrize("name", [MANIFEST, TOKENIZER, GRAPH, WEIGHTS, "onnx"])
def test_links_that_lead_out_of_the_bundle_are_refused(name: str, copy: Path) -> None:
    leads_outside(name)(copy)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(copy)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        gpt2onnx.load(copy)


def test_links_inside_and_to_the_bundle_are_fine(copy: Path) -> None:
    (copy.parent / "link").symlink_to(copy.name)
    shutil.move(copy / TOKENIZER, copy / "real.json")
    (copy / TOKENIZER).symlink_to("real.json")
    sign(copy)
    Bundle.open(copy.parent / "link").verify()
    assert gpt2onnx.load(copy.parent / "link").generate("Once", max_new_tokens=1).usage["completion_tokens"] == 1


@posix
def test_what_is_no_plain_file_is_refused(copy: Path) -> None:
    (copy / TOKENIZER).unlink()
    os.mkfifo(copy / TOKENIZER)  # to open it would wait for ever
    with pytest.raises(BundleError, match="not a plain file"):
        Bundle.open(copy)
    (copy / TOKENIZER).unlink()
    (copy / TOKENIZER).symlink_to(TOKENIZER)
    with pytest.raises(BundleError, match="can't be read"):
        Bundle.open(copy)


def locate_at(location: str) -> Callable[[onnx.ModelProto], None]:
    """Has the graph take its weights from elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


@pytest.mark.parametrize(
    "location", ["../../outside", "/etc/passwd", "../config.json", "elsewhere", "", "*/_ORT_MEM_ADDR_/*", "C:\\outside"]
)
def test_weights_from_elsewhere_are_refused_before_onnxruntime_sees_them(location: str, copy: Path) -> None:
    (copy.parent / "outside").write_bytes((copy / WEIGHTS).read_bytes())
    edit_graphs(copy, locate_at(location), GRAPH)
    with pytest.raises(BundleError, match="takes weights from"):
        Bundle.open(copy).checked_path(GRAPH)
    with pytest.raises(BundleError, match="takes weights from"):
        Bundle.open(copy).verify()


@pytest.mark.skipif(not graphs.runs_ragged(), reason="ONNX Runtime before 1.32 runs no ragged graph")
@pytest.mark.parametrize(("source", "target"), [(GRAPH, RAGGED_GRAPH), (RAGGED_GRAPH, GRAPH)])
def test_a_graph_in_the_place_of_another_is_refused(source: str, target: str, copy: Path) -> None:
    shutil.copyfile(copy / source, copy / target)
    sign(copy)
    opened = Bundle.open(copy)
    with pytest.raises(BundleError, match=r"isn't what config.json describes: it (lacks|shouldn't have) the input"):
        Runner(opened if target == RAGGED_GRAPH else opened.without(RAGGED_GRAPH))


def test_locations_are_found_wherever_a_graph_may_hold_a_tensor() -> None:
    def tensor(location: str) -> onnx.TensorProto:
        made = onnx.TensorProto(name=location, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        # A key given twice counts as it was given last.
        made.external_data.add(key="length", value="4")
        made.external_data.add(key="location", value=location)
        return made

    def graph_of(**fields: Any) -> bytes:
        return onnx.ModelProto(graph=onnx.GraphProto(**fields)).SerializeToString()

    node = onnx.NodeProto(op_type="Constant", output=["x"])
    node.attribute.append(onnx.AttributeProto(name="value", t=tensor("node")))
    model = graph_of(initializer=[tensor("first"), tensor("first")], node=[node])
    assert graph_rules.check(model, 64) == {"first", "node"}
    # Protobuf joins a message that comes in two parts, in any order of fields.
    assert graph_rules.check(model + graph_of(initializer=[tensor("second")]), 64) == {"first", "node", "second"}
    swapped = b"\x12\x07outside\x0a\x08location"
    entry = b"\x6a" + bytes([len(swapped)]) + swapped
    body = b"\x2a" + bytes([len(entry)]) + entry
    assert graph_rules.check(b"\x3a" + bytes([len(body)]) + body, 64) == {"outside"}


def test_a_precision_that_is_not_the_graphs(copy: Path) -> None:
    manifest = Manifest.read(copy)
    dataclasses.replace(manifest, dtype="fp32").write(copy)
    with pytest.raises(BundleError, match=r"model\.onnx isn't a graph in fp32"):
        Bundle.open(copy).verify()
    with pytest.raises(BundleError, match="isn't a graph in fp32"):
        gpt2onnx.load(copy)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        config = json.loads((bundle / "config.json").read_text())
        (bundle / "config.json").write_text(json.dumps(config | changes))
        sign(bundle)

    return change


def edit_graph(change: Callable[[onnx.GraphProto], object]) -> Callable[[Path], None]:
    return lambda bundle: edit_graphs(bundle, lambda model: change(model.graph))


def edit_tokens(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        content = json.loads((bundle / TOKENIZER).read_text())
        change(content)
        (bundle / TOKENIZER).write_text(json.dumps(content))
        sign(bundle)

    return edit


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# What is done to a bundle whose manifest is then written anew, and what the message has to name.
LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fewer layers": (edit_config(n_layer=1), "past_key_values.1"),
    "more layers": (edit_config(n_layer=3), "past_key_values.2"),
    "other heads": (edit_config(n_head=2), "past_key_values.0.key"),
    "other width": (edit_config(n_embd=64), "past_key_values.0.key"),
    "larger vocabulary": (edit_config(vocab_size=300), "logits"),
    "smaller vocabulary": (edit_config(vocab_size=200), "vocabulary ends at 199"),
    "endless layers": (edit_config(n_layer=10**12), "n_layer"),
    "another architecture": (edit_config(model_type="llama"), "llama"),
    "an input more": (
        edit_graph(lambda graph: graph.input.append(onnx.helper.make_tensor_value_info("extra", 1, [1]))),
        "extra",
    ),
    "an output less": (edit_graph(lambda graph: graph.output.pop()), "present.1"),
    "one token too many": (edit_tokens(lambda content: content["model"]["vocab"].update({"zz": 300})), "the id 300"),
    "an added token too many": (
        edit_tokens(lambda content: content["added_tokens"].append({"id": 257, "content": "<x>", **ADDED})),
        "<x>",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_do_not_belong_together_are_refused(lie: str, copy: Path, command_line: CommandLine) -> None:
    change, hint = LIES[lie]
    change(copy)
    for arguments in (["verify", copy], ["generate", "-m", copy, "Once"]):
        done = command_line(*arguments)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done.err
        assert hint in done.err


def test_an_id_beyond_a_gap_is_found_by_verify_and_of_no_use(copy: Path, command_line: CommandLine) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["z"] = 5000

    edit_tokens(change)(copy)
    done = command_line("verify", copy)
    assert done.code == 1
    assert "5000" in done.err
    done = command_line("generate", "-m", copy, "z")
    assert done.code == 1
    assert "5000" in done.err


def test_damaged_graphs_end_in_one_line(copy: Path) -> None:
    graph = RAGGED_GRAPH if graphs.runs_ragged() else GRAPH
    content = (copy / graph).read_bytes()
    generator = random.Random(0)
    for size in (0, 1, 10, len(content) // 2, len(content) - 1):
        (copy / graph).write_bytes(content[:size])
        sign(copy)
        with pytest.raises((BundleError, BackendError)) as caught:
            gpt2onnx.load(copy)
        assert "\n" not in str(caught.value)
    for _ in range(50):
        broken = bytearray(content)
        for _ in range(3):
            broken[generator.randrange(len(content))] = generator.randrange(256)
        with contextlib.suppress(ValueError, graph_rules.NotExportedError):
            graph_rules.check(bytes(broken), 64)
