"""Orchestrates an export: checkpoint in, bundle out, complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import MissingExtraError, OptionError, OutputError

from ..models import bundle, contract
from ..models.bundle import Bundle, Manifest
from ..models.config import GPT2Config

try:
    from .checkpoint import Checkpoint, expected_shapes
    from .graph import Precision, build
    from .weights import WeightsFile
except ImportError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "onnx", "export") from error

from .tokenizer import write_tokenizer

DTYPES = ("fp32", "fp16", "int8", "int4")
_BLOCK_SIZES = (16, 32, 64, 128, 256)
# int8 loses next to nothing in long blocks; 4-bit values need a scale for every few weights.
_DEFAULT_BLOCK_SIZE = {"int8": 128, "int4": 64}

Progress = Callable[[int, int], None]


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    pure: bool = False,
    block_size: int | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a GPT-2 checkpoint to an ONNX bundle.

    Everything is written to a temporary folder beside the target and moved into place at the end.

    Args:
        source: the embedded model `tales`, a checkpoint folder, or a Hugging Face id such as `gpt2`.
        target: the bundle's folder. It must not exist, unless `force` is given and it is a bundle.
        dtype: "fp32", "fp16", "int8" or "int4"; the last two store weights in blocks that share a scale.
        pure: with "int4", also the token embedding in 4 bits, which otherwise has 8.
        block_size: weights that share a scale, a power of two from 16 to 256; chosen by default.
        revision: branch, tag or commit of a Hugging Face id.
        force: replace an existing bundle.
        progress: called with the weights' bytes read so far and in all, counted in float32.

    Returns:
        The bundle, opened.

    Raises:
        CheckpointError: the source can't be found or read, or isn't a GPT-2 that can be exported.
        OptionError: options are out of range or contradict each other.
        OutputError: the target exists or can't be written.
        MissingExtraError: the packages of the extra `export` aren't installed.
    """
    target = Path(target)
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if pure and dtype != "int4":
        raise OptionError(f"pure goes with dtype int4, not with {dtype}")
    if block_size is not None and dtype not in _DEFAULT_BLOCK_SIZE:
        raise OptionError(f"block_size goes with dtype int8 or int4, not with {dtype}")
    if block_size is not None and block_size not in _BLOCK_SIZES:
        raise OptionError(f"block_size must be one of {', '.join(map(str, _BLOCK_SIZES))}, not {block_size}")
    _check_target(target, force=force)
    checkpoint = Checkpoint.open(os.fspath(source), revision)
    precision = _precision(checkpoint.config, dtype, pure=pure, block_size=block_size)
    with _replacing(target, force=force) as folder:
        _write_configuration(checkpoint, precision, folder)
        write_tokenizer(
            checkpoint.folder, {**checkpoint.raw_config, "vocab_size": checkpoint.config.vocab_size}, folder
        )
        _write_graph(checkpoint, precision, folder, progress)
        Manifest(
            gpt2onnx=version("gpt2onnx"),
            source=checkpoint.name,
            source_sha256=checkpoint.sha256(),
            graph="fused",
            dtype=dtype,
            block_size=precision.block_size,
            files=bundle.describe_files(folder),
        ).write(folder)
    return Bundle.open(target)


def _precision(config: GPT2Config, dtype: str, *, pure: bool, block_size: int | None) -> Precision:
    match dtype:
        case "fp32":
            return Precision("fp32")
        case "fp16":
            return Precision("fp16", floats=np.float16)
    size = block_size or _DEFAULT_BLOCK_SIZE[dtype]
    if block_size is None:
        # A block that divides the width needs no padding; gpt2-xl's 1600 is 25 times 64.
        while size > min(_BLOCK_SIZES) and config.n_embd % size:
            size //= 2
    bits = 8 if dtype == "int8" else 4
    return Precision(dtype, matrix_bits=bits, embedding_bits=bits if pure else 8, block_size=size)


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise OutputError(f"{target} exists and is not a folder: choose another target")
    if bundle.is_bundle(target):
        if not force:
            raise OutputError(f"{target} already holds a bundle: choose another target, or replace it with --force")
    elif any(target.iterdir()):
        raise OutputError(f"{target} exists and is not a bundle: choose another target")


@contextmanager
def _replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that takes the target's place if all goes well, and is removed if not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    except OSError as error:
        raise OutputError(f"can't write to {target.parent}: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        _check_target(target, force=force)
        if target.exists():
            old = folder.with_suffix(".old")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_graph(checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress | None) -> None:
    shapes = expected_shapes(checkpoint.config, tied=checkpoint.tied)
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    done = 0

    def tensor(name: str) -> npt.NDArray[np.float32]:
        nonlocal done
        array = checkpoint.tensor(name)
        done += array.nbytes
        if progress is not None:
            progress(done, total)
        return array

    (folder / bundle.GRAPH).parent.mkdir()
    with (folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(folder / bundle.WEIGHTS, file)
        model = build(checkpoint.config, tensor, tied=checkpoint.tied, precision=precision, weights=weights)
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())


def _write_configuration(checkpoint: Checkpoint, precision: Precision, folder: Path) -> None:
    config = dict(checkpoint.raw_config) | {
        "model_type": "gpt2",
        "tie_word_embeddings": checkpoint.tied,
        # transformers.js fetches external data only where it is told to.
        "transformers.js_config": {"use_external_data_format": {"model.onnx": 1}, "dtype": "fp32"},
    }
    if precision.floats is np.float16:
        config["transformers.js_config"]["kv_cache_dtype"] = "float16"
    _write_json(folder / bundle.CONFIG, config)
    generation = _generation_config(checkpoint)
    _write_json(folder / bundle.GENERATION_CONFIG, generation)
    _write_json(folder / bundle.GENAI_CONFIG, _genai_config(checkpoint.config, generation))


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own, or else what transformers derives from config.json."""
    path = checkpoint.folder / bundle.GENERATION_CONFIG
    if path.is_file():
        return bundle.read_json(path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    # GPT2Config's own defaults, which hold where config.json doesn't say.
    ids = {"bos_token_id": 50256, "eos_token_id": 50256} | {
        name: checkpoint.raw_config[name] for name in names if name in checkpoint.raw_config
    }
    return {name: value for name, value in ids.items() if value is not None}


def _genai_config(config: GPT2Config, generation: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai reads; see https://onnxruntime.ai/docs/genai/reference/config.html."""
    end = generation.get("eos_token_id", config.vocab_size - 1)
    first_end = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": generation.get("bos_token_id", first_end),
            "eos_token_id": end,
            "pad_token_id": generation.get("pad_token_id", first_end),
            "context_length": config.n_positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": bundle.GRAPH,
                "head_size": config.head_size,
                "hidden_size": config.n_embd,
                "num_attention_heads": config.n_head,
                "num_key_value_heads": config.n_head,
                "num_hidden_layers": config.n_layer,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": contract.INPUT_IDS,
                    "attention_mask": contract.ATTENTION_MASK,
                    "position_ids": contract.POSITION_IDS,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": contract.LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": config.n_positions, "past_present_share_buffer": True},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
