"""How time grows with context, prompt, batch, vocabulary and model, measured on random weights of GPT-2's shapes.

    python -m benchmarks.growth export                 checkpoints and bundles, into the work folder
    python -m benchmarks.growth measure context int8   one part in one precision; figures go to docs/benchmarks/growth.json
    python -m benchmarks.growth report                 the plots and docs/benchmarks/growth.md from those figures

Each point is a run of the product's own loop, as `gpt2onnx bench` times it. All points of a part are visited in turn,
round after round, so that what else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpt2onnx
from gpt2onnx.experiments.benchmark import Run, time_run, weights_read
from gpt2onnx.experiments.machine import MemoryReader, describe
from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes
from gpt2onnx.runtime.engine.scheduler import Decoder
from gpt2onnx.runtime.model import Model

from . import growth_report
from .models import SHAPES
from .prepare import default_work

FIGURES = growth_report.FOLDER / "growth.json"
VOCABULARY = 50257
VOCABULARIES = (1_000, 5_000, 20_000, VOCABULARY, 100_000, 200_000)
CONTEXTS = (32, 64, 128, 256, 384, 512, 640, 768, 896, 960)
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)
STEPS = 32
PROMPT = 32
LARGEST_FP32 = 4e8  # parameters; larger ones are measured in int8 only


@dataclass(frozen=True)
class Point:
    """What one figure is taken on."""

    x: float
    bundle: str
    prompt: int = PROMPT
    batch: int = 1


def points(part: str, dtype: str) -> list[Point]:
    """The points of a part; of "size", x is the model's place among the shapes."""
    gpt2 = bundle_name("gpt2", VOCABULARY, dtype)
    if part == "context":
        return [Point(length + STEPS / 2, gpt2, prompt=length) for length in CONTEXTS]
    if part == "batch":
        return [Point(batch, gpt2, batch=batch) for batch in BATCHES]
    if part == "vocabulary":
        return [Point(size, bundle_name("gpt2", size, dtype)) for size in VOCABULARIES]
    return [Point(index, bundle_name(shape, VOCABULARY, dtype)) for index, shape in enumerate(shapes(dtype))]


def shapes(dtype: str) -> list[str]:
    return [shape for shape in SHAPES if dtype != "fp32" or parameters(configuration(shape)) < LARGEST_FP32]


def parameters(config: GPT2Config) -> int:
    return sum(int(np.prod(shape)) for shape in weight_shapes(config, tied=True).values())


def configuration(shape: str, vocabulary: int = VOCABULARY) -> GPT2Config:
    width, layers, heads = SHAPES[shape]
    return GPT2Config.from_dict({"vocab_size": vocabulary, "n_embd": width, "n_layer": layers, "n_head": heads})


def bundle_name(shape: str, vocabulary: int, dtype: str) -> str:
    return f"{shape}-{vocabulary}-{dtype}"


def export(work: Path) -> None:
    """Every bundle that isn't there yet; checkpoints, in float16, are removed as soon as they have served."""
    wanted = {(shape, VOCABULARY, dtype) for dtype in ("int8", "fp32") for shape in shapes(dtype)}
    wanted |= {("gpt2", size, "int8") for size in VOCABULARIES}
    for shape, vocabulary, dtype in sorted(wanted):
        target = work / bundle_name(shape, vocabulary, dtype)
        if target.exists():
            continue
        source = work / f"{shape}-{vocabulary}"
        write_checkpoint(configuration(shape, vocabulary), source)
        print(target.name, flush=True)
        quantised = {"calibrate": False, "quality": False} if dtype == "int8" else {}
        gpt2onnx.export(source, target, dtype=dtype, parity=False, **quantised)
        for file in source.iterdir():
            file.unlink()
        source.rmdir()


def write_checkpoint(config: GPT2Config, folder: Path) -> None:
    """Random weights, a stretch of the same million numbers for each, and a tokenizer of bytes."""
    import tokenizers
    from safetensors.numpy import save_file

    numbers = (0.02 * np.random.default_rng(0).standard_normal(1_000_003)).astype(np.float16)
    named = {
        f"transformer.{name}": np.resize(numbers, shape)
        for name, shape in weight_shapes(config, tied=True).items()
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors")
    architecture = {"n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
    content = {"model_type": "gpt2", "vocab_size": config.vocab_size, "torch_dtype": "float16"} | architecture
    (folder / "config.json").write_text(json.dumps(content))
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(work: Path, part: str, dtype: str, rounds: int) -> dict[str, Any]:
    """The figures of a part."""
    wanted = points(part, dtype)
    models = {name: gpt2onnx.load(work / name) for name in {point.bundle for point in wanted}}
    decoders = {name: Decoder(model.session) for name, model in models.items()}
    runs: list[list[Run]] = [[] for _ in wanted]
    threads = next(iter(models.values())).session.threads
    bandwidths: list[float] = []
    with MemoryReader(threads) as reader:
        for turn in range(rounds + 1):  # the first is for warming up
            for point, found in zip(wanted, runs, strict=True):
                run = one_run(models[point.bundle], decoders[point.bundle], point)
                found += [run] * (turn > 0)
            bandwidths.append(reader.read())
    return {
        "threads": threads,
        "bandwidth": statistics.median(bandwidths),
        "points": [
            figures(models[point.bundle], point, found) for point, found in zip(wanted, runs, strict=True)
        ],
    }  # fmt: skip


def one_run(model: Model, decoder: Decoder, point: Point) -> Run:
    decoder.forget()
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(point.batch, point.prompt))
    return time_run(decoder, list(prompts), STEPS + 1, model.config.n_positions)


def figures(model: Model, point: Point, runs: list[Run]) -> dict[str, Any]:
    """Medians over the runs, seconds; a run's step is the mean of its steps."""
    config = model.config
    steps = [run.decode_seconds / STEPS for run in runs]
    context = point.prompt + STEPS / 2
    return {
        "x": point.x,
        "bundle": point.bundle,
        "parameters": parameters(config),
        "prompt": point.prompt,
        "batch": point.batch,
        "step": statistics.median(steps),
        "step_least": min(steps),
        "step_most": max(steps),
        "prefill": statistics.median(run.prefill_seconds for run in runs),
        "weights": weights_read(model.bundle),
        "cache": int(point.batch * context * 2 * config.n_layer * config.n_embd * model.session.dtype.itemsize),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work() / "growth")
    parser.add_argument("what", choices=["export", "measure", "report"])
    parser.add_argument("part", nargs="?", choices=growth_report.PARTS)
    parser.add_argument("dtype", nargs="?", choices=["int8", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "export":
        arguments.work.mkdir(parents=True, exist_ok=True)
        export(arguments.work)
        return
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if arguments.what == "measure":
        if arguments.dtype is None:
            parser.error("measure needs a part and a precision")
        known["machine"] = describe()
        found = measure(arguments.work, arguments.part, arguments.dtype, arguments.rounds)
        known.setdefault("parts", {}).setdefault(arguments.part, {})[arguments.dtype] = found
        FIGURES.parent.mkdir(parents=True, exist_ok=True)
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    growth_report.write(known)


if __name__ == "__main__":
    main()
