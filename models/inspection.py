"""A network taken apart: its layers as a tree, with the shapes and numbers of their weights."""

import math
from dataclasses import dataclass, field
from typing import Any

from .config import GPT2Config
from .shapes import weight_shapes

_HEAD = "lm_head"


@dataclass
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
