"""Adapters that peft trained, merged into a checkpoint's weights one by one as these are read.

The weights become those of `PeftModel.from_pretrained(base, folder).merge_and_unload()`, in float32:
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py (LoRA)
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/dora.py (DoRA)
https://github.com/huggingface/peft/blob/main/src/peft/tuners/ia3/layer.py (IA3)
https://github.com/huggingface/peft/blob/main/src/peft/tuners/trainable_tokens/layer.py (single tokens)
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from ...models.config import ADAPTER_CONFIG, read_json
from ...models.messages import one_line, shown
from .arrays import FLOATS, StoredArray
from .formats import open_weights
from .weight import Weight

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KINDS = ("LORA", "IA3")
_HEAD, _EMBEDDING = "lm_head", "wte"
_WEIGHT_OR_BIAS = ("weight", "bias")
_PREFIXES = ("base_model.model.", "transformer.")
# Ends of tensors' names; the first that fits. `base` replaces a weight before the changes, `saved` the module after them.
_PARTS = {
    "lora_A.weight": "A",
    "lora_embedding_A": "A",
    "lora_B.weight": "B",
    "lora_embedding_B": "B",
    "lora_B.bias": "B.bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "ia3",
    "token_adapter.trainable_tokens_delta": "tokens",
    **{
        f"{place}.{kind}": f"{part}.{kind}"
        for (place, part), kind in product(
            (
                ("token_adapter.base_layer", "base"),
                ("base_layer", "base"),
                ("original_module", "base"),
                ("modules_to_save", "saved"),
            ),
            _WEIGHT_OR_BIAS,
        )
    },
    "weight": "weight",
    "bias": "bias",
}
# Options with which LoRA is no sum of the base's matrix and a product of two.
_OTHER_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "target_parameters",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Beginnings of init_lora_weights that change the base, too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_ALPHA = 1e30
# Matching a pattern takes long only with many repetitions, or one inside another. No adapter has more than a pattern a module.
_MOST_PATTERNS, _MOST_REPETITIONS = 1_000, 4
_REPETITION, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)\s*[*+{]")

Array = npt.NDArray[np.float32]
Change = Callable[[Array], Array]


@dataclass(frozen=True)
class MergedArray:
    """A weight of GPT2LMHeadModel as an adapter changes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    base: Weight
    change: Change
    dtype: str = "float32"

    def read(self) -> npt.NDArray[np.generic]:
        with np.errstate(all="ignore"):  # the checkpoint reports infinite numbers
            return self.change(self.base.read())


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft.

    Attributes:
        folder: where it lies.
        settings: its adapter_config.json.
        path: the file of its tensors.
        modules: its tensors by the module's name in GPT2LMHeadModel, then by their part there.
        alphas: lora_alpha of the modules whose name fits a pattern, the first that does.
    """

    folder: Path
    settings: Mapping[str, Any]
    path: Path
    modules: Mapping[str, Mapping[str, StoredArray]]
    alphas: tuple[tuple[re.Pattern[str], Any], ...]

    @classmethod
    def open(cls, source: Path) -> "Adapter":
        """Reads the configuration and the tensors' names.

        Raises:
            CheckpointError: there is none, it can't be read, or it is of a kind that can't be merged.
        """
        folder = source.parent if source.is_file() else source
        if not (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no {ADAPTER_CONFIG}: name the folder that peft's save_pretrained wrote"
            )
        settings = read_json(folder / ADAPTER_CONFIG)
        _check_kind(settings, folder)
        path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if path is None:
            raise CheckpointError(
                f"{folder} has {ADAPTER_CONFIG}, but no {' or '.join(WEIGHTS)}: save the adapter again"
            )
        wholly = settings.get("modules_to_save") or ()
        saved = tuple(name for name in wholly if isinstance(name, str)) if isinstance(wholly, list | tuple) else ()
        modules: dict[str, dict[str, StoredArray]] = {}
        for name, array in open_weights(path).arrays.items():
            end = next((end for end in _PARTS if name.endswith(f".{end}")), None)
            if end is None:
                raise CheckpointError(f"{path}: tensor {shown(name)} is no part of a LoRA or IA3 adapter")
            if array.dtype not in FLOATS:
                raise CheckpointError(f"{path}: tensor {name} holds {array.dtype}, not floating-point numbers")
            module, part = name.removesuffix(f".{end}"), _PARTS[end]
            if part == end:
                part = f"saved.{end}" if module.endswith(saved) else f"base.{end}"
            for prefix in _PREFIXES:
                module = module.removeprefix(prefix)
            modules.setdefault(module, {})[part] = array
        return cls(folder, settings, path, modules, _alphas(settings.get("alpha_pattern"), folder))

    @property
    def base(self) -> str:
        """The model that it was trained on: a path, or a Hugging Face id.

        Raises:
            CheckpointError: the configuration doesn't say.
        """
        name = self.settings.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{ADAPTER_CONFIG} names none")
        return name

    @property
    def files(self) -> tuple[Path, Path]:
        """What the changes depend on."""
        return self.folder / ADAPTER_CONFIG, self.path

    def merge(self, weights: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
        """The weights with the adapter's changes; reads no numbers.

        A head that is tied to the embedding is the same parameter: what is merged into one is merged into both. A module that was
        saved as a whole is one of its own.

        Args:
            weights: of the base, by their names.
            shapes: of the weights that the base has; its head is tied if lm_head.weight isn't among them.

        Raises:
            CheckpointError: the adapter was trained on another architecture, or its settings don't fit its tensors.
        """
        merged, shapes, own = {name: weights[name] for name in shapes}, dict(shapes), dict[str, Weight]()
        tied = f"{_HEAD}.weight" not in shapes
        modules = sorted(self.modules, key=lambda name: name == _HEAD)  # the embedding's changes come first
        places = {module: _EMBEDDING if tied and module == _HEAD else module for module in modules}
        for module, kind in product(modules, _WEIGHT_OR_BIAS):
            name, parts = f"{places[module]}.{kind}", self.modules[module]
            given = {part: parts[part] for part in (f"base.{kind}", f"saved.{kind}") if part in parts}
            if name not in shapes and (given or kind == "weight" or "B.bias" in parts):
                raise CheckpointError(
                    f"{self.path}: this model has no {name}, the adapter's base has: {self._origin()}"
                )
            for part, array in given.items():
                if len(array.shape) != len(shapes[name]):
                    raise self._misfit(array, shapes[name])
                if part == f"saved.{kind}":
                    own[f"{module}.{kind}"] = Weight((array,))
                else:
                    merged[name], shapes[name] = Weight((array,)), array.shape
        for module, kind in product(modules, _WEIGHT_OR_BIAS):
            if (name := f"{places[module]}.{kind}") in shapes:
                for change in self._changes(module, kind, shapes[name]):
                    merged[name] = Weight((MergedArray(self.path, name, shapes[name], merged[name], change),))
        if tied and own.keys() & {f"{_EMBEDDING}.weight", f"{_HEAD}.weight"}:
            merged[f"{_HEAD}.weight"] = merged[f"{_EMBEDDING}.weight"]
        return merged | own

    def _changes(self, module: str, kind: str, shape: tuple[int, ...]) -> list[Change]:
        """Changes of one weight of this shape, in their order."""
        parts, changes = self.modules[module], list[Change]()
        inputs, outputs = shape if kind == "weight" and len(shape) == 2 else (0, shape[0])
        rank = parts["A"].shape[0] if "A" in parts and parts["A"].shape else 0
        if head := module == _HEAD:  # a torch.nn.Linear; Conv1D and embeddings have [in, out]
            inputs, outputs = outputs, inputs
        if kind == "weight" and parts.keys() & {"A", "B", "B.bias"}:
            first, second = self._need(module, "A", (rank, inputs)), self._need(module, "B", (outputs, rank))
            magnitude = None
            if self.settings.get("use_dora"):
                magnitude = self._need(module, "magnitude", (outputs,))
            changes.append(partial(_with_lora, first, second, self._scale(module, rank), magnitude, head=head))
        if kind == "bias" and "B.bias" in parts:
            changes.append(partial(_with_bias, self._need(module, "B.bias", shape), self._scale(module, rank)))
        if "ia3" in parts:
            inwards = parts["ia3"].shape[:1] == (1,) != (outputs,)
            if kind == "weight" or not inwards:
                vector = self._need(module, "ia3", (1, inputs) if inwards else (outputs, 1))
                changes.append(partial(_times, vector, flat=kind == "bias", head=head))
        if kind == "weight" and "tokens" in parts:
            rows = self._tokens(module, shape[0])
            changes.append(partial(_with_rows, self._need(module, "tokens", (len(rows), *shape[1:])), rows))
        return changes

    def _need(self, module: str, part: str, shape: tuple[int, ...]) -> StoredArray:
        """A tensor of this shape."""
        array = self.modules[module].get(part)
        if array is None:
            raise CheckpointError(f"{self.path} lacks {part} of {module}: save the adapter again")
        if array.shape != shape or 0 in shape:
            raise self._misfit(array, shape)
        return array

    def _misfit(self, array: StoredArray, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor {array.name} has shape {list(array.shape)}, not {list(shape)}: {self._origin()}"
        )

    def _origin(self) -> str:
        said = (shown(self.settings.get(name)) for name in ("base_model_name_or_path", "task_type"))
        return "it was trained on {}, for {}".format(*said)

    def _scale(self, module: str, rank: int) -> float:
        """The factor of a module's LoRA: lora_alpha / rank, or with rsLoRA by the rank's root."""
        name = module if module == _HEAD else f"transformer.{module}"
        alpha = next(
            (value for pattern, value in self.alphas if pattern.match(name)), self.settings.get("lora_alpha", 8)
        )
        if (number := as_alpha(alpha)) is None:
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: lora_alpha is {shown(alpha)}, not a number")
        return number / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _tokens(self, module: str, count: int) -> list[int]:
        """Rows of an embedding that were trained alone."""
        rows = self.settings.get("trainable_token_indices")
        if isinstance(rows, dict):
            # A tied head has the embedding's.
            names = [f"transformer.{module}", *([f"transformer.{_EMBEDDING}"] if module == _HEAD else [])]
            rows = next((rows[key] for name in names for key in rows if name.endswith(key)), None)
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < count for row in rows):
            raise CheckpointError(
                f"{self.folder / ADAPTER_CONFIG}: trainable_token_indices are {shown(rows)}, not tokens of {module}"
            )
        return rows


def as_alpha(value: object) -> float | None:
    """LoRA's alpha; None for what is no number, or far too large a one."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST_ALPHA
    return float(value) if usable else None  # type: ignore[arg-type]


