"""Bundles that are changed by somebody who wants to be believed: the manifest calls their files right as they are."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import helper

from gpt2onnx.models.bundle import GRAPH, RAGGED_GRAPH, Manifest, describe_files


def sign(folder: Path) -> None:
    """Writes a manifest of the files as they are."""
    dataclasses.replace(Manifest.read(folder), files=describe_files(folder)).write(folder)


def edit_graphs(folder: Path, change: Callable[[onnx.ModelProto], object], *names: str) -> None:
    """Changes graphs, by default the two that have all of the network, and signs the bundle."""
    for name in names or (GRAPH, RAGGED_GRAPH):
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())
    sign(folder)


def add_to_logits(model: onnx.ModelProto, nodes: list[onnx.NodeProto], name: str) -> None:
    """Adds nodes in front, and what they come to to the logits."""
    for node in model.graph.node:
        node.output[:] = ["before" if output == "logits" else output for output in node.output]
    whole = [*nodes, *model.graph.node, helper.make_node("Add", ["before", name], ["logits"])]
    del model.graph.node[:]
    model.graph.node.extend(whole)


def remove_output(model: onnx.ModelProto, name: str) -> None:
    """Takes an output away."""
    (output,) = [each for each in model.graph.output if each.name == name]
    model.graph.output.remove(output)
