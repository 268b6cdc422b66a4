"""Whose naming and shapes a checkpoint's weights have, and how they become those of GPT2LMHeadModel.

Three are known: Hugging Face's own; the class GPTModel of Sebastian Raschka's book "Build a Large Language
Model (From Scratch)"; and nanoGPT's ckpt.pt. The latter two keep torch.nn.Linear's matrices [out, in], which
GPT2LMHeadModel wants as [in, out], and bring no config.json, so the architecture is read off the weights.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from .arrays import FLOATS, ConstantArray, StoredArray

# Wrappers leave something before every name: torch.compile `_orig_mod.`, DistributedDataParallel `module.`, others the
# attribute that they keep the network in. GPT2LMHeadModel does so, too, but not before its head.
_TRANSFORMER = "transformer."
_WRAPPERS = re.compile(rf"^(.*?)(?:{re.escape(_TRANSFORMER)})?(?:wte|tok_emb)\.weight$")
_BLOCK = re.compile(r"^trf_blocks\.(\d{1,4})\.")
_NANO_BLOCK = re.compile(r"^h\.(\d{1,4})\.")

# GPT-2's four sizes; all have heads of 64.
_HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 20, 1600: 25}
_GPT2_VOCABULARY, _GPT2_END = 50257, 50256
# Other names that a configuration may use: the book's, nanoGPT's, and transformers' general ones.
_OTHER_NAMES = {
    "context_length": "n_positions",
    "block_size": "n_positions",
    "emb_dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_POSITIONS = {"n_positions", "max_position_embeddings"}


@dataclass(frozen=True)
class Weight:
    """One weight of GPT2LMHeadModel and the stored arrays that it is made of.

    Attributes:
        parts: joined along the last axis, that of a matrix's outputs.
        transposed: whether they are stored [out, in].
    """

    parts: tuple[StoredArray, ...]
    transposed: bool = False

    def check(self, expected: tuple[int, ...]) -> None:
        """Compares the shape of every part with what it has to be for the weight to have this shape.

        Raises:
            CheckpointError: a shape differs, or the numbers aren't floating-point.
        """
        wanted = (*expected[:-1], expected[-1] // len(self.parts))
        for part in self.parts:
            if part.shape != (wanted[::-1] if self.transposed else wanted):
                raise CheckpointError(
                    f"{part.path}: tensor {part.name} has shape {list(part.shape)},"
                    f" the configuration asks for {list(wanted[::-1] if self.transposed else wanted)}"
                )
            if part.dtype not in FLOATS:
                raise CheckpointError(
                    f"{part.path}: tensor {part.name} holds {part.dtype}, not floating-point numbers:"
                    " export the checkpoint that it was quantised or converted from"
                )

    def read(self) -> npt.NDArray[np.float32]:
        """The weight in float32."""
        arrays = [part.read().T if self.transposed else part.read() for part in self.parts]
        if len(arrays) == 1:
            return np.ascontiguousarray(arrays[0], dtype=np.float32)
        return np.concatenate(arrays, axis=-1, dtype=np.float32)

    def equals(self, other: "Weight") -> bool:
        """Whether both hold the same numbers; they are read only where that isn't known from their places."""
        if [part.shape for part in self.parts] != [part.shape for part in other.parts]:
            return False
        pairs = list(zip(self.parts, other.parts, strict=True))
        return all(mine.same_bytes(its) or np.array_equal(mine.read(), its.read()) for mine, its in pairs)


