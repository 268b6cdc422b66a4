"""Orchestrates an export: checkpoint in, bundle out, complete or not at all."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError, OptionError, OutputError

from ..models import bundle, contract
from ..models.bundle import Bundle, Manifest
from ..models.config import GPT2Config, read_json
from ..models.shapes import weight_shapes

try:
    from .checkpoint import Checkpoint
    from .graph import build
    from .operators import Precision
    from .weights import WeightsFile
except ImportError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "onnx", "export") from error

from .atomic import replacing
from .tokenizer import write_tokenizer

DTYPES = ("fp32", "fp16", "int8", "int4")
_BLOCK_SIZES = (16, 32, 64, 128, 256)
GRAPHS = ("fused", "portable")
# 8 bits lose next to nothing in long blocks; 4-bit values need a scale for every few weights, most of
# all in the blocks' matrices. The embedding, a third of a small model, is not worth that in `pure` either.
_BLOCK_SIZE = {8: 128, 4: 32}
_EMBEDDING_BLOCK_SIZE = 128
# Above this many weights, checks take much longer than the export, so they have to be asked for.
_CHECKED_WEIGHTS = 200_000_000

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str = "fp32",
    pure: bool = False,
    graph: str = "fused",
    block_size: int | None = None,
    quality: bool | None = None,
    parity: bool | None = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a GPT-2 checkpoint to an ONNX bundle.

    Everything is written to a temporary folder beside the target and moved into place at the end.

    Args:
        source: the embedded model `tales`, a checkpoint folder or file, or a Hugging Face id such as `gpt2`.
        target: the bundle's folder. It must not exist, unless `force` is given and it is a bundle.
        dtype: "fp32", "fp16", "int8" or "int4"; the last two store weights in blocks that share a scale.
        pure: with "int4", also the token embedding in 4 bits, which otherwise has 8.
        graph: "fused", ONNX Runtime's own operators, updating the cache in place; or "portable",
            optimum's graph of standard operators for execution providers without those, fp32 only.
        block_size: weights that share a scale, a power of two from 16 to 256; chosen by default.
        quality: with "int8" or "int4", compare the predictions with those of fp32 and put the figures
            into the manifest; by default for models of up to 200 million weights, where it takes seconds.
        parity: compare the bundle with PyTorch and put the report into the manifest, whether it passed or
            not; None for models of up to 200 million weights where torch and transformers are installed.
        revision: branch, tag or commit of a Hugging Face id.
        force: replace an existing bundle.
        progress: called with the weights' bytes read so far and in all, counted in float32.

    Returns:
        The bundle, opened.

    Raises:
        CheckpointError: the source can't be found or read, or isn't a GPT-2 that can be exported.
        OptionError: options are out of range or contradict each other.
        OutputError: the target exists or can't be written.
        MissingExtraError: the packages of the extra `export` aren't installed, or those that `parity` needs.
    """
    target = Path(target)
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if pure and dtype != "int4":
        raise OptionError(f"pure goes with dtype int4, not with {dtype}")
    if graph not in GRAPHS:
        raise OptionError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
    if graph == "portable" and dtype != "fp32":
        raise OptionError(f"graph portable goes with dtype fp32, not with {dtype}")
    if quality and dtype not in ("int8", "int4"):
        raise OptionError(f"quality goes with dtype int8 or int4, not with {dtype}")
    if block_size is not None and dtype not in ("int8", "int4"):
        raise OptionError(f"block_size goes with dtype int8 or int4, not with {dtype}")
    if block_size is not None and block_size not in _BLOCK_SIZES:
        raise OptionError(f"block_size must be one of {', '.join(map(str, _BLOCK_SIZES))}, not {block_size}")
    _check_target(target, force=force)
    checkpoint = Checkpoint.open(os.fspath(source), revision)
    precision = _precision(checkpoint.config, dtype, pure=pure, block_size=block_size)
    with replacing(target, lambda: _check_target(target, force=force)) as folder:
        _write_configuration(checkpoint, precision, folder)
        write_tokenizer(
            checkpoint.folder, {**checkpoint.raw_config, "vocab_size": checkpoint.config.vocab_size}, folder
        )
        (folder / bundle.GRAPH).parent.mkdir()
        if graph == "portable":
            from .portable import write_portable_graph

            write_portable_graph(checkpoint, folder)
        else:
            _write_graph(checkpoint, precision, folder, progress)
        manifest = Manifest(
            gpt2onnx=version("gpt2onnx"),
            source=checkpoint.name,
            source_sha256=checkpoint.sha256(),
            graph=graph,
            dtype=dtype,
            block_size=precision.block_size,
            files=bundle.describe_files(folder),
        )
        small = _weights_in(checkpoint) <= _CHECKED_WEIGHTS
        if quality or (quality is None and small and dtype in ("int8", "int4")):
            with _unless_missing(quality):
                manifest = replace(manifest, quality=_quality(checkpoint, manifest, folder))
        manifest.write(folder)
        if parity or (parity is None and small):
            with _unless_missing(parity):
                replace(manifest, parity=_parity(checkpoint, folder)).write(folder)
    return Bundle.open(target)


