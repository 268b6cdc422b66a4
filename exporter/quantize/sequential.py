"""Sequential calibration: runs the fp32 and the partly quantised network side by side on the same texts.

Layer by layer, a matrix is fitted to the outputs of the fp32 network for the inputs of the quantised one, and rounded with
feedback. Only weights are quantised there: activations stay float32.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from ...models import contract
from ...models.config import GPT2Config
from ...models.precision import Blocks
from ...runtime.ort import devices, providers
from ..graph import fused
from ..graph.blocks import Array, QuantizedMatrix, dequantize, quantize
from ..graph.input_rounding import PerTensor
from ..graph.operators import Graph, Weight, activation, as_model
from ..graph.weights import inline
from .activations import Moments
from .feedback import quantize_with_feedback
from .layers import QuantizedLayers, Scheme, Tensor
from .per_tensor import choose
from .statistics import Statistics

# Appends operators to a graph: takes the names of their inputs, gives those of their outputs.
Part = Callable[..., Sequence[str]]


class SequentialCalibrator:
    """Both networks at one place between two layers.

    Activations are float32 [2, texts, length, width]: first those of the fp32 network, then those of the quantised one.

    Args:
        tensor: gives the fp32 network's weights.
        scheme: how matrices are quantised.
        statistics: of the fp32 network, for the same texts.
        per_tensor: choose the layers whose input a second graph may quantise per tensor.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensor: Tensor,
        scheme: Scheme,
        statistics: Statistics,
        *,
        tied: bool,
        per_tensor: bool,
    ) -> None:
        self._config, self._tensor, self._scheme, self._statistics = config, tensor, scheme, statistics
        self._tied, self._choose_per_tensor = tied, per_tensor
        self._weights: dict[str, Weight] = {}
        self._per_tensor: dict[str, PerTensor] = {}

    def run(self) -> QuantizedLayers:
        """Quantises all layers, in the order of the network."""
        x = self._embed()
        residual, x = self._run(self._first_norm, x)
        for layer in range(self._config.n_layer):
            block, last = f"h.{layer}", layer + 1 == self._config.n_layer
            x = self._quantize(f"{block}.attn.c_attn", x)
            (x,) = self._run(self._attention(layer), x)
            x = self._quantize(f"{block}.attn.c_proj", x)
            residual, x = self._run(self._norm(f"{block}.ln_2"), x, residual)
            x = self._quantize(f"{block}.mlp.c_fc", x)
            (x,) = self._run(self._activation(f"{block}.mlp.act"), x)
            x = self._quantize(f"{block}.mlp.c_proj", x)
            if not last:
                residual, x = self._run(self._norm(f"h.{layer + 1}.ln_1"), x, residual)
        for name in ("ln_f.weight", "ln_f.bias"):
            self._plain(name)
        return QuantizedLayers(self._weights.__getitem__, self._per_tensor)

    def _embed(self) -> Array:
        """Quantises the embedding and the head, and looks the texts up."""
        moment, tokens = self._statistics.head_moment, self._statistics.tokens
        blocks, exact = self._blocks("wte"), self._tensor("wte.weight")
        if moment is None or not self._tied:
            matrix = quantize(exact, blocks.bits, blocks.size)
        else:
            matrix = quantize_with_feedback(exact, blocks.bits, blocks.size, _of_both_uses(moment))
        self._weights["wte.weight"] = matrix
        x = np.stack([exact[tokens], dequantize(matrix)[tokens]])
        if not self._tied:
            blocks, exact = self._blocks("lm_head"), self._tensor("lm_head.weight")
            self._weights["lm_head.weight"] = matrix = quantize(exact, blocks.bits, blocks.size)
        if moment is not None:
            self._choose_rounding("lm_head", matrix, self._statistics.inputs["lm_head"].sample, exact.T)
        return x

    def _quantize(self, name: str, x: Array) -> Array:
        """Quantises a layer for its inputs x; gives its outputs in both networks."""
        weight, bias, blocks = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), self._blocks(name)
        # With 8 bits errors are too small to matter together.
        gradients = self._statistics.gradients.get(name) if blocks.bits < 8 else None
        outputs = np.empty((*x.shape[:-1], len(bias)), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            moments = Moments.of(x[1].reshape(-1, len(weight)), _multiply(x[0], weight, bias, outputs[0]))
        usable = moments.are_finite()
        if usable:
            fitted = moments.fitted(weight).T
            matrix = quantize_with_feedback(fitted, blocks.bits, blocks.size, moments.covariance, gradients)
        else:
            matrix = quantize(weight.T, blocks.bits, blocks.size)
        rounded = dequantize(matrix).T
        if usable:
            bias = moments.bias(rounded)
            self._choose_rounding(name, matrix, moments.sample, weight)
        with np.errstate(over="ignore", invalid="ignore"):
            _multiply(x[1], rounded, bias, outputs[1])
        self._weights |= {f"{name}.weight": matrix, f"{name}.bias": bias}
        return outputs

    def _choose_rounding(self, name: str, matrix: QuantizedMatrix, sample: Array, weight: Array) -> None:
        """Notes that the second graph may quantise a layer's inputs per tensor, if the sample of them allows it."""
        if self._choose_per_tensor and matrix.width % matrix.block_size == 0:
            rounding = choose(sample, weight, matrix.block_size)
            if isinstance(rounding, PerTensor):
                self._per_tensor[name] = rounding

    def _first_norm(self, graph: Graph, embedded: str) -> Sequence[str]:
        residual = fused.add_positions(graph, embedded, self._plain("wpe.weight"), quantized_embedding=True)
        return residual, fused.normalize(graph, self._config, residual, "h.0.ln_1", self._plain)

    def _norm(self, name: str) -> Part:
        def add_and_normalize(graph: Graph, x: str, residual: str) -> Sequence[str]:
            total = graph.add(x, residual, name)
            return total, fused.normalize(graph, self._config, total, name, self._plain)

        return add_and_normalize

    def _attention(self, layer: int) -> Part:
        def attend(graph: Graph, qkv: str) -> Sequence[str]:
            lengths = fused.attention_lengths(graph, graph.constant("axis_1", np.array([1], np.int64)))
            return [fused.attention(graph, self._config, layer, qkv, lengths, cached=False)]

        return attend

    def _activation(self, name: str) -> Part:
        return lambda graph, x: [activation(graph, self._config.activation_function, x, name)]

    def _plain(self, name: str) -> Array:
        """A weight that isn't quantised."""
        self._weights[name] = array = self._tensor(name)
        return array

    def _blocks(self, layer: str) -> Blocks:
        blocks = self._scheme(layer)
        assert blocks is not None, "calibration goes with a precision that quantises all matrices"
        return blocks

    def _run(self, part: Part, *values: Array) -> list[Array]:
        """Runs operators of the network on both networks' activations, one text at a time."""
        graph = Graph(store=inline)
        texts, length = self._statistics.tokens.shape
        feeds: dict[str, npt.NDArray[np.generic]] = {
            contract.ATTENTION_MASK: np.ones((2, length), np.int64),
            contract.POSITION_IDS: np.tile(np.arange(length), (2, 1)),
        }
        names = [f"input.{number}" for number in range(len(values))]
        outputs = part(graph, *names)
        if outputs == names:  # the linear activation function has no operator
            return list(values)
        used = {name for node in graph.nodes for name in node.input}
        proto = helper.make_graph(
            graph.nodes,
            "part",
            [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in feeds if name in used]
            + [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            graph.initializers,
        )
        content, name = as_model(proto).SerializeToString(), outputs[-1]
        session = providers.open_graph(content, devices.CPU, threads=self._statistics.threads, name=name)
        feeds = {name: each for name, each in feeds.items() if name in used}
        found: list[Array] = []
        for text in range(texts):
            inputs = {name: np.ascontiguousarray(each[:, text]) for name, each in zip(names, values, strict=True)}
            parts = providers.run(session, outputs, feeds | inputs)
            found = found or [np.empty((2, texts, *each.shape[1:]), np.float32) for each in parts]
            for all_texts, each in zip(found, parts, strict=True):
                all_texts[:, text] = each
        return found


def _of_both_uses(moment: Array) -> Array:
    """The covariance for which a tied embedding is rounded, float32 [in, in].

    As the output head it multiplies its inputs; as the table of embeddings its own error counts, and counts as much.

    Args:
        moment: second moment of the head's inputs, float32 [in, in].
    """
    scaled: Array = moment / np.float32(np.trace(moment) / len(moment))
    return scaled + np.eye(len(moment), dtype=np.float32)


def _multiply(x: Array, weight: Array, bias: Array, out: Array) -> Array:
    """Computes x @ weight + bias into `out`; gives it as [count, out]. Large arrays are slow to allocate."""
    flat = out.reshape(-1, len(bias))
    np.matmul(x.reshape(-1, len(weight)), weight, out=flat)
    flat += bias
    return flat
