"""A graph that ONNX Runtime would compute on without end while it loads, or at the first token, is refused before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.bundles import add_to_logits, edit_graphs, sign
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine

import gpt2onnx
from gpt2onnx.errors import BundleError
from gpt2onnx.models import graph_rules
from gpt2onnx.models.bundle import CONFIG, GENERATION_CONFIG, GRAPH, SECOND_GRAPH_WEIGHTS, Bundle
from gpt2onnx.models.config import ACTIVATIONS

Change = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def bundle(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("whole") / "bundle", twin=False).folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle")


def number(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def sized(kind: str, *shape: int) -> Change:
    """The logits with a sum of as many zeros as the shape says."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(number("size", *shape))
        inputs = ["size"] if kind == "ConstantOfShape" else ["ids", "size"]
        nodes = [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            helper.make_node(kind, inputs, ["many"]),
            helper.make_node("ReduceMax", ["many"], ["most"], keepdims=0),
        ]
        add_to_logits(model, nodes, "most")

    return change


def outer_product(model: onnx.ModelProto) -> None:
    for name, shape in (("column", (40_000, 1)), ("row", (1, 40_000))):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
    nodes = [
        helper.make_node("Add", ["column", "row"], ["many"]),
        helper.make_node("ReduceMax", ["many"], ["most"], keepdims=0),
    ]
    add_to_logits(model, nodes, "most")


def copies_of_weights(model: onnx.ModelProto) -> None:
    """Each copy is kept: a thousand take a thousand times the weights' memory."""
    name = model.graph.initializer[0].name
    add_to_logits(model, [helper.make_node("Neg", [name], [f"copy.{index}"]) for index in range(1000)], "copy.0")


def chain_of_copies(model: onnx.ModelProto) -> None:
    names = [model.graph.initializer[0].name, *(f"copy.{index}" for index in range(1000))]
    add_to_logits(model, [helper.make_node("Neg", [one], [two]) for one, two in pairwise(names)], names[-1])


def sparse(model: onnx.ModelProto) -> None:
    values, places = helper.make_tensor("s", TensorProto.FLOAT, [1], [0.0]), helper.make_tensor("p", 7, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [40_000, 40_000]))


def loop(model: onnx.ModelProto) -> None:
    body = onnx.GraphProto(node=[onnx.NodeProto(op_type="Identity")])
    model.graph.node.append(onnx.NodeProto(op_type="Identity", attribute=[onnx.AttributeProto(name="to", g=body)]))


def programs(model: onnx.ModelProto) -> None:
    body = onnx.GraphProto(node=[onnx.NodeProto(op_type="Identity")])
    model.graph.node.append(
        onnx.NodeProto(op_type="Identity", attribute=[onnx.AttributeProto(name="to", graphs=[body])])
    )


def branching(*inner: onnx.NodeProto, condition: str = "") -> Change:
    """Appends a choice between these nodes and none."""

    def change(model: onnx.ModelProto) -> None:
        bodies = {"then": onnx.GraphProto(name="branch", node=inner), "else": onnx.GraphProto(name="other")}
        chosen = [onnx.AttributeProto(name=f"{kind}_branch", g=body) for kind, body in bodies.items()]
        name = condition or model.graph.input[0].name
        inputs = [helper.make_node("Cast", [name], ["cond"], to=TensorProto.BOOL)] if not condition else []
        model.graph.node.extend(inputs)
        model.graph.node.append(onnx.NodeProto(op_type="If", input=[condition or "cond"], attribute=chosen))

    return change


def nested(model: onnx.ModelProto) -> None:
    chosen = onnx.AttributeProto(name="then_branch", g=onnx.GraphProto(name="inner"))
    branching(onnx.NodeProto(op_type="If", input=["cond"], attribute=[chosen]))(model)


def outer_product_in_branch(model: onnx.ModelProto) -> None:
    for name, shape in (("column", (40_000, 1)), ("row", (1, 40_000))):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
    branching(helper.make_node("Add", ["column", "row"], ["many"]))(model)


def zeros_in_branch(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**9]), "size"))
    branching(helper.make_node("ConstantOfShape", ["size"], ["zeros"]))(model)


