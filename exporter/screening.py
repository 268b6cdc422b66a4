"""A graph that computes in full only those logits that can be among the largest.

Greedy search looks at the largest logit, sampling with top-k at the k largest; but the output head of GPT-2 small is a third
of all that a step reads from memory. This graph estimates all logits with the head in 8 bits, and computes again, in
full, the logits of the tokens whose estimates are the highest. How far an estimate can be off is known (see `Head.margin`):
where the k-th highest estimate is so far above the first one that isn't computed again that no such token can be among the k
largest, the k largest logits are exact, and all others are estimates that are less. Otherwise the head computes all of
them. The idea is that of candidates in SVD-softmax (https://proceedings.neurips.cc/paper_files/paper/2017/hash/4e2a6330465c8ffcaa696a5a16639176-Abstract.html), but with a certain bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, load

from ..models import contract
from ..models.bundle import GRAPH, SCREENING_GRAPH, WEIGHTS, Bundle
from ..runtime.screening import candidates
from .calibrate import last_states
from .operators import MICROSOFT, Nodes, as_model
from .quantize import QuantizedMatrix, dequantize, quantize
from .weights import WeightsFile

Array = npt.NDArray[np.float32]

_BITS, _BLOCK_SIZES = 8, (64, 32, 16)
_CHUNK = 8192  # rows of the head that are in memory as float32 at a time
# Of the network's own texts, the share of positions at which screening has to succeed: elsewhere it was for nothing.
_LEAST_SUCCESS = 0.9


@dataclass(frozen=True)
class Head:
    """The output head in 8 bits, arranged so that rounding costs little.

    With x the input and w a row of the head, x w = (x - mean) (w - common) + (x - mean) common + mean w. The first product is
    rounded, after one side was multiplied and the other divided by `balance`; the rest isn't.

    Attributes:
        mean: of the inputs, float32 [width].
        common: mean of the rows, float32 [width].
        balance: float32 [width].
        matrix: the rows without their mean, divided by `balance`.
        bias: mean w of each row, float32 [vocabulary].
        error: what rounding a row of `matrix` changes, as a share of its length; the largest.
        longest: length of the longest row of `matrix`.
        longest_row: of the head itself.
    """

    mean: Array
    common: Array
    balance: Array
    matrix: QuantizedMatrix
    bias: Array
    error: np.float32
    longest: np.float32
    longest_row: np.float32

    @classmethod
    def of(cls, head: Array, states: Array, block_size: int) -> "Head":
        """Arranges a head [vocabulary, width] for inputs such as these [count, width]."""
        mean, common = states.mean(0), head.mean(0)
        spreads = np.sqrt(np.square(states - mean).mean(0)), np.sqrt(np.square(head - common).mean(0))
        usable = (spreads[0] > 0) & (spreads[1] > 0)
        balance = np.ones_like(mean)
        balance[usable] = np.sqrt(spreads[1][usable] / spreads[0][usable])
        parts, errors, lengths = list[QuantizedMatrix](), list[Array](), list[Array]()
        for first in range(0, len(head), _CHUNK):
            rows = (head[first : first + _CHUNK] - common) / balance
            parts.append(quantize(rows, _BITS, block_size))
            rounded = dequantize(parts[-1])
            errors.append(np.linalg.norm(rows - rounded, axis=1))
            lengths.append(np.linalg.norm(rounded, axis=1))
        length = np.concatenate(lengths)
        data, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "scales"))
        matrix = QuantizedMatrix(data, scales, _BITS, block_size, head.shape[1])
        shares = np.concatenate(errors) / np.where(length > 0, length, 1)
        longest_row = np.linalg.norm(head, axis=1).max()
        return cls(mean, common, balance, matrix, head @ mean, shares.max(), length.max(), longest_row)

    def margin(self, x: Array) -> Array:
        """By how much estimates for inputs [count, width] are off at most, float32 [count].

        By the inequality of Cauchy and Schwarz the error of a product is at most the length of one side times the length of
        what the other is off by: for the rows that is known; of the inputs MatMulNBits rounds each number by at most half
        a step, and a step is a 127th of its block's greatest number.
        """
        balanced = (x - self.mean) * self.balance
        peaks = np.abs(balanced).reshape(len(x), -1, self.matrix.block_size).max(-1)
        rounding = np.linalg.norm(peaks, axis=-1) * _half_steps(self.matrix.block_size)
        share = self.error * np.linalg.norm(balanced, axis=-1) + rounding
        lengths = np.linalg.norm(x, axis=-1) + np.linalg.norm(self.mean)
        result: Array = share * self.longest + lengths * self.float32
        return result

    @property
    def float32(self) -> np.float32:
        """What sums of float32 may be off by in an estimate and in the logit itself, for an input of length 1."""
        return self.longest_row * np.float32(len(self.mean)) * np.finfo(np.float32).eps


def add(bundle: Bundle, head: Array) -> bool:
    """Adds the graph to a bundle in fp32, if screening succeeds for the network.

    Args:
        bundle: with the first graph alone, not yet described by its manifest.
        head: float32 [vocabulary, width].

    Returns:
        Whether it did.

    Raises:
        BackendError: ONNX Runtime can't load or run the first graph.
    """
    block_size = next((size for size in _BLOCK_SIZES if head.shape[1] % size == 0), None)
    if block_size is None or not candidates(1, 1, len(head)):
        return False
    states = last_states(bundle)
    if not np.isfinite(states).all():
        return False
    estimates = Head.of(head, states, block_size)
    if _success(estimates, head, states) < _LEAST_SUCCESS:
        return False
    model = load(bundle.folder / GRAPH, load_external_data=False)
    with (bundle.folder / WEIGHTS).open("r+b") as file:
        file.seek(0, 2)
        screened = build(model, estimates, WeightsFile(bundle.folder / WEIGHTS, file))
    (bundle.folder / SCREENING_GRAPH).write_bytes(screened.SerializeToString())
    return True


def _success(estimates: Head, head: Array, states: Array) -> float:
    """The share of these inputs for which the largest logit would be certain."""
    logits = states @ head.T
    count = candidates(1, 1, len(head))
    ordered = -np.partition(-logits, [0, count - 1], axis=-1)
    return float((ordered[:, 0] - ordered[:, count - 1] > 2 * estimates.margin(states)).mean())


def build(model: ModelProto, head: Head, weights: WeightsFile) -> ModelProto:
    """Writes the graph.

    Args:
        model: the first graph, in fp32.
        head: the estimates.
        weights: takes them as external data.

    Returns:
        The first graph with two more inputs, `certain` and `candidates`, both int64 [1] and optional; by default
        all logits are computed. See `models.contract`.
    """
    exact = [node for node in model.graph.node if node.name.startswith("head.") or contract.LOGITS in node.output]
    body = Nodes([node for node in model.graph.node if node not in exact], list(model.graph.initializer))
    table = "lm_head.weight" if any(each.name == "lm_head.weight" for each in body.initializers) else "wte.weight"
    float_, int_ = TensorProto.FLOAT, TensorProto.INT64
    none = body.constant("screening.none", np.array([0], np.int64))
    wanted = body.op("Greater", [contract.CANDIDATES, none], "screening.wanted")
    names = ("screening.estimates", "screening.candidates", "screening.enough")
    body.op(
        "If", [wanted], "screening", outputs=names,
        then_branch=_estimates(body, head, weights), else_branch=_nothing(),
    )  # fmt: skip
    body.op(
        "If", [names[2]], "screening.head", outputs=[contract.LOGITS],
        then_branch=_patched(names[0], names[1], table), else_branch=_branch(_renamed(exact), [("exact.logits", float_)]),
    )  # fmt: skip
    inputs = list(model.graph.input)
    for name, default in ((contract.CERTAIN, 1), (contract.CANDIDATES, 0)):
        inputs.append(helper.make_tensor_value_info(name, int_, [1]))
        body.constant(name, np.array([default], np.int64))
    return as_model(
        helper.make_graph(
            body.nodes, "gpt2_screening", inputs, model.graph.output, body.initializers,
            value_info=model.graph.value_info,
        )
    )  # fmt: skip


def _estimates(body: Nodes, head: Head, weights: WeightsFile) -> GraphProto:
    """Estimates of all logits, the tokens whose estimates are highest, and whether the largest logits are among those."""
    nodes, matrix = Nodes(), head.matrix

    def constant(name: str, array: npt.NDArray[np.generic]) -> str:
        return body.constant(f"screening.{name}", array)

    def number(name: str, value: float | np.float32) -> str:
        return constant(name, np.array(value, np.float32))

    def stored(name: str, array: npt.NDArray[np.generic]) -> str:
        body.initializers.append(weights.append(f"screening.{name}", array))
        return f"screening.{name}"

    def length(x: str, name: str) -> str:
        return nodes.op("ReduceL2", [x, last], name, keepdims=0)

    x = "kept"
    last = constant("last_axis", np.array([-1], np.int64))
    centred = nodes.op("Sub", [x, constant("mean", head.mean)], "centred")
    balanced = nodes.op("Mul", [centred, constant("balance", head.balance)], "balanced")
    products = nodes.op(
        "MatMulNBits",
        [balanced, stored("data", matrix.data), stored("scales", matrix.scales), "", "", stored("bias", head.bias)],
        "products", domain=MICROSOFT, K=matrix.width, N=len(matrix.data), bits=matrix.bits,
        block_size=matrix.block_size, accuracy_level=4,
    )  # fmt: skip
    common = nodes.op("MatMul", [centred, constant("common", head.common[:, None])], "common")
    estimates = nodes.op("Add", [products, common], "estimates")

    # As `Head.margin`, twice.
    blocks = nodes.op("Reshape", [balanced, constant("blocks", np.array([0, 0, -1, matrix.block_size]))], "in_blocks")
    peaks = nodes.op("ReduceMax", [nodes.op("Abs", [blocks], "sizes"), last], "peaks", keepdims=0)
    half_steps = number("half_steps", _half_steps(matrix.block_size))
    rounding = nodes.op("Mul", [length(peaks, "length_of_peaks"), half_steps], "rounding")
    share = nodes.op("Mul", [length(balanced, "length"), number("error", head.error)], "share_of_rows")
    share = nodes.op("Add", [share, rounding], "share")
    margin = nodes.op("Mul", [share, number("longest", 2 * head.longest)], "margin_of_rounding")
    length_of_mean = number("length_of_mean", float(np.linalg.norm(head.mean)))
    lengths = nodes.op("Add", [length(x, "length_of_input"), length_of_mean], "lengths")
    float32 = nodes.op("Mul", [lengths, number("float32", 2 * head.float32)], "margin_of_float32")
    margin = nodes.op("Add", [margin, float32], "margin")

    nodes.op("TopK", [estimates, contract.CANDIDATES], "highest", outputs=["highest", "tokens"], axis=-1)
    place = nodes.op("Sub", [contract.CERTAIN, constant("one", np.array([1], np.int64))], "place")
    least = nodes.op("Gather", ["highest", place], "least_certain", axis=-1)
    lowest = nodes.op("Gather", ["highest", last], "lowest", axis=-1)
    gap = nodes.op("Squeeze", [nodes.op("Sub", [least, lowest], "gap"), last], "gap_by_position")
    spare = nodes.op("ReduceMin", [nodes.op("Sub", [gap, margin], "spare")], "least_spare", keepdims=0)
    enough = nodes.op("Greater", [spare, number("zero", 0)], "enough")
    outputs = [(estimates, TensorProto.FLOAT), ("tokens", TensorProto.INT64), (enough, TensorProto.BOOL)]
    return _branch(nodes, outputs)


def _nothing() -> GraphProto:
    """No estimates, which aren't enough."""
    nodes = Nodes()
    outputs = []
    for name, empty in (
        ("no_estimates", np.zeros((1, 1, 1), np.float32)),
        ("no_tokens", np.zeros((1, 1, 1), np.int64)),
        ("not_enough", np.array(False)),
    ):
        outputs.append((nodes.constant(name, empty), nodes.initializers[-1].data_type))
        nodes.op("Identity", [name], f"{name}.copy")
    return _branch(nodes, [(f"{name}.copy", kind) for name, kind in outputs])


