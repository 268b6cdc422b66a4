"""GPT-2's architecture, as its config.json describes it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gpt2onnx.errors import CheckpointError

from . import limits
from .messages import shown

ADAPTER_CONFIG = "adapter_config.json"  # of an adapter that peft saved

# Names of transformers' ACT2FN. It also has prelu and xielu, which bring weights of their own.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
# transformers reads these general names too.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Networks that differ though they say "gpt2": a silent export would compute something else.
_FOREIGN = {
    "add_cross_attention": "an encoder would be needed",
    "is_encoder_decoder": "an encoder would be needed",
    "multi_query": "it is of gpt_bigcode",
    "pruned_heads": "its layers have unequal heads",
    "quantization_config": "the weights are already quantised: export the original",
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The fields of transformers' GPT2Config that change what the network computes, under its names and defaults."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"config.json: {name} must be a positive whole number, not {shown(value)}")
            most = limits.LAYERS if name == "n_layer" else limits.DIMENSION
            if value > most:
                raise CheckpointError(f"config.json: {name} {shown(value)} is more than the {most} that can be used")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"config.json: {name} must be true or false, not {shown(getattr(self, name))}")
        epsilon = self.layer_norm_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            raise CheckpointError(
                f"config.json: layer_norm_epsilon must be at least 0 and below 1, not {shown(epsilon)}"
            )
        if self.n_embd % self.n_head:
            raise CheckpointError(f"config.json: n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.activation_function not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: activation_function {shown(self.activation_function)} is not supported"
                f" (known: {', '.join(ACTIVATIONS)})"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "GPT2Config":
        """Reads the dictionary of a config.json.

        Raises:
            CheckpointError: it describes another architecture, or a value can't be used.
        """
        model_type = raw.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise CheckpointError(f"not a GPT-2: config.json says model_type {shown(model_type)}")
        raw = without_gptq(raw)
        for name, reason in _FOREIGN.items():
            if raw.get(name):
                raise CheckpointError(f"config.json: {name} is not supported ({reason})")
        known = {field.name for field in fields(cls)}
        general = {ALIASES[name]: value for name, value in raw.items() if name in ALIASES}
        return cls(**{name: value for name, value in raw.items() if name in known} | general)

    @classmethod
    def from_file(cls, path: Path) -> "GPT2Config":
        """Reads a config.json; raises CheckpointError as `from_dict` does, or where it can't be read."""
        return cls.from_dict(read_json(path))


def without_gptq(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json without GPTQ's settings, which nothing but the reader of such weights heeds."""
    match raw:
        case {"quantization_config": {"quant_method": "gptq"}, **others}:
            return others
    return raw


def read_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object where there is no file."""
    return read_json(path) if path.is_file() else {}


def read_json(path: Path, most: int = limits.JSON) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file can't be read, is larger than that, or doesn't hold a JSON object.
    """
    return json_object(read_small(path, most), path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, with the same bytes on every system."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_small(path: Path, most: int = limits.JSON) -> bytes:
    """The bytes of a small file; raises CheckpointError as `read_json` does."""
    try:
        with path.open("rb") as file:
            text = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    if len(text) > most:
        raise CheckpointError(f"{path} has more than the {most:,} bytes that are read: is it another file?")
    return text


def json_object(text: bytes, path: Path) -> dict[str, Any]:
    """The object in the bytes of a JSON file; raises CheckpointError, which names the file, where there is none."""
    try:
        content = json.loads(text.decode("utf-8"))
        if b"\\ud" in text.lower():  # half of a surrogate pair, which only an escape can write, is no text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(limits.JSON_LEVELS):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested too deep")
    return content


def _parts(whole: Any) -> Iterable[Any]:
    return whole.values() if isinstance(whole, dict) else whole
