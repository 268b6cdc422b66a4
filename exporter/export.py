"""Orchestrates an export: checkpoint in, bundle out, complete or not at all."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, CheckpointError, MissingExtraError, OptionError

from ..models import bundle
from ..models.bundle import Bundle, Manifest
from ..models.config import GPT2Config
from ..models.precision import BLOCK_SIZES, DTYPES, QUANTIZED, blocks, default_block_size
from ..models.shapes import weight_shapes
from ..runtime.host.progress import Progress, or_notebook_bar
from ..runtime.text import text_input
from ..runtime.text.tokenizer import Tokenizer

try:
    from .checkpoint.checkpoint import Checkpoint
    from .graph import second_graph, transposed
    from .graph.write import BuildSecond, write_graphs, write_int8_cache_graphs, write_twin
    from .quantize.layers import QuantizedLayers, Scheme, Tensor, to_nearest
    from .quantize.transforms import Smoothing, centre, range_by_weights, range_on
except ModuleNotFoundError as error:
    raise MissingExtraError("Exporting a checkpoint", error.name or "onnx", "export") from error

from .bundle_config import write_configuration
from .files.atomic import replacing
from .files.target import check_target
from .tokenizer.convert import write_tokenizer

if TYPE_CHECKING:
    from .quantize.statistics import Statistics

_REFERENCE = "fp32"  # beside a new bundle: a folder of the same weights in fp32, which goes with the workspace
# Above this number of weights, calibration and checks take long and much memory, so they have to be asked for.
_CHECKED_WEIGHTS = 200_000_000
# From this number of weights on, a pass takes so long that drafting pays.
_TWIN_WEIGHTS = 20_000_000

_log = logging.getLogger(__name__)

Share = Callable[[float], None]  # takes the share of a pass that is done


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
    twin: bool | None = None,
    int8_cache: bool | None = None,
    parity: bool | None = False,
    revision: str | None = None,
    n_head: int | None = None,
    adapter: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a GPT-2 checkpoint to an ONNX bundle.

    Everything is written to a temporary folder beside the target and moved into place at the end.

    Args:
        source: the embedded model `tales`, a checkpoint folder or file, or a Hugging Face id such as `gpt2`; or an adapter of
            peft, which names its base.
        target: the bundle's folder. It must not exist, unless `force` is given and it is a bundle.
        dtype: "fp32", "fp16", "int8" or "int4"; the last two are block-wise: some weights share a scale.
        pure: with "int4", 4 bits for every matrix; otherwise the matrices where 4 bits cost most have 8.
        graph: "fused", ONNX Runtime's own operators, updating the cache in place; or "portable",
            optimum's graph of standard operators for execution providers without those, fp32 only.
        block_size: weights that share a scale, a power of two from 16 to 256; chosen by default.
        calibrate: with "int8" or "int4", round the weights for the activations of the fp32 model on texts that it
            writes itself. None for models of up to 200 million weights, where it takes up to some minutes.
        quality: with "int8" or "int4", compare the predictions with those of fp32 on such texts, and put the figures
            into the manifest. None for models of up to 200 million weights, where it takes seconds.
        quality_texts: text files (UTF-8) to compare on as well.
        twin: with "fp32" or "fp16", add the network in 8 bits, which drafts tokens for the full one to verify. None for
            models of 20 million weights and more, where it pays. It takes a quarter of the fp32 weights' size.
        int8_cache: with graph "fused", but not in "fp16": add the graphs for a KV cache in 8 bits, whose scales are measured on the
            network. None for models of up to 200 million weights, where it takes seconds.
        parity: compare the bundle with PyTorch and put the report into the manifest, whether it passed or
            not. None for models of up to 200 million weights where torch and transformers are installed.
        revision: branch, tag or commit of a Hugging Face id.
        n_head: number of attention heads, for weights without a configuration; by default one for each 64 of the width.
        adapter: an adapter of peft to merge into the source (LoRA, rsLoRA, DoRA, IA3), a folder or a Hugging Face id.
        force: replace an existing bundle.
        progress: called with the bytes done and the bytes in all, of the weights in float32 times the passes over them; a
            notebook shows a bar by default.

    Returns:
        The bundle, opened.

    Raises:
        CheckpointError: the source can't be found or read, or isn't a GPT-2 that can be exported.
        OptionError: options are out of range or contradict each other.
        PromptError: a quality text can't be read.
        OutputError: the target exists or can't be written.
        MissingExtraError: the packages of the extra `export` aren't installed, or those that the graph or a check needs.
        BackendError: ONNX Runtime or optimum failed.
    """
    target = Path(target)
    _check_options(dtype, graph, block_size, pure=pure)
    given = {"calibrate": calibrate, "quality": quality, "quality_texts": quality_texts, "block_size": block_size}
    if dtype not in QUANTIZED and (wrong := [name for name, value in given.items() if value]):
        raise OptionError(f"{wrong[0]} goes with dtype int8 or int4, not with {dtype}")
    if twin and (dtype in QUANTIZED or graph == "portable"):
        raise OptionError(f"twin goes with dtype fp32 or fp16 and graph fused, not with {dtype} and {graph}")
    if int8_cache and (dtype == "fp16" or graph == "portable"):
        raise OptionError(
            f"int8_cache goes with dtype fp32, int8 or int4 and graph fused, not with {dtype} and {graph}"
        )
    if quality_texts and quality is False:
        raise OptionError("quality_texts are for quality, which is switched off")
    texts = [(Path(path).name, text_input.read(Path(path), f"the text {path}")) for path in quality_texts]
    check_target(target, force=force)
    checkpoint = Checkpoint.open(os.fspath(source), revision, n_head, None if adapter is None else os.fspath(adapter))
    small = _count_weights(checkpoint) <= _CHECKED_WEIGHTS
    drafted = dtype not in QUANTIZED and graph == "fused"
    drafted = drafted and (_count_weights(checkpoint) >= _TWIN_WEIGHTS if twin is None else twin)
    by_default = small and dtype in QUANTIZED
    calibrated = by_default if calibrate is None else calibrate
    predicts = checkpoint.config.n_positions > 1
    compared = bool(texts) or (by_default and predicts) if quality is None else quality
    if compared and not predicts:
        raise OptionError(f"quality compares predictions, and {source} has room for one token: leave it out")
    with replacing(target, lambda: check_target(target, force=force)) as folder:
        write_configuration(checkpoint, folder, half=dtype == "fp16")
        settings = {**checkpoint.raw_config, "vocab_size": checkpoint.config.vocab_size}
        with checkpoint.tokenizer_folder() as place:
            has_tokenizer = write_tokenizer(place, settings, folder)
        if not has_tokenizer:
            if texts:
                raise OptionError(f"quality_texts need a tokenizer, and {checkpoint.folder} has none")
            _log.warning(
                "%s has no tokenizer, so the bundle takes and gives token ids; for text put tokenizer.json there, vocab.json with"
                " merges.txt, vocab.txt or nanoGPT's meta.pkl, or give --tokenizer FOLDER later",
                checkpoint.folder,
            )
        tokens = _encoded(texts, folder)
        manifest = Manifest(
            gpt2onnx=version("gpt2onnx"),
            source=checkpoint.name,
            source_sha256=checkpoint.sha256(),
            graph=graph,
            dtype=dtype,
            block_size=block_size or default_block_size(checkpoint.config, dtype, pure=pure),
            files={},
        )
        progress = or_notebook_bar(progress, f"Exporting {source}")
        passes = _Passes(progress, checkpoint, 1 + (calibrated or compared) + calibrated + drafted)
        reference = None
        if calibrated or compared:
            reference = _write_reference(checkpoint, manifest, folder.with_name(_REFERENCE), passes.next())
        if graph == "portable":
            from .graph.portable import write_portable_graph

            write_portable_graph(checkpoint, folder)
        else:
            statistics = None
            if calibrated and reference:
                try:
                    statistics = _collect(reference, checkpoint, dtype, passes.next(), pure=pure)
                except MissingExtraError as error:
                    if calibrate:
                        raise
                    _log.warning("not calibrated, so %s loses more accuracy: %s", dtype, error)
            scheme = partial(blocks, checkpoint.config, dtype, pure=pure, block_size=block_size)
            layers = _quantize(checkpoint, dtype, scheme, statistics, passes.next())
            second: BuildSecond | None = None
            if layers.per_tensor:
                second = partial(second_graph.build, layers=layers.per_tensor)
            elif dtype == "fp32" and checkpoint.config.n_embd >= second_graph.MIN_WIDTH:
                second = transposed.build
            write_graphs(
                folder,
                checkpoint.config,
                layers.weights,
                tied=checkpoint.tied,
                floats=np.float16 if dtype == "fp16" else np.float32,
                second=second,
            )
            if drafted:
                scheme = partial(blocks, checkpoint.config, "int8", pure=False, block_size=None)
                layers = _quantize(checkpoint, "int8", scheme, None, passes.next(), shares_cache=True)
                write_twin(folder, checkpoint.config, layers.weights, tied=checkpoint.tied)
            if dtype != "fp16" and (small if int8_cache is None else int8_cache):
                _add_int8_cache(_unlisted(folder, manifest, checkpoint.config), wanted=int8_cache)
        manifest = replace(manifest, files=bundle.describe_files(folder))
        if compared and reference:
            with _unless_missing(quality or bool(texts)):
                from .validate.quality import report

                written = Bundle(folder, manifest, checkpoint.config)
                manifest = replace(manifest, quality=report(written, reference, tokens))
        manifest.write(folder)
        if parity or (parity is None and small):
            with _unless_missing(parity):
                from .validate.parity import check

                replace(manifest, parity=check(folder, checkpoint)).write(folder)
        made = Bundle.open(folder)  # here, since another export may take its place at once
    return replace(made, folder=target)