def arrange(
    arrays: Mapping[str, StoredArray], settings: Mapping[str, Any], config: Mapping[str, Any] | None, path: Path
) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Recognises a layout.

    Args:
        arrays: every array of the checkpoint by its name there.
        settings: whatever else was saved beside the weights.
        config: the content of config.json; None where there is none.
        path: what errors name.

    Returns:
        A config.json for the checkpoint, and its weights by their names in GPT2LMHeadModel.

    Raises:
        CheckpointError: the layout isn't known, or the architecture can't be.
    """
    wrappers = next((match[1] for name in arrays if (match := _WRAPPERS.match(name))), "")
    named = {name.removeprefix(wrappers).removeprefix(_TRANSFORMER): array for name, array in arrays.items()}
    if "tok_emb.weight" in named:
        return _Book(named, path).arrange(settings, config)
    if "wte.weight" not in named:
        some = ", ".join(sorted(arrays)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} holds no GPT-2 that is known here (its tensors: {some} …): it has neither wte.weight,"
            " as Hugging Face's and nanoGPT's have, nor tok_emb.weight, as GPTModel has"
        )
    first = named.get("h.0.attn.c_attn.weight")
    if first is not None and len(first.shape) == 2 and first.shape[0] > first.shape[1]:
        return _arrange_nanogpt(named, settings, config, path)
    if config is None:
        raise CheckpointError(f"{path} has no config.json beside it: put the checkpoint's own there")
    # The first GPT-2s' config.json called it n_ctx; later ones have both.
    older = {"n_positions": config["n_ctx"]} if "n_ctx" in config and not config.keys() & _POSITIONS else {}
    return dict(config) | older, {name: Weight((array,)) for name, array in named.items()}


def _arrange_nanogpt(
    named: Mapping[str, StoredArray], settings: Mapping[str, Any], config: Mapping[str, Any] | None, path: Path
) -> tuple[dict[str, Any], dict[str, Weight]]:
    """nanoGPT's GPT, and that of build-nanogpt, which differs in its activation and in how it is saved.

    https://github.com/karpathy/nanoGPT/blob/master/model.py
    https://github.com/karpathy/build-nanogpt/blob/master/train_gpt2.py
    """
    saved = {name: settings[name] for name in ("model_args", "config") if isinstance(settings.get(name), dict)}
    arguments: dict[str, Any] = next((each for each in saved.values() if "n_head" in each), {})
    width = _width(named, "wte.weight", path)
    layers = _count(named, _NANO_BLOCK)
    architecture = {
        "vocab_size": named["wte.weight"].shape[0],
        "n_positions": _rows(named, "wpe.weight", path),
        "n_embd": width,
        "n_layer": layers,
        # nanoGPT's is the exact one; a config.json beside the file can say otherwise.
        "activation_function": "gelu_pytorch_tanh" if arguments and "model_args" not in saved else "gelu",
    }
    known = {"n_head": arguments["n_head"]} if "n_head" in arguments else {}
    full = _configuration(architecture, known, config, path)
    weights = {
        name: Weight((array,), transposed=name.startswith("h.") and len(array.shape) == 2)
        for name, array in named.items()
    }
    if "ln_f.bias" not in named:  # built with bias=False: no bias anywhere
        bias_widths = {
            "ln_1": width, "attn.c_attn": 3 * width, "attn.c_proj": width,
            "ln_2": width, "mlp.c_fc": 4 * width, "mlp.c_proj": width,
        }  # fmt: skip
        absent = {f"h.{layer}.{name}.bias": size for layer in range(layers) for name, size in bias_widths.items()}
        for name, size in (absent | {"ln_f.bias": width}).items():
            weights.setdefault(name, Weight((ConstantArray(path, name, (size,), 0.0),)))
    return full, weights


class _Book:
    """GPTModel: https://github.com/rasbt/LLMs-from-scratch/blob/main/ch04/01_main-chapter-code/gpt.py."""

    _NAMES: Mapping[str, str] = {
        "norm1.scale": "ln_1.weight",
        "norm1.shift": "ln_1.bias",
        "att.out_proj.weight": "attn.c_proj.weight",
        "att.out_proj.bias": "attn.c_proj.bias",
        "norm2.scale": "ln_2.weight",
        "norm2.shift": "ln_2.bias",
        "ff.layers.0.weight": "mlp.c_fc.weight",
        "ff.layers.0.bias": "mlp.c_fc.bias",
        "ff.layers.2.weight": "mlp.c_proj.weight",
        "ff.layers.2.bias": "mlp.c_proj.bias",
    }
    _QKV = ("att.W_query", "att.W_key", "att.W_value")

    def __init__(self, named: Mapping[str, StoredArray], path: Path) -> None:
        self._named, self._path = named, path

    def arrange(
        self, settings: Mapping[str, Any], config: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Weight]]:
        width, layers = _width(self._named, "tok_emb.weight", self._path), _count(self._named, _BLOCK)
        inner = _rows(self._named, "trf_blocks.0.ff.layers.0.weight", self._path)
        architecture = {
            "vocab_size": self._named["tok_emb.weight"].shape[0],
            "n_positions": _rows(self._named, "pos_emb.weight", self._path),
            "n_embd": width,
            "n_layer": layers,
            "n_inner": None if inner == 4 * width else inner,
            "activation_function": "gelu_new",
        }
        known: dict[str, Any] = {}
        for saved in settings.values():
            if isinstance(saved, dict) and "n_heads" in saved:
                known = {"n_head": saved["n_heads"]}
        if "out_head.bias" in self._named:
            raise CheckpointError(f"{self._path}: out_head has a bias, which GPT-2's output head can't have")
        return _configuration(architecture, known, config, self._path), self._weights(layers, width)

    def _weights(self, layers: int, width: int) -> dict[str, Weight]:
        weights = {
            "wte.weight": Weight((self._need("tok_emb.weight"),)),
            "wpe.weight": Weight((self._need("pos_emb.weight"),)),
            "ln_f.weight": Weight((self._need("final_norm.scale"),)),
            "ln_f.bias": Weight((self._need("final_norm.shift"),)),
            "lm_head.weight": Weight((self._need("out_head.weight"),)),
        }
        for layer in range(layers):
            block = f"trf_blocks.{layer}."
            for theirs, ours in self._NAMES.items():
                array = self._need(block + theirs)
                weights[f"h.{layer}.{ours}"] = Weight((array,), transposed=len(array.shape) == 2)
            queries_keys_values = tuple(self._need(f"{block}{name}.weight") for name in self._QKV)
            weights[f"h.{layer}.attn.c_attn.weight"] = Weight(queries_keys_values, transposed=True)
            if f"{block}att.W_query.bias" in self._named:
                biases = tuple(self._need(f"{block}{name}.bias") for name in self._QKV)
            else:  # built with qkv_bias=False
                name = f"h.{layer}.attn.c_attn.bias"
                biases = (ConstantArray(self._path, name, (3 * width,), 0.0),)
            weights[f"h.{layer}.attn.c_attn.bias"] = Weight(biases)
        return weights

    def _need(self, name: str) -> StoredArray:
        return _need(self._named, name, self._path)


