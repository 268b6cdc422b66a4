"""Gradients of the loss by the outputs of linear layers: the weight of errors of these outputs.

On texts that the network itself wrote, the mean of g g^T over tokens, g a gradient of the loss by a layer's outputs, is their
Fisher information: errors e of the outputs raise the divergence from the network by about half of e^T g g^T e. It is the
output's factor in K-FAC (https://arxiv.org/abs/1503.05671).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ...models.config import GPT2Config
from ...runtime.ort import devices, providers
from ..graph.blocks import Array
from ..graph.operators import as_model
from ..graph.weights import mapped

_HEADS = ("lm_head.weight", "wte.weight")  # the second one if the head is tied to the embedding
# Of the central difference that gives the slope of the activation function, exact to about 1e-5.
_STEP = np.float32(2**-8)


class Gradients:
    """Second moments of the loss' gradients by layers' outputs, summed up text by text.

    mlp.c_fc is left out: the gradients by its outputs are nearly independent of each other, so they change nothing.

    Args:
        model: the network's fused graph in fp32.
        folder: where its external data is.
        threads: of one operator.
    """

    def __init__(self, model: ModelProto, folder: Path, config: GPT2Config, *, threads: int) -> None:
        self._config, self._tokens = config, 0
        self._weights = {
            each.name: mapped(each, folder) for each in model.graph.initializer if each.data_type == TensorProto.FLOAT
        }
        nodes = {node.name: node for node in model.graph.node}
        self._attention_scales = [
            next(each.f for each in nodes[f"h.{layer}.attn"].attribute if each.name == "scale")
            for layer in range(config.n_layer)
        ]
        self._normalized = {name: node.input[0] for name, node in nodes.items() if node.op_type == "LayerNormalization"}
        self._function, self._attention = _Function(model, threads), _Attention(threads)
        self._moments: dict[str, Array] = {}

    @property
    def values(self) -> list[str]:
        """The graph's values that `add` needs."""
        layers = [f"h.{layer}.{name}" for layer in range(self._config.n_layer) for name in ("attn.c_attn", "mlp.c_fc")]
        return [*self._normalized.values(), *layers, "ln_f"]

    def moments(self) -> dict[str, Array]:
        """The mean of g g^T over all tokens, float32 [out, out], by layer; without those that overflow."""
        means = {name: each / np.float32(self._tokens) for name, each in self._moments.items()}
        return {name: each for name, each in means.items() if np.isfinite(each).all()}

    def add(self, tokens: npt.NDArray[np.int64], values: Mapping[str, Array]) -> None:
        """Backpropagates the loss of a text.

        Args:
            tokens: int64 [length].
            values: the graph's, for that text, float32 [length, width].
        """
        self._tokens += len(tokens)
        with np.errstate(all="ignore"):
            residual = self._before_norm("ln_f", self._loss(values["ln_f"], tokens), values)
            for layer in reversed(range(self._config.n_layer)):
                mlp, attention = f"h.{layer}.mlp", f"h.{layer}.attn"
                hidden = self._before_matrix(f"{mlp}.c_proj", residual) * self._function.slopes(values[f"{mlp}.c_fc"])
                inner = self._through(f"{mlp}.c_fc", hidden)
                residual = residual + self._before_norm(f"h.{layer}.ln_2", inner, values)
                attended = self._before_matrix(f"{attention}.c_proj", residual)
                qkv = self._attention.before(
                    values[f"{attention}.c_attn"], attended, self._config.n_head, self._attention_scales[layer]
                )
                inner = self._before_matrix(f"{attention}.c_attn", qkv)
                residual = residual + self._before_norm(f"h.{layer}.ln_1", inner, values)

    def _loss(self, x: Array, tokens: npt.NDArray[np.int64]) -> Array:
        """Gradient by the output head's input. The last token has no next one to predict."""
        head = next(self._weights[name] for name in _HEADS if name in self._weights)
        logits = x[:-1] @ head.T
        error = np.exp(logits - logits.max(-1, keepdims=True))
        error /= error.sum(-1, keepdims=True)
        error[np.arange(len(error)), tokens[1:]] -= 1
        return np.concatenate([error @ head, np.zeros_like(x[:1])])

    def _before_matrix(self, layer: str, gradient: Array) -> Array:
        """Gradient by a layer's input; notes the moment of that by its output."""
        moment: Array = gradient.T @ gradient
        self._moments[layer] = self._moments[layer] + moment if layer in self._moments else moment
        return self._through(layer, gradient)

    def _through(self, layer: str, gradient: Array) -> Array:
        """Gradient by a layer's input."""
        product: Array = gradient @ self._weights[f"{layer}.weight"].T
        return product

    def _before_norm(self, layer: str, gradient: Array, values: Mapping[str, Array]) -> Array:
        """Gradient by a layer norm's input."""
        x = values[self._normalized[layer]]
        centred = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(self._config.layer_norm_epsilon))
        centred *= scale
        gradient = gradient * self._weights[f"{layer}.weight"]
        along = (gradient * centred).mean(-1, keepdims=True)
        result: Array = scale * (gradient - gradient.mean(-1, keepdims=True) - centred * along)
        return result