def _check_options(dtype: str, graph: str, block_size: int | None, *, pure: bool) -> None:
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if pure and dtype != "int4":
        raise OptionError(f"pure goes with dtype int4, not with {dtype}")
    if graph not in bundle.GRAPHS:
        raise OptionError(f"graph must be one of {', '.join(bundle.GRAPHS)}, not {graph!r}")
    if graph == "portable" and dtype != "fp32":
        raise OptionError(f"graph portable goes with dtype fp32, not with {dtype}")
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise OptionError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")


def _encoded(texts: Sequence[tuple[str, str]], folder: Path) -> list[tuple[str, list[int]]]:
    """The names and tokens of the texts to compare on, by a bundle's tokenizer; early, since a text may be of no use."""
    if not texts:
        return []
    tokenizer = Tokenizer(folder / bundle.TOKENIZER)
    tokens = [(name, tokenizer.encode(text)) for name, text in texts]
    if short := [name for name, ids in tokens if len(ids) < 2]:
        raise OptionError(f"the quality text {short[0]} has fewer than two tokens: give a longer one")
    return tokens


def _count_weights(checkpoint: Checkpoint) -> int:
    shapes = weight_shapes(checkpoint.config, tied=checkpoint.tied)
    return sum(math.prod(shape) for shape in shapes.values())


