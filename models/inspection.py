"""A network taken apart: its layers as a tree, with the shapes and numbers of their weights."""

import math
from dataclasses import dataclass, field
from typing import Any

from .config import GPT2Config
from .shapes import weight_shapes
from .tables import table

_HEAD = "lm_head"


@dataclass(repr=False)
class Layer:
    """A layer and those inside it, under the names of transformers' GPT2LMHeadModel without `transformer`.

    Attributes:
        name: within the layer around it.
        weights: shapes of its own weights, by name; matrices are [in, out] as in Conv1D.
        layers: those inside it.
        tied_to: whose weights it uses, where it has none of its own.
    """

    name: str
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: list["Layer"] = field(default_factory=list)
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers in its own weights and those of all layers inside it."""
        own = sum(math.prod(shape) for shape in self.weights.values())
        return own + sum(layer.parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        tied = {} if self.tied_to is None else {"tied_to": self.tied_to}
        return (
            {"name": self.name, "parameters": self.parameters, "weights": self.weights}
            | tied
            | {"layers": [layer.to_dict() for layer in self.layers]}
        )

    def __repr__(self) -> str:
        """A table with a line for each layer. Blocks after the first, which share its shapes, make one line."""
        return table(["layer", "weight", "bias", "parameters"], self._rows(), left=3)

    def _rows(self) -> list[list[str]]:
        rows: list[list[str]] = []

        def add(layer: Layer, depth: int) -> None:
            shapes = [" x ".join(map(str, layer.weights.get(name, ()))) for name in ("weight", "bias")]
            if layer.tied_to is not None:
                shapes[0] = layer.tied_to
            rows.append(["  " * depth + layer.name, *shapes, f"{layer.parameters:,}"])
            for inner in layer.layers:
                add(inner, depth + 1)

        blocks = [layer for layer in self.layers if layer.name.startswith("h.")]
        for layer in self.layers:
            if layer in blocks[1:]:
                continue
            add(layer, 0)
            if blocks[1:] and layer is blocks[0]:
                others = blocks[1].name if len(blocks) == 2 else f"{blocks[1].name} to {blocks[-1].name}"
                rows.append([others, "each as h.0", "", f"{sum(block.parameters for block in blocks[1:]):,}"])
        return [*rows, ["total", "", "", f"{self.parameters:,}"]]


def summary(config: GPT2Config) -> str:
    """The architecture in one line."""
    return (
        f"GPT-2, {config.n_layer} layers, {config.n_head} heads of {config.head_size}, {config.n_embd} wide,"
        f" {config.n_positions:,} positions, vocabulary of {config.vocab_size:,}, {config.activation_function}"
    )


def layers(config: GPT2Config) -> Layer:
    """The tree of a network's layers. A tied output head has no weights of its own: they are those of wte."""
    tied = config.tie_word_embeddings
    network = Layer("gpt2")
    for name, shape in weight_shapes(config, tied=tied).items():
        *path, weight = _path(name)
        layer = network
        for part in path:
            if not layer.layers or layer.layers[-1].name != part:
                layer.layers.append(Layer(part))
            layer = layer.layers[-1]
        layer.weights[weight] = shape
    if tied:
        network.layers.append(Layer(_HEAD, tied_to="wte.weight"))
    return network


def _path(name: str) -> list[str]:
    """`h.0.attn.c_attn.weight` is the weight of c_attn in attn in the block h.0."""
    first, *rest = name.split(".")
    return [f"{first}.{rest[0]}", *rest[1:]] if first == "h" else [first, *rest]