def branch_with_weights(model: onnx.ModelProto) -> None:
    branching()(model)
    model.graph.node[-1].attribute[0].g.initializer.append(number("weight", 1))


def outside_of_branch(model: onnx.ModelProto) -> None:
    branching(helper.make_node("Identity", ["cond"], ["inner"]))(model)
    model.graph.node.append(helper.make_node("Identity", ["inner"], ["outer"]))


def again(name: str) -> Change:
    """ONNX Runtime puts operators into an order of its own: which one a name means is then open."""

    def change(model: onnx.ModelProto) -> None:
        branching(helper.make_node("Identity", ["cond"], ["inner"]))(model)
        model.graph.node.append(helper.make_node("Identity", ["cond"], [name]))

    return change


def constant(**attributes: Any) -> Change:
    return lambda model: model.graph.node.insert(0, helper.make_node("Constant", [], ["made"], **attributes))


def two_kinds(model: onnx.ModelProto) -> None:
    """ONNX Runtime goes by the type, and finds the numbers."""
    ints = onnx.AttributeProto(name="value", type=onnx.AttributeProto.INTS, ints=[10**9], t=number("few", 1))
    model.graph.node.insert(0, onnx.NodeProto(op_type="Constant", output=["made"], attribute=[ints]))


def constant_in_branch(model: onnx.ModelProto) -> None:
    branching(helper.make_node("Constant", [], ["size"], value=number("size", 10**9)))(model)


def constant_choice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    branching(condition="always")(model)


def with_tensors(**tensors: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].attribute.append(onnx.AttributeProto(name="value", **tensors))

    return change


def backwards(model: onnx.ModelProto) -> None:
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