def _write_reference(checkpoint: Checkpoint, manifest: Manifest, folder: Path, progress: Share) -> Bundle:
    """Writes the same weights in fp32, to calibrate with and to compare with."""
    weights = _counted(checkpoint, checkpoint.tensor, progress)
    write_graphs(folder, checkpoint.config, weights, tied=checkpoint.tied)
    return _unlisted(folder, replace(manifest, dtype="fp32"), checkpoint.config)


def _unlisted(folder: Path, manifest: Manifest, config: GPT2Config) -> Bundle:
    """A bundle whose files aren't all written: its graph for interchange can be run."""
    files = {bundle.WEIGHTS: bundle.FileRecord((folder / bundle.WEIGHTS).stat().st_size, "")}
    return Bundle(folder, replace(manifest, files=files), config)


def _add_int8_cache(written: Bundle, *, wanted: bool | None) -> None:
    """Adds the graphs with a KV cache in int8; not where they aren't asked for and the network can't be run here."""
    try:
        from .quantize.cache_scales import measure

        scales = measure(written)
    except (BackendError, MissingExtraError, OptionError) as error:
        if wanted:
            raise
        level = logging.INFO if isinstance(error, MissingExtraError) else logging.WARNING
        _log.log(level, "without graphs for a KV cache in int8: %s", error)
    else:
        write_int8_cache_graphs(written.folder, written.config, scales)


