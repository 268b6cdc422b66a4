"""Any supported checkpoint, as named arrays that are read one at a time.

Weights are named as in transformers' GPT2LMHeadModel, without its `transformer.` prefix: `wte.weight`,
`h.0.attn.c_attn.weight`, `ln_f.bias`, `lm_head.weight`. Knows nothing of graphs.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError

from ...models.bundle import CONFIG
from ...models.config import ADAPTER_CONFIG, GPT2Config, read_json
from ...models.files import sha256_of
from ...models.shapes import weight_shapes

try:
    from .adapter import WEIGHTS as ADAPTER_WEIGHTS
    from .adapter import Adapter
    from .formats import open_weights
    from .formats.saved import check_fetched
    from .hub import find, find_here
    from .layouts import arrange
    from .vocabulary import vocabulary_files
    from .weight import Weight
except ModuleNotFoundError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "safetensors", "export") from error

# Causal masks, which GPT-2 once saved as buffers.
_BUFFER = re.compile(r"^h\.\d+\.attn\.(?:masked_)?bias$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 checkpoint.

    Attributes:
        name: the source as the user named it.
        folder: of its configuration, tokenizer and weights.
        config: its architecture.
        raw_config: its config.json, or one derived from the weights' shapes. tie_word_embeddings follows the weights.
        tied: whether the output head is the token embedding.
        adapter: what is merged into the weights as they are read.
    """

    name: str
    folder: Path
    config: GPT2Config
    raw_config: Mapping[str, Any]
    tied: bool
    adapter: Adapter | None
    _weights: Mapping[str, Weight]
    _files: tuple[Path, ...]
    _tokenizer_files: Mapping[str, str]

    @classmethod
    def open(
        cls, source: str, revision: str | None = None, n_head: int | None = None, adapter: str | None = None
    ) -> "Checkpoint":
        """Finds a source and reads its configuration and tensor names, but no weights yet.

        Args:
            source: the embedded name `tales`, a checkpoint folder, one checkpoint file, or a Hugging Face id; or an adapter of
                peft, which names its base.
            revision: branch, tag or commit of a Hugging Face id.
            n_head: number of attention heads, for a source that doesn't tell.
            adapter: an adapter of peft to merge into the source.

        Raises:
            CheckpointError: it can't be found or read, has another number of heads, or isn't a GPT-2 that can be exported.
            OptionError: a revision of what is on this machine.
            MissingExtraError: a Hugging Face id was given, and huggingface_hub isn't installed.
        """
        path, added = find(source, revision), None if adapter is None else Adapter.open(find(adapter, None))
        if path.name in ADAPTER_WEIGHTS:
            raise CheckpointError(
                f"{path} is an adapter's: name its folder {path.parent}, or its base with --adapter {path.parent}"
            )
        if added is None and (path / ADAPTER_CONFIG).is_file():
            added = Adapter.open(path)
            path = _find_base(added)
        folder = path.parent if path.is_file() else path
        check_fetched(folder / CONFIG)
        given = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
        if n_head is not None:
            told = next((given[name] for name in ("n_head", "num_attention_heads") if given and name in given), n_head)
            if told != n_head:
                raise CheckpointError(f"{folder / CONFIG} says n_head {told}, not {n_head}")
            given = (given or {}) | {"n_head": n_head}
        if given is not None and "model_type" in given:
            GPT2Config.from_dict(given)  # another architecture is refused by its model_type, not by a missing tensor
        saved = open_weights(path)
        raw_config, weights = arrange(saved, given)
        config = GPT2Config.from_dict(raw_config)
        tied = _check_and_tie(config, weights, saved.path)
        shapes = weight_shapes(config, tied=tied)
        files = tuple(sorted({part.path for weight in weights.values() for part in weight.parts} | set(saved.files)))
        unused = [name for name in weights.keys() - shapes.keys() - {"lm_head.weight"} if not _BUFFER.match(name)]
        if unused:
            some = ", ".join(sorted(unused)[:3]) + (" …" if len(unused) > 3 else "")
            _log.warning("%s: %d tensors are no part of a GPT-2 and are left out: %s", source, len(unused), some)
        if added is not None:
            weights, files = added.merge(weights, shapes), files + added.files
            vocabulary = weights["wte.weight"].parts[0].shape[0]
            raw_config = raw_config | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
            config = GPT2Config.from_dict(raw_config)
            tied = _check_and_tie(config, weights, added.path)
        if tied != config.tie_word_embeddings:
            raw_config, config = raw_config | {"tie_word_embeddings": tied}, replace(config, tie_word_embeddings=tied)
        name = source if adapter is None else f"{source} with {adapter}"
        return cls(name, folder, config, raw_config, tied, added, weights, files, saved.tokenizer_files)

    @contextmanager
    def tokenizer_folder(self) -> Iterator[Path]:
        """The folder of the tokenizer's files: the adapter's, its own, or one made of what the weights' file holds."""
        if self.adapter and vocabulary_files(self.adapter.folder):
            yield self.adapter.folder
            return
        if not self._tokenizer_files:
            yield self.folder
            return
        file = self._files[0]
        with TemporaryDirectory() as folder:
            place = Path(folder) / file.name  # so that warnings name the file
            place.mkdir()
            for name, content in self._tokenizer_files.items():
                (place / name).write_text(content, encoding="utf-8")
            try:
                yield place
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(place), str(file))) from error

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One weight in float32, in the shape of GPT2LMHeadModel; matrices are [in, out].

        Raises:
            CheckpointError: the file is damaged, or a number isn't finite.
        """
        array = self._weights[name].read()
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.name}: tensor {name} holds infinite numbers or NaN: the training failed, take an earlier checkpoint"
            )
        return array

    def sha256(self) -> str:
        """One hash over the weight files, in the order of their names, then the adapter's.

        Raises:
            CheckpointError: a file can't be read.
        """
        digest = hashlib.sha256()
        for path in self._files:
            try:
                digest.update(bytes.fromhex(sha256_of(path)))
            except OSError as error:
                raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
        return digest.hexdigest()


def _find_base(adapter: Adapter) -> Path:
    """The base that an adapter names, in the revision that it names."""
    revision = adapter.settings.get("revision")
    try:
        return find_here(adapter.base) or find(adapter.base, revision if isinstance(revision, str) else None)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.folder} is an adapter, but its base isn't found ({error}): export the base with --adapter {adapter.folder}"
        ) from error


def _check_and_tie(config: GPT2Config, weights: Mapping[str, Weight], path: Path) -> bool:
    """Checks names, shapes and types, then compares the output head with the token embedding.

    Returns:
        Whether the two are one. Like transformers 5, keeps a head that differs.

    Raises:
        CheckpointError: a weight that the configuration asks for is missing, or has another shape or type.
    """
    head = weights.get("lm_head.weight")
    for name, expected in weight_shapes(config, tied=head is None).items():
        if name not in weights:
            raise CheckpointError(f"{path}: the weights lack tensor {name} (shape {list(expected)})")
        weights[name].check(expected)
    if head is None and not config.tie_word_embeddings:
        raise CheckpointError(
            f"{path}: the weights lack tensor lm_head.weight, and config.json says tie_word_embeddings false"
        )
    return head is None or head.equals(weights["wte.weight"])