def _quality(checkpoint: Checkpoint, manifest: Manifest, folder: Path) -> dict[str, Any]:
    """The bundle's figures against the same weights in fp32, which are written for this and removed."""
    from .quality import on_own_samples

    reference = folder / "fp32"
    try:
        (reference / bundle.GRAPH).parent.mkdir(parents=True)
        _write_graph(checkpoint, Precision("fp32"), reference, None)
        figures = on_own_samples(
            Bundle(folder, manifest, checkpoint.config),
            Bundle(reference, replace(manifest, dtype="fp32"), checkpoint.config),
        )
    finally:
        shutil.rmtree(reference, ignore_errors=True)
    return asdict(figures)


def _precision(config: GPT2Config, dtype: str, *, pure: bool, block_size: int | None) -> Precision:
    match dtype:
        case "fp32":
            return Precision("fp32")
        case "fp16":
            return Precision("fp16", floats=np.float16)
    bits = 8 if dtype == "int8" else 4
    return Precision(
        dtype,
        matrix_bits=bits,
        embedding_bits=bits if pure else 8,
        block_size=block_size or _dividing(_BLOCK_SIZE[bits], config.n_embd),
        embedding_block_size=block_size or _dividing(_EMBEDDING_BLOCK_SIZE, config.n_embd),
    )


def _dividing(size: int, width: int) -> int:
    """A block size that divides the width needs no padding; gpt2-xl's 1600 is 25 times 64."""
    while size > min(_BLOCK_SIZES) and width % size:
        size //= 2
    return size


def _check_target(target: Path, *, force: bool) -> None:
    if not os.path.lexists(target):  # pathlib raises where a name is too long
        return
    if not target.is_dir():
        raise OutputError(f"{target} exists and is not a folder: choose another target")
    if bundle.is_bundle(target):
        if not force:
            raise OutputError(f"{target} already holds a bundle: choose another target, or replace it with --force")
    elif any(target.iterdir()):
        raise OutputError(f"{target} exists and is not a bundle: choose another target")


def _write_graph(checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress | None) -> None:
    total = 4 * _weights_in(checkpoint)
    done = 0

    def tensor(name: str) -> npt.NDArray[np.float32]:
        nonlocal done
        array = checkpoint.tensor(name)
        done += array.nbytes
        if progress is not None:
            progress(done, total)
        return array

    with (folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(folder / bundle.WEIGHTS, file)
        model = build(checkpoint.config, tensor, tied=checkpoint.tied, precision=precision, weights=weights)
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())


@contextmanager
def _unless_missing(wanted: bool | None) -> Iterator[None]:
    """Leaves a check out where its packages aren't installed or can't load the checkpoint, unless it was asked for."""
    try:
        yield
    except (CheckpointError, MissingExtraError) as error:
        if wanted:
            raise
        _log.info("a check was left out: %s", error)


def _parity(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    from .parity import check

    return check(folder, checkpoint)


def _weights_in(checkpoint: Checkpoint) -> int:
    shapes = weight_shapes(checkpoint.config, tied=checkpoint.tied)
    return sum(math.prod(shape) for shape in shapes.values())


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
        return read_json(path)
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
