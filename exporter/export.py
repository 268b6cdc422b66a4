"""Orchestrates an export: checkpoint in, bundle out, complete or not at all."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError, MissingExtraError, OptionError

from ..models import bundle, contract
from ..models.bundle import Bundle, Manifest
from ..models.config import GPT2Config, read_json
from ..models.precision import BLOCK_SIZES, DTYPES, blocks, default_block_size
from ..models.shapes import weight_shapes
from ..runtime.options import BY_NAME, GenerationConfig

try:
    from .checkpoint.checkpoint import Checkpoint
    from .graph import ragged, screening, wide
    from .graph.fused import build
    from .graph.operators import Precision
    from .graph.weights import WeightsFile
    from .quantize.inputs import centre
    from .quantize.smoothing import smooth
except ImportError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "onnx", "export") from error

from .files.atomic import replacing
from .files.target import check_target
from .tokenizer.convert import write_tokenizer

if TYPE_CHECKING:
    from onnx import ModelProto

    from .quantize.calibrate import Calibration

_QUANTIZED = ("int8", "int4")
# Half as many would not raise the divergence of int8. That of int4 falls by a tenth with twice as many, for which
# large networks would take too long; in `pure` more texts lower the divergence, but raise the perplexity.
_CALIBRATION_TEXTS = {"int8": 16, "int4": 32}
_MORE_TEXTS, _MANY_WEIGHTS = 64, 50_000_000
# Narrower networks have no second graph: their passes are short in any case.
_WIDE_WIDTH = 512
_REFERENCE = "fp32"  # folder for the same weights in fp32 while a bundle is being made
# Above this many weights, calibration and checks take long and much memory, so they have to be asked for.
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
    calibrate: bool | None = None,
    quality: bool | None = None,
    quality_texts: Sequence[str | os.PathLike[str]] = (),
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
        dtype: "fp32", "fp16", "int8" or "int4"; the last two store weights in blocks that share a scale, and
            int8, where it is calibrated, most matrices with one scale for each output.
        pure: with "int4", 4 bits for every matrix; otherwise those where that would cost most have 8.
        graph: "fused", ONNX Runtime's own operators, updating the cache in place; or "portable",
            optimum's graph of standard operators for execution providers without those, fp32 only.
        block_size: weights that share a scale, a power of two from 16 to 256; chosen by default.
        calibrate: with "int8" or "int4", round the weights for the inputs that reach them in texts which the fp32
            model writes itself; by default for models of up to 200 million weights, where it takes up to a minute.
        quality: with "int8" or "int4", compare the predictions with those of fp32 on such texts, and put the figures
            into the manifest; by default for models of up to 200 million weights, where it takes seconds.
        quality_texts: text files (UTF-8) to compare on as well.
        parity: compare the bundle with PyTorch and put the report into the manifest, whether it passed or
            not; None for models of up to 200 million weights where torch and transformers are installed.
        revision: branch, tag or commit of a Hugging Face id.
        force: replace an existing bundle.
        progress: called with the bytes worked through so far and in all: those of the weights in float32, as often
            as they are gone through.

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
    if graph not in bundle.GRAPHS:
        raise OptionError(f"graph must be one of {', '.join(bundle.GRAPHS)}, not {graph!r}")
    if graph == "portable" and dtype != "fp32":
        raise OptionError(f"graph portable goes with dtype fp32, not with {dtype}")
    given = {"calibrate": calibrate, "quality": quality, "quality_texts": quality_texts, "block_size": block_size}
    if dtype not in _QUANTIZED and (wrong := [name for name, value in given.items() if value]):
        raise OptionError(f"{wrong[0]} goes with dtype int8 or int4, not with {dtype}")
    if quality_texts and quality is False:
        raise OptionError("quality_texts are for quality, which is switched off")
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise OptionError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")
    texts = {Path(path).name: _read_text(Path(path)) for path in quality_texts}
    check_target(target, force=force)
    checkpoint = Checkpoint.open(os.fspath(source), revision)
    small = _weights_in(checkpoint) <= _CHECKED_WEIGHTS
    by_default = small and dtype in _QUANTIZED
    calibrated = by_default if calibrate is None else calibrate
    compared = bool(texts) or by_default if quality is None else quality
    precision = _precision(checkpoint.config, dtype, pure=pure, block_size=block_size)
    with replacing(target, lambda: check_target(target, force=force)) as folder:
        _write_configuration(checkpoint, precision, folder)
        write_tokenizer(
            checkpoint.folder, {**checkpoint.raw_config, "vocab_size": checkpoint.config.vocab_size}, folder
        )
        (folder / bundle.GRAPH).parent.mkdir()
        manifest = Manifest(
            gpt2onnx=version("gpt2onnx"),
            source=checkpoint.name,
            source_sha256=checkpoint.sha256(),
            graph=graph,
            dtype=dtype,
            block_size=block_size or default_block_size(checkpoint.config, dtype, pure=pure),
            files={},
        )
        passes = _Passes(progress, 4 * _weights_in(checkpoint), 1 + (calibrated or compared) + calibrated)
        if calibrated or compared:
            _write_reference(checkpoint, folder, passes.next())
        if graph == "portable":
            from .graph.portable import write_portable_graph

            write_portable_graph(checkpoint, folder)
        else:
            calibration: Calibration | None = None
            if calibrated:
                with _unless_missing(calibrate):
                    calibration = _calibration(checkpoint, manifest, folder, passes.next(), pure=pure)
            _write_graph(checkpoint, precision, folder, passes.next(), calibration)
        manifest = replace(manifest, files=bundle.describe_files(folder, without=folder / _REFERENCE))
        if compared:
            with _unless_missing(quality or bool(texts)):
                manifest = replace(manifest, quality=_quality(checkpoint, manifest, folder, texts))
        shutil.rmtree(folder / _REFERENCE, ignore_errors=True)
        manifest.write(folder)
        if parity or (parity is None and small):
            with _unless_missing(parity):
                replace(manifest, parity=_parity(checkpoint, folder)).write(folder)
        made = Bundle.open(folder)  # here, since another export may take its place at once
    return replace(made, folder=target)


class _Passes:
    """Progress over all of the weights several times.

    Args:
        progress: the caller's.
        total: bytes of one pass.
        count: how many passes there will be.
    """

    def __init__(self, progress: Progress | None, total: int, count: int) -> None:
        self._progress, self._total, self._count, self._begun = progress, total, count, 0

    def next(self) -> Callable[[float], None]:
        """Begins a pass; takes the share of it that is done."""
        before = self._begun * self._total
        self._begun += 1

        def report(share: float) -> None:
            if self._progress is not None:
                self._progress(before + round(share * self._total), self._count * self._total)

        return report


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise OptionError(f"can't read the text {path}: {reason}") from error


def _write_reference(checkpoint: Checkpoint, folder: Path, progress: Callable[[float], None]) -> None:
    """The same weights in fp32, to calibrate with and to compare with; removed before the bundle is done."""
    reference = folder / _REFERENCE
    (reference / bundle.GRAPH).parent.mkdir(parents=True)
    _write_graph(checkpoint, Precision(), reference, progress)


def _reference(checkpoint: Checkpoint, manifest: Manifest, folder: Path) -> Bundle:
    weights = folder / _REFERENCE / bundle.WEIGHTS
    files = {bundle.WEIGHTS: bundle.FileRecord(weights.stat().st_size, "")}
    return Bundle(folder / _REFERENCE, replace(manifest, dtype="fp32", files=files), checkpoint.config)


def _calibration(
    checkpoint: Checkpoint, manifest: Manifest, folder: Path, progress: Callable[[float], None], *, pure: bool
) -> "Calibration":
    from .quantize.calibrate import observe

    four_bits = manifest.dtype == "int4"
    more = four_bits and not pure and _weights_in(checkpoint) <= _MANY_WEIGHTS
    texts = _MORE_TEXTS if more else _CALIBRATION_TEXTS[manifest.dtype]
    return observe(_reference(checkpoint, manifest, folder), texts=texts, gradients=four_bits, progress=progress)


def _quality(checkpoint: Checkpoint, manifest: Manifest, folder: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """The bundle's figures against the reference: on the latter's own samples, and on texts by their names."""
    from .validate.quality import on_own_samples, on_text

    made, reference = Bundle(folder, manifest, checkpoint.config), _reference(checkpoint, manifest, folder)
    figures = asdict(on_own_samples(made, reference))
    if texts:
        figures["texts"] = [asdict(on_text(made, reference, text, name=name)) for name, text in texts.items()]
    return figures


def _precision(config: GPT2Config, dtype: str, *, pure: bool, block_size: int | None) -> Precision:
    wide = dtype in _QUANTIZED and config.n_embd >= _WIDE_WIDTH
    return Precision(
        floats=np.float16 if dtype == "fp16" else np.float32,
        blocks=lambda layer: blocks(config, dtype, layer, pure=pure, block_size=block_size),
        wide=wide,
        # Smooth inputs make for rougher weights, which 4 bits can't afford.
        smooth=wide and dtype == "int8",
    )


def _write_graph(
    checkpoint: Checkpoint,
    precision: Precision,
    folder: Path,
    progress: Callable[[float], None],
    calibration: "Calibration | None" = None,
) -> None:
    config, total, done = checkpoint.config, _weights_in(checkpoint), 0
    weight, inputs = centre(config, checkpoint.tensor, calibration.inputs if calibration else {})
    if precision.smooth and inputs:
        weight = smooth(config, weight, inputs)

    def tensor(name: str) -> npt.NDArray[np.float32]:
        nonlocal done
        array = weight(name)
        done += array.size
        progress(done / total)
        return array

    with (folder / bundle.WEIGHTS).open("wb") as file:
        weights = WeightsFile(folder / bundle.WEIGHTS, file)
        twins = calibration.twins() if calibration else None
        model, layers = build(config, tensor, tied=checkpoint.tied, precision=precision, weights=weights, twins=twins)
    (folder / bundle.GRAPH).write_bytes(model.SerializeToString())
    _write_graphs(folder, [bundle.RAGGED_GRAPH], [ragged.build(model, config)])
    if layers:
        graph, weights_graph = wide.build(model, layers)
        graphs = ragged.build(graph, config), weights_graph
        _write_graphs(folder, (bundle.WIDE_GRAPH, bundle.WIDE_WEIGHTS), graphs)
    if precision.floats is np.float32 and precision.blocks("wte") is None and screening.pays(config):
        names = bundle.BODY_GRAPH, bundle.HEAD_GRAPH, bundle.SCREENING_GRAPH
        _write_graphs(folder, names, screening.build(model, config))


def _write_graphs(folder: Path, names: Sequence[str], graphs: Sequence["ModelProto"]) -> None:
    for name, made in zip(names, graphs, strict=True):
        (folder / name).write_bytes(made.SerializeToString())


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
    from .validate.parity import check

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
        own = {name: value for name, value in read_json(path).items() if value is not None}
        try:
            GenerationConfig.from_file_content(own)
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return own
    # GPT2Config's own defaults, which hold where config.json doesn't say; older ones say more than these ids.
    names = {"bos_token_id", "pad_token_id", *BY_NAME}
    given = {name: value for name, value in checkpoint.raw_config.items() if name in names}
    options = {"bos_token_id": 50256, "eos_token_id": 50256} | given
    return {name: value for name, value in options.items() if value is not None}


def _genai_config(config: GPT2Config, generation: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai reads; see https://onnxruntime.ai/docs/genai/reference/config.html."""
    end = generation.get("eos_token_id")
    if end in (None, []):  # it can't do without one
        end = config.vocab_size - 1
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
    # Windows would write other ends of lines, and so a bundle with other hashes.
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