def _patched(estimates: str, tokens: str, table: str) -> GraphProto:
    """Estimates with the logits of some tokens computed in full."""
    nodes = Nodes()
    last = nodes.constant("patched.last_axis", np.array([-1], np.int64))
    rows = nodes.op("Gather", [table, tokens], "patched.rows", axis=0)
    column = nodes.op("Unsqueeze", ["kept", last], "patched.column")
    product = nodes.op("MatMul", [rows, column], "patched.product")
    product = nodes.op("Squeeze", [product, last], "patched.exact")
    logits = nodes.op("ScatterElements", [estimates, tokens, product], "patched.logits", axis=-1)
    return _branch(nodes, [(logits, TensorProto.FLOAT)])


def _renamed(nodes: Sequence[NodeProto]) -> Nodes:
    """The first graph's head, its logits under another name: two values of one graph can't share theirs."""
    copies = Nodes()
    for node in nodes:
        copies.nodes.append(NodeProto())
        copies.nodes[-1].CopyFrom(node)
        outputs = ["exact.logits" if name == contract.LOGITS else name for name in node.output]
        copies.nodes[-1].output[:] = outputs
    return copies


def _branch(nodes: Nodes, outputs: Sequence[tuple[str, int]]) -> GraphProto:
    declared: list[ValueInfoProto] = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs]
    return helper.make_graph(nodes.nodes, outputs[0][0], [], declared, nodes.initializers)


def _half_steps(block_size: int) -> np.float32:
    """Length of a block's rounding errors, as a share of its greatest number."""
    return np.float32(math.sqrt(block_size) / (2 * 127))
