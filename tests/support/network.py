"""GPT-2 in NumPy: judges weights that no checkpoint has, such as those that were rounded. Tests compare it with PyTorch, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from gpt2onnx.models.config import GPT2Config

# What becomes of a matrix' input, by the matrix' name and the input [..., in].
OnInput = Callable[[str, np.ndarray], np.ndarray]
# What becomes of keys (part 0) and values (part 1) [rows, head, length, size], by the layer and the part.
OnCache = Callable[[int, int, np.ndarray], np.ndarray]

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


class Network:
    """A network in float64.

    Args:
        config: its architecture.
        weights: by their checkpoint names. Without `lm_head.weight` the head is the token embedding.
    """

    def __init__(self, config: GPT2Config, weights: Mapping[str, np.ndarray]) -> None:
        self._config = config
        self._weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}

    def logits(
        self,
        tokens: np.ndarray,
        on_input: OnInput = lambda name, x: x,
        on_cache: OnCache = lambda layer, part, x: x,
    ) -> np.ndarray:
        """float64 [rows, length, vocab] of tokens [rows, length].

        Args:
            tokens: int64.
            on_input: sees what a matrix multiplies, and may change it.
            on_cache: sees keys and values before attention, and may change them.
        """
        weights, function = self._weights, FUNCTIONS[self._config.activation_function]

        def linear(name: str, x: np.ndarray) -> np.ndarray:
            return on_input(name, x) @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

        x = weights["wte.weight"][tokens] + weights["wpe.weight"][: tokens.shape[1]]
        for layer in range(self._config.n_layer):
            block = f"h.{layer}"
            packed = linear(f"{block}.attn.c_attn", self._norm(f"{block}.ln_1", x))
            attended = self._attend(layer, packed, on_cache)
            x = x + linear(f"{block}.attn.c_proj", attended)
            hidden = function(linear(f"{block}.mlp.c_fc", self._norm(f"{block}.ln_2", x)))
            x = x + linear(f"{block}.mlp.c_proj", hidden)
        head = weights.get("lm_head.weight", weights["wte.weight"])
        return on_input("lm_head", self._norm("ln_f", x)) @ head.T

    def matrices(self, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The inputs [count, in] and outputs [count, out] of the blocks' matrices, for tokens [rows, length]."""
        inputs: dict[str, np.ndarray] = {}

        def keep(name: str, x: np.ndarray) -> np.ndarray:
            inputs[name] = x.reshape(-1, x.shape[-1])
            return x

        self.logits(tokens, keep)
        del inputs["lm_head"]
        return {
            name: (x, x @ self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]) for name, x in inputs.items()
        }

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + self._config.layer_norm_epsilon)
        return centred / deviation * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _attend(self, layer: int, packed: np.ndarray, on_cache: OnCache) -> np.ndarray:
        """Causal attention over queries, keys and values [rows, length, 3 * width]."""
        config, (rows, length, _) = self._config, packed.shape
        split = packed.reshape(rows, length, 3, config.n_head, -1).transpose(2, 0, 3, 1, 4)
        query, key, value = split  # each [rows, head, length, size]
        key, value = on_cache(layer, 0, key), on_cache(layer, 1, value)
        scores = query @ key.swapaxes(-1, -2)
        if config.scale_attn_weights:
            scores /= math.sqrt(config.head_size)
        if config.scale_attn_by_inverse_layer_idx:
            scores /= layer + 1
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return (shares @ value).transpose(0, 2, 1, 3).reshape(rows, length, -1)
