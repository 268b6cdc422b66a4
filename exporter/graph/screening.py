"""The network in two parts, body and output head, and a head that screens.

Greedy search and sampling with top-k look at few logits, while the head is a third of all that a step of GPT-2 small reads
from memory. Of a head by itself the runtime makes estimates in 8 bits, which are a quarter of it, and computes only the
highest ones again: see `runtime.screening`. Their weights aren't stored: they depend on what reaches the head.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...models import contract
from ...models.bundle import HEAD_GRAPH
from ...models.config import GPT2Config
from ...runtime.engine import screening
from .operators import MICROSOFT, Nodes, as_model
from .weights import without_data

# Bytes of a head in fp32: of a smaller one screening saves less time than it takes.
_LARGE = 24 << 20


def pays(config: GPT2Config) -> bool:
    """Whether screening is faster than the whole head, and has operators for its width."""
    large = 4 * config.vocab_size * config.n_embd >= _LARGE
    return large and screening.block_size(config.n_embd) > 0 and screening.candidates(1, 1, config.vocab_size) > 0


def build(model: ModelProto, config: GPT2Config) -> tuple[ModelProto, ModelProto, ModelProto]:
    """Writes the three graphs.

    Args:
        model: the first graph, in fp32, its weights in external data.
        config: the architecture.

    Returns:
        Body, head, and the head that screens: see `models.contract`.
    """
    graph = model.graph
    head = [node for node in graph.node if node.name.startswith("head.") or contract.LOGITS in node.output]
    body = [node for node in graph.node if node not in head]
    made = {name for node in body for name in node.output}
    (passed,) = {name for node in head for name in node.input if name in made}
    states = _value(contract.HIDDEN_STATES, "batch_size", "kept_sequence_length", config.n_embd)
    (logits,) = (each for each in graph.output if each.name == contract.LOGITS)
    cache = [each for each in graph.output if each is not logits]
    return (
        _part(graph.initializer, _renamed(body, passed), graph.input, [states, *cache], graph.value_info),
        _part(graph.initializer, _renamed(head, passed), [states], [logits]),
        _screening(config),
    )


def _part(
    initializers: Iterable[TensorProto],
    nodes: list[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    inner: Sequence[ValueInfoProto] = (),
) -> ModelProto:
    used = {name for node in nodes for name in node.input}
    kept = [each for each in initializers if each.name in used]
    return as_model(helper.make_graph(nodes, "gpt2_part", inputs, outputs, kept, value_info=inner))


def _renamed(nodes: Iterable[NodeProto], passed: str) -> list[NodeProto]:
    """The nodes, the value that passes from body to head under the contract's name."""
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for values in (copy.input, copy.output):
            values[:] = [contract.HIDDEN_STATES if name == passed else name for name in values]
        copies.append(copy)
    return copies


def _screening(config: GPT2Config) -> ModelProto:
    """Estimates of all logits, the highest of them computed again in full."""
    width, vocabulary = config.n_embd, config.vocab_size
    size = screening.block_size(width)
    nodes = Nodes()
    blocks = width // size
    rows, scales, bias = contract.ESTIMATES
    made = [
        helper.make_tensor_value_info(rows, TensorProto.UINT8, [vocabulary, blocks, size]),
        _value(scales, vocabulary, blocks),
        _value(bias, vocabulary),
    ]
    products = nodes.op(
        "MatMulNBits", [contract.BALANCED, rows, scales, "", "", bias], "products", domain=MICROSOFT,
        K=width, N=vocabulary, bits=8, block_size=size, accuracy_level=4,
    )  # fmt: skip
    estimates = nodes.op("Add", [products, contract.COMMON], "estimates")
    nodes.op("TopK", [estimates, contract.CANDIDATES], "top", outputs=[contract.HIGHEST, "tokens"], axis=-1)
    last = nodes.constant("last_axis", np.array([-1], np.int64))
    chosen = nodes.op("Gather", [contract.HEAD, "tokens"], "chosen", axis=0)
    column = nodes.op("Unsqueeze", [contract.HIDDEN_STATES, last], "column")
    exact = nodes.op("Squeeze", [nodes.op("MatMul", [chosen, column], "product"), last], "exact")
    nodes.op("ScatterElements", [estimates, "tokens", exact], contract.LOGITS, axis=-1)
    inputs = [
        _value(contract.HIDDEN_STATES, "positions", width),
        _value(contract.BALANCED, "positions", width),
        _value(contract.COMMON, "positions", 1),
        helper.make_tensor_value_info(contract.CANDIDATES, TensorProto.INT64, [1]),
        _value(contract.HEAD, vocabulary, width),
    ]
    outputs = [_value(contract.LOGITS, "positions", vocabulary), _value(contract.HIGHEST, "positions", "candidates")]
    weights = [without_data(each, HEAD_GRAPH) for each in made]
    return as_model(helper.make_graph(nodes.nodes, "gpt2_screening", inputs, outputs, [*weights, *nodes.initializers]))


def _value(name: str, *shape: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