def _check_kind(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{folder} is an adapter of type {shown(kind)}, but only {' and '.join(_KINDS)} are merged at export: if it has"
            " merge_and_unload in peft, save what that gives"
        )
    if others := [name for name in _OTHER_LORA if settings.get(name)]:
        raise CheckpointError(f"{folder} is a LoRA with {others[0]}, which can't be merged at export")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{folder} began as {shown(start)}, which changed the base's weights, too: save it by peft's"
            " save_pretrained(path_initial_model_for_weight_conversion=…), or save what merge_and_unload gives"
        )


def _alphas(patterns: object, folder: Path) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """The pairs of alpha_pattern; as in peft a pattern has to fit the end of a module's name, from a dot on."""
    if not patterns:
        return ()
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: can't use alpha_pattern {shown(patterns)}")
    compiled = []
    for pattern, alpha in patterns.items():
        try:
            if len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS or _REPEATED_GROUP.search(pattern):
                raise ValueError("it repeats too much")
            with warnings.catch_warnings(action="ignore"):
                compiled.append((re.compile(rf"(.*\.)?({pattern})$"), alpha))
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: can't use the pattern {shown(pattern)}: {one_line(error)}"
            ) from error
    return tuple(compiled)


def _read(array: StoredArray) -> Array:
    return np.asarray(array.read(), np.float32)


def _with_lora(
    first: StoredArray, second: StoredArray, scale: float, magnitude: StoredArray | None, weight: Array, *, head: bool
) -> Array:
    """LoRA: weight + scale * B @ A. DoRA then gives each output the length that was trained."""
    product = _read(second) @ _read(first)  # [out, in]
    product *= np.float32(scale)
    weight = weight + (product if head else product.T)
    if magnitude is None:
        return weight
    lengths = np.sqrt(np.einsum("oi,oi->o" if head else "io,io->o", weight, weight, dtype=np.float64))
    factors = (_read(magnitude) / lengths).astype(np.float32)
    weight *= factors[:, None] if head else factors
    return weight


def _with_bias(array: StoredArray, scale: float, bias: Array) -> Array:
    return bias + np.float32(scale) * _read(array)


def _times(array: StoredArray, weight: Array, *, flat: bool, head: bool) -> Array:
    """IA3: a factor for each output, [out, 1], or for each input, [1, in]."""
    factors = _read(array)
    return weight * (factors.ravel() if flat else factors if head else factors.T)


def _with_rows(array: StoredArray, rows: list[int], weight: Array) -> Array:
    weight = weight.copy()
    weight[rows] = _read(array)
    return weight
