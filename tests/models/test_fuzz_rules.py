"""Tokenizers and graphs put together at random: what the rules let through stays small, and opens or is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support.bundles import edit_graphs
from support.checkpoints import ALL_BYTES_AND_END, MakeCheckpoint, byte_tokenizer
from support.fuzzing import ends_well, inputs

import gpt2onnx
from gpt2onnx.models import limits
from gpt2onnx.models.bundle import GRAPH, TOKENIZER, Bundle
from gpt2onnx.runtime.ort import devices, providers
from gpt2onnx.runtime.text.tokenizer import Tokenizer

WHOLE = json.loads(byte_tokenizer(ALL_BYTES_AND_END).to_str())
SOME = st.sampled_from(["", "a", "aa", "ab", "İ", "ﷺ", "한", "\0", "a" * 40, "a" * 3000])
PATTERNS = st.one_of(
    SOME.map(lambda text: {"String": text}), st.sampled_from(["", "a*", ".", "(a|b)", "(a+)+$"]).map(lambda text: {"Regex": text})
)  # fmt: skip
REPLACE = st.builds(lambda pattern, new: {"type": "Replace", "pattern": pattern, "content": new}, PATTERNS, SOME)
BYTES = st.just({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False})
NORMALIZERS = st.one_of(
    REPLACE, BYTES, st.sampled_from(["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"]).map(lambda name: {"type": name}),
    SOME.map(lambda text: {"type": "Prepend", "prepend": text}),
)  # fmt: skip
PIECE = st.sampled_from([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}])
TEMPLATES = st.lists(PIECE, max_size=300).map(
    lambda pieces: {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
)


def chained(name: str, step: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nothing, a step, or several in sequences of sequences."""

    def sequence(steps: list[Any]) -> dict[str, Any]:
        return {"type": "Sequence", name: steps}

    return st.recursive(
        st.none() | step, lambda inner: st.lists(inner.filter(bool), max_size=6).map(sequence), max_leaves=40
    )


PARTS = st.fixed_dictionaries(
    {},
    optional={
        "normalizer": chained("normalizers", NORMALIZERS),
        "pre_tokenizer": chained("pretokenizers", BYTES),
        "post_processor": chained("processors", TEMPLATES | BYTES),
        "decoder": chained("decoders", REPLACE | st.just({"type": "Fuse"}) | BYTES),
    },
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules")


@inputs(few=100)
@given(parts=PARTS, text=st.text("abİﷺ한 \0", min_size=1, max_size=20))
def test_tokenizers_of_odd_parts(place: Path, parts: dict[str, Any], text: str) -> None:
    """No text becomes longer than the rule says, in tokens or in letters."""
    (place / TOKENIZER).write_text(json.dumps(WHOLE | parts))
    opened = ends_well(lambda: Tokenizer(place / TOKENIZER))
    if isinstance(opened, str):
        return
    most = limits.TOKENIZER_GROWTH * 4 * (len(text) + limits.TOKENIZER_STEPS)  # a letter has at most 4 bytes
    ids = ends_well(lambda: opened.encode(text))
    assert isinstance(ids, str) or len(ids) <= most
    assert len(opened.decode(list(range(ALL_BYTES_AND_END)))) <= limits.TOKENIZER_GROWTH * 4 * 300


@pytest.fixture(scope="module")
def bundle(make_checkpoint: MakeCheckpoint, place: Path) -> Path:
    return gpt2onnx.export(make_checkpoint(n_embd=8, n_layer=1, n_head=1), place / "bundle", twin=False).folder


OPERATORS = st.sampled_from(
    ["Add", "Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "Identity", "MatMul", "Neg", "Pad", "Range", "Reshape", "Tile",
     "Transpose", "Unsqueeze", "Where", "Loop", "If", "RandomNormal", "EyeLike", "OneHot", "Resize", "Upsample", "Einsum"]
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 3, 20_000, 2**31, 10**12, -1]), max_size=3)


def in_a_branch(nodes: list[onnx.NodeProto], first: int) -> list[onnx.NodeProto]:
    """The nodes from one on as a branch, which an input chooses."""

    def branch(name: str, inner: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(inner, name, [], [helper.make_tensor_value_info(inner[-1].output[0], 1, None)])

    condition = [
        helper.make_node("ReduceMax", ["input_ids"], ["greatest"], keepdims=0),
        helper.make_node("Cast", ["greatest"], ["condition"], to=9),
    ]
    other = helper.make_node("Cast", ["input_ids"], ["other"], to=1)
    branches = {"then_branch": branch("odd", nodes[first:]), "else_branch": branch("other", [other])}
    return [*nodes[:first], *condition, helper.make_node("If", ["condition"], ["chosen"], **branches)]


@inputs(few=40)
@given(data=st.data())
def test_graphs_of_odd_operators(bundle: Path, place: Path, data: st.DataObject) -> None:
    """Operators on constants and on one another, before the network: refused, or opened in a moment."""
    folder = place / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)
    constants = [numpy_helper.from_array(np.array(data.draw(SHAPES), np.int64), f"size.{index}") for index in range(3)]
    constants.append(numpy_helper.from_array(np.zeros((1, 20_000), np.float32), "row"))
    names = [*(each.name for each in constants), "wte.weight", "input_ids"]
    nodes = []
    for index in range(data.draw(st.integers(1, 6))):
        given_to = data.draw(st.lists(st.sampled_from(names), max_size=3))
        kind = data.draw(OPERATORS)
        settings = {"to": 1} if kind == "Cast" else {"axis": 0} if kind == "Concat" else {}
        nodes.append(helper.make_node(kind, given_to, [f"odd.{index}"], **settings))
        names.append(f"odd.{index}")
    if data.draw(st.booleans()):
        nodes = in_a_branch(nodes, data.draw(st.integers(0, len(nodes) - 1)))
        names.append("chosen")

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend(constants)
        rest = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *rest])
        model.graph.output.append(helper.make_tensor_value_info(names[-1], 1, None))

    edit_graphs(folder, change)

    def load() -> object:
        path = Bundle.open(folder).checked_path(GRAPH)
        return providers.open_graph(path, devices.CPU, threads=1, name=path)

    ends_well(load)
