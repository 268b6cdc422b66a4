"""Any supported checkpoint, as named arrays that are read one at a time.

Knows file formats and nothing of graphs. Weights are named as in transformers' GPT2LMHeadModel,
without its `transformer.` prefix: `wte.weight`, `h.0.attn.c_attn.weight`, `ln_f.bias`, `lm_head.weight`.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ..models import tales
from ..models.bundle import CONFIG, sha256_of
from ..models.config import GPT2Config, read_json

try:
    import ml_dtypes  # noqa: F401  # registers bfloat16, which NumPy lacks
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "safetensors", "export") from error

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# What to fetch from the hub: the weights in one format, and the small files beside them.
_HUB_PATTERNS = ["*.json", "merges.txt", "model*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 checkpoint in the Hugging Face layout.

    Attributes:
        name: the source as the user named it.
        folder: where its files are.
        config: its architecture.
        raw_config: its config.json as it stands.
    """

    name: str
    folder: Path
    config: GPT2Config
    raw_config: Mapping[str, Any]
    _shard_of: Mapping[str, tuple[Path, str]]

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> "Checkpoint":
        """Finds a source and reads its configuration and tensor names, but no weights yet.

        Args:
            source: the embedded name `tales`, a checkpoint folder, or a Hugging Face id.
            revision: branch, tag or commit of a Hugging Face id.

        Raises:
            CheckpointError: it can't be found or read, or isn't a GPT-2 that can be exported.
            MissingExtraError: a Hugging Face id was given, and huggingface_hub isn't installed.
        """
        folder = _find(source, revision)
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {CONFIG}")
        raw_config = read_json(folder / CONFIG)
        config = GPT2Config.from_dict(raw_config)
        checkpoint = cls(source, folder, config, raw_config, _tensor_locations(folder))
        checkpoint._check_shapes()
        return checkpoint

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return self.config.tie_word_embeddings or "lm_head.weight" not in self._shard_of

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One weight in float32, in the checkpoint's shape.

        Raises:
            CheckpointError: the file is damaged or the tensor holds no floating-point numbers.
        """
        path, stored_name = self._shard_of[name]
        try:
            with safe_open(path, framework="np") as file:
                tensor = file.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: can't read tensor {name}: {error}") from error
        if tensor.dtype not in (np.float32, np.float16, np.float64) and tensor.dtype.name != "bfloat16":
            raise CheckpointError(f"{path}: tensor {name} holds {tensor.dtype}, not floating-point numbers")
        return np.ascontiguousarray(tensor, dtype=np.float32)

    def sha256(self) -> str:
        """One hash over the weight files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted({path for path, _ in self._shard_of.values()}):
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()

    def _check_shapes(self) -> None:
        for name, expected in expected_shapes(self.config, tied=self.tied).items():
            if name not in self._shard_of:
                raise CheckpointError(f"{self.folder}: the weights lack tensor {name} (shape {list(expected)})")
            path, stored_name = self._shard_of[name]
            with safe_open(path, framework="np") as file:
                found = tuple(file.get_slice(stored_name).get_shape())
            if found != expected:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(found)}, config.json asks for {list(expected)}"
                )


def expected_shapes(config: GPT2Config, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that the configuration asks for; matrices are [in, out] as in Conv1D."""
    width, inner = config.n_embd, config.inner_size
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
    }
    for layer in range(config.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, width),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _find(source: str, revision: str | None) -> Path:
    if source == "tales":
        return tales.FOLDER
    folder = Path(source)
    if folder.is_dir():
        return folder
    # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source:
        raise CheckpointError(f"no checkpoint folder at {source!r}")
    return _download(source, revision)


def _download(repository: str, revision: str | None) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(
            f"Fetching {repository!r} from the Hugging Face hub", "huggingface_hub", "export"
        ) from error
    hint = f"no checkpoint {repository!r}: not a local folder, not an embedded model"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise CheckpointError(f"{hint}, and not a valid Hugging Face id") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{hint}, and the Hugging Face hub can't be reached nor is it in its cache") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise CheckpointError(f"{hint}, and the Hugging Face hub answered {status} for it") from error
    except OSError as error:
        raise CheckpointError(f"{hint}, and fetching it from the Hugging Face hub failed: {error}") from error


def _tensor_locations(folder: Path) -> dict[str, tuple[Path, str]]:
    """Which file holds which tensor, and under what name."""
    if (folder / WEIGHTS).is_file():
        shards = [folder / WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / WEIGHTS_INDEX} has no weight_map")
        shards = [folder / Path(shard).name for shard in sorted(set(weight_map.values()))]
    else:
        raise CheckpointError(f"{folder} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    locations = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="np") as file:
                for stored_name in file.keys():  # noqa: SIM118  # a method, not a dictionary's
                    locations[stored_name.removeprefix("transformer.")] = (shard, stored_name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is not a readable safetensors file: {error}") from error
    return locations