def _configuration(
    architecture: Mapping[str, Any], known: Mapping[str, Any], given: Mapping[str, Any] | None, path: Path
) -> dict[str, Any]:
    """A config.json from what the weights show, what was saved beside them, and what the user put beside the file."""
    width, vocabulary = architecture["n_embd"], architecture["vocab_size"]
    end = _GPT2_END if vocabulary >= _GPT2_VOCABULARY else None
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end,
        "eos_token_id": end,
        **architecture,
        **({"n_head": _HEADS_OF_WIDTH[width]} if width in _HEADS_OF_WIDTH else {}),
        **known,
        **{_OTHER_NAMES.get(name, name): value for name, value in (given or {}).items()},
    }
    if "n_head" not in config:
        raise CheckpointError(
            f"{path}: the number of attention heads can't be read off the weights (width {width}):"
            ' put a config.json with {"n_head": …} beside it'
        )
    return config


def _need(named: Mapping[str, StoredArray], name: str, path: Path) -> StoredArray:
    if name not in named:
        raise CheckpointError(f"{path}: the weights lack tensor {name}")
    return named[name]


def _width(named: Mapping[str, StoredArray], embedding: str, path: Path) -> int:
    return _matrix(named, embedding, path)[1]


def _rows(named: Mapping[str, StoredArray], name: str, path: Path) -> int:
    return _matrix(named, name, path)[0]


def _matrix(named: Mapping[str, StoredArray], name: str, path: Path) -> tuple[int, int]:
    shape = _need(named, name, path).shape
    if len(shape) != 2:
        raise CheckpointError(f"{path}: tensor {name} has shape {list(shape)}, but should be a matrix")
    return shape[0], shape[1]


def _count(names: Iterable[str], block: re.Pattern[str]) -> int:
    """Number of blocks: one more than the highest number that a name carries."""
    return 1 + max((int(match[1]) for name in names if (match := block.match(name))), default=-1)