def _collect(reference: Bundle, checkpoint: Checkpoint, dtype: str, progress: Share, *, pure: bool) -> "Statistics":
    """Activation statistics of the network, on texts of its own."""
    from ..runtime.engine.runner import Runner
    from .quantize.statistics import TEXT_LENGTH, collect, number_of_texts, sample

    number = number_of_texts(dtype, _count_weights(checkpoint), pure=pure)
    tokens = sample(Runner(reference), number, min(TEXT_LENGTH, reference.config.n_positions))
    progress(0.5)
    return collect(reference, tokens, gradients=dtype == "int4", progress=lambda share: progress(0.5 + 0.5 * share))


def _quantize(
    checkpoint: Checkpoint,
    dtype: str,
    scheme: Scheme,
    statistics: "Statistics | None",
    progress: Share,
    *,
    shares_cache: bool = False,
) -> QuantizedLayers:
    """Quantises the layers: calibrated with statistics, to nearest without.

    A network that shares the key-value cache of the one in fp32 needs the same values, so those are not smoothed.
    """
    config = checkpoint.config
    tensor: Tensor = checkpoint.tensor
    if statistics is None:
        if dtype in QUANTIZED:
            ranges = partial(range_by_weights, config, tensor, values=not shares_cache)
            tensor = Smoothing(config, tensor, scheme, ranges).tensor
        return to_nearest(_counted(checkpoint, tensor, progress), scheme)
    from .quantize.sequential import SequentialCalibrator

    second = config.n_embd >= second_graph.MIN_WIDTH
    tensor, inputs = centre(config, tensor, statistics.inputs)
    smoothing = Smoothing(config, tensor, scheme, partial(range_on, inputs))
    statistics = replace(statistics, gradients=smoothing.gradients(statistics.gradients))
    tensor = _counted(checkpoint, smoothing.tensor, progress)
    return SequentialCalibrator(config, tensor, scheme, statistics, tied=checkpoint.tied, per_tensor=second).run()


@contextmanager
def _unless_missing(wanted: bool | None) -> Iterator[None]:
    """Leaves out a check that wasn't asked for, if a package is missing or transformers can't load the checkpoint."""
    try:
        yield
    except (CheckpointError, MissingExtraError) as error:
        if wanted:
            raise
        _log.info("a check was left out: %s", error)


class _Passes:
    """Progress over all weights, several times."""

    def __init__(self, progress: Progress | None, checkpoint: Checkpoint, count: int) -> None:
        self._progress, self._bytes, self._count, self._begun = progress, 4 * _count_weights(checkpoint), count, 0

    def next(self) -> Share:
        """Begins a pass; the function that it returns takes the share of the pass that is done."""
        before = self._begun * self._bytes
        self._begun += 1

        def report(share: float) -> None:
            if self._progress is not None:
                self._progress(before + round(share * self._bytes), self._count * self._bytes)

        return report


def _counted(checkpoint: Checkpoint, tensor: Tensor, progress: Share) -> Tensor:
    """The same weights; reports the share of them that has been read."""
    total, done = _count_weights(checkpoint), 0

    def counted(name: str) -> npt.NDArray[np.float32]:
        nonlocal done
        array = tensor(name)
        done += array.size
        progress(done / total)
        return array

    return counted