class _Function:
    """The activation function, as the graph's operators."""

    def __init__(self, model: ModelProto, threads: int) -> None:
        self._x, name = "h.0.mlp.c_fc", "h.0.mlp.act"
        (self._y,) = (node.input[0] for node in model.graph.node if node.name == "h.0.mlp.c_proj.matmul")
        proto = helper.make_graph(
            [node for node in model.graph.node if node.name.startswith(name)],
            "function",
            [helper.make_tensor_value_info(self._x, TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info(self._y, TensorProto.FLOAT, None)],
            [each for each in model.graph.initializer if each.name.startswith(name)],
        )
        content = as_model(proto).SerializeToString()
        linear = self._y == self._x
        self._session = None if linear else providers.open_graph(content, devices.CPU, threads=threads, name=name)

    def slopes(self, x: Array) -> Array:
        """Its derivative at each number, by a central difference."""
        if self._session is None:
            return np.ones_like(x)
        (found,) = providers.run(self._session, [self._y], {self._x: np.stack([x - _STEP, x + _STEP])})
        slopes: Array = (found[1] - found[0]) / (2 * _STEP)
        return slopes


class _Attention:
    """Backward pass of causal attention, by ONNX Runtime: NumPy is slow at many small products of matrices."""

    _OUTPUTS = ("by_query", "by_key", "by_value")

    def __init__(self, threads: int) -> None:
        steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
            ("Transpose", ["key"], "key_turned", {"perm": [0, 2, 1]}),
            ("MatMul", ["query", "key_turned"], "scores", {}),
            ("Add", ["scores", "mask"], "masked", {}),
            ("Softmax", ["masked"], "shares", {"axis": -1}),
            ("Transpose", ["value"], "value_turned", {"perm": [0, 2, 1]}),
            ("MatMul", ["gradient", "value_turned"], "by_shares", {}),
            ("Mul", ["by_shares", "shares"], "along_each", {}),
            ("ReduceSum", ["along_each", "last"], "along", {"keepdims": 1}),
            ("Sub", ["by_shares", "along"], "apart", {}),
            ("Mul", ["apart", "shares"], "by_scores", {}),
            ("MatMul", ["by_scores", "key"], "by_query", {}),
            ("Transpose", ["by_scores"], "by_scores_turned", {"perm": [0, 2, 1]}),
            ("MatMul", ["by_scores_turned", "query"], "by_key", {}),
            ("Transpose", ["shares"], "shares_turned", {"perm": [0, 2, 1]}),
            ("MatMul", ["shares_turned", "gradient"], "by_value", {}),
        ]
        proto = helper.make_graph(
            [helper.make_node(kind, inputs, [output], **attributes) for kind, inputs, output, attributes in steps],
            "attention",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                for name in ("query", "key", "value", "gradient", "mask")
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._OUTPUTS],
            [numpy_helper.from_array(np.array([-1], np.int64), "last")],
        )
        content = as_model(proto).SerializeToString()
        self._session = providers.open_graph(content, devices.CPU, threads=threads, name="attention")

    def before(self, qkv: Array, gradient: Array, heads: int, scale: float) -> Array:
        """Gradient by packed queries, keys and values [length, 3 * width], given the gradient by attention's output."""
        length = len(qkv)
        query, key, value = qkv.reshape(length, 3, heads, -1).transpose(1, 2, 0, 3)  # each [heads, length, size]
        feeds = {
            "query": query * np.float32(scale),
            "key": key,
            "value": value,
            "gradient": gradient.reshape(length, heads, -1).transpose(1, 0, 2),
            "mask": np.triu(np.full((length, length), -np.inf, np.float32), 1),
        }
        feeds = {name: np.ascontiguousarray(each) for name, each in feeds.items()}
        by_query, by_key, by_value = providers.run(self._session, self._OUTPUTS, feeds)
        found = np.stack([by_query * np.float32(scale), by_key, by_value])
        return found.transpose(2, 0, 1, 3).reshape(length, -1)