# What is done to a graph, and what the message has to say.
HOSTILE: dict[str, tuple[Change, str]] = {
    "trillions of zeros": (sized("ConstantOfShape", 20_000, 20_000, 20_000), "'ConstantOfShape' to more than"),
    "4 GB of zeros": (sized("ConstantOfShape", 10**9), "'ConstantOfShape' to more than"),
    "an expansion": (sized("Expand", 20_000, 20_000, 20_000), "'Expand' to more than"),
    "padding": (sized("Pad", 0, 0, 0, 2 * 10**9), "'Pad' to more than"),
    "repetitions": (sized("Tile", 1000, 1000), "the operator 'Tile'"),
    "an outer product": (outer_product, "'Add' of constants"),
    "many copies of weights": (copies_of_weights, "'Neg' of constants"),
    "copies of copies of weights": (chain_of_copies, "'Neg' of constants"),
    "sparse weights": (sparse, "sparse tensors"),
    "a list of tensors": (with_tensors(tensors=[number("many", 1)]), "several or sparse tensors"),
    "a sparse attribute": (with_tensors(sparse_tensor=onnx.SparseTensorProto(dims=[9])), "several or sparse tensors"),
    "a loop": (loop, "loops, or branches in branches"),
    "several programs": (programs, "several programs"),
    "branches in branches": (nested, "loops, or branches in branches"),
    "an operator in a branch": (branching(helper.make_node("Tile", ["cond"], ["y"])), "the operator 'Tile'"),
    "an outer product in a branch": (outer_product_in_branch, "'Add' of constants"),
    "zeros in a branch": (zeros_in_branch, "'ConstantOfShape' to more than"),
    "a branch with weights": (branch_with_weights, "more in a branch than operators"),
    "a result of a branch outside": (outside_of_branch, "operators in another order"),
    "a name of a branch again": (again("inner"), "a name twice"),
    "a name of an input again": (again("input_ids"), "a name twice"),
    "a constant of numbers": (constant(value_ints=[10**9]), "the attribute 'value_ints'"),
    "a constant of two kinds": (two_kinds, "a constant that isn't a tensor"),
    "a constant in a branch": (constant_in_branch, "a constant in a branch"),
    "a branch that a constant chooses": (constant_choice, "'If' of constants"),
    "a function": (lambda model: model.functions.append(onnx.FunctionProto(name="twice")), "functions"),
    "a training graph": (lambda model: model.training_info.append(onnx.TrainingInfoProto()), "a training graph"),
    "another domain": (
        lambda model: model.graph.node.append(onnx.NodeProto(op_type="Cast", domain="mine")),
        "the operator 'Cast'",
    ),
    "an attribute": (
        lambda model: model.graph.node[0].attribute.append(helper.make_attribute("pads", [10**12])),
        "the attribute 'pads'",
    ),
    "another order": (backwards, "operators in another order"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_graphs_that_could_run_without_end(kind: str, copy: Path) -> None:
    change, reason = HOSTILE[kind]
    edit_graphs(copy, change)
    for refused in (Bundle.open(copy).verify, lambda: gpt2onnx.load(copy)):
        with pytest.raises(BundleError, match=rf"\.onnx has {reason}.*, which no exported graph has") as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (CONFIG, {"n_positions": 10**9}, "has 64 positions where config.json says 1,000,000,000"),
        (GENERATION_CONFIG, {"bad_words_ids": [[i % 250, i // 250] for i in range(50_000)]}, "at most 10,000 entries"),
    ],
    ids=["more positions than the table has", "more bad words than a step can compare"],
)
def test_settings_that_ask_for_too_much(
    name: str, changes: dict[str, Any], message: str, copy: Path, command_line: CommandLine
) -> None:
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | changes))
    sign(copy)
    for arguments in (["verify", copy], ["generate", "-m", copy, "Once"]):
        done = command_line(*arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert message in done.err


def test_more_weights_than_there_are(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, second_graph_at_any_width: None
) -> None:
    """The graph that makes the second one's weights runs unoptimised, once."""
    folder = gpt2onnx.export(make_checkpoint(), tmp_path / "bundle", dtype="int8").folder

    def enlarge(model: onnx.ModelProto) -> None:
        size = next(each for each in model.graph.initializer if each.name.endswith("blocks"))
        size.CopyFrom(number(size.name, 10**12))

    edit_graphs(folder, enlarge, SECOND_GRAPH_WEIGHTS)
    with pytest.raises(BundleError, match="'Expand' to more than"):
        gpt2onnx.load(folder, wide_after=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_exported_graph_is_allowed(activation: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """All heads and layers that call for operators of their own; other precisions are exported by many tests."""
    settings: dict[str, Any] = {"n_embd": 6, "n_head": 6, "n_layer": 1, "tie_word_embeddings": False}
    source = make_checkpoint(activation_function=activation, scale_attn_by_inverse_layer_idx=True, **settings)
    Bundle.open(gpt2onnx.export(source, tmp_path / "bundle", twin=False).folder).verify()


def test_a_loop_in_a_second_part(copy: Path) -> None:
    """Protobuf joins a message that comes in two parts."""
    part = onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(op_type="Loop")])).SerializeToString()
    graph_rules.check((copy / GRAPH).read_bytes(), 64)
    for model in ((copy / GRAPH).read_bytes() + part, part + (copy / GRAPH).read_bytes()):
        with pytest.raises(graph_rules.NotExportedError, match="the operator 'Loop'"):
            graph_rules.check(model, 64)


def test_numbers_of_all_forms_are_read() -> None:
    """A size counts in whatever form protobuf has it; where the file doesn't hold it, it is none."""
    plain = onnx.TensorProto(name="size", data_type=TensorProto.INT64, dims=[3], int64_data=[20_000] * 3)
    raw = number("size", *[20_000] * 3)
    elsewhere = onnx.TensorProto(name="size", data_type=TensorProto.INT64, dims=[3], data_location=1)
    for size in (plain, raw, elsewhere):
        node = helper.make_node("ConstantOfShape", ["size"], ["many"])
        model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[size], node=[node]))
        constant = helper.make_node("Constant", [], ["size"], value=size)
        inside = onnx.ModelProto(graph=onnx.GraphProto(node=[constant, node]))
        for each in (model, inside):
            with pytest.raises(graph_rules.NotExportedError, match="to more than"):
                graph_rules.check(each.SerializeToString(), 64)
    small = onnx.ModelProto(graph=onnx.GraphProto(initializer=[number("size", 3, 4)], node=[node]))
    graph_rules.check(small.SerializeToString(), 64)
