"""Contenders: each peer at each precision, and the precision class within which it is compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import environments

OURS = "gpt2onnx_peer"


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Attributes:
        name: as printed.
        family: class of precision; speeds are compared within it.
        driver: module in peers/.
        python: interpreter of its environment.
        model: file or folder for its driver.
        precision: for its driver; gpt2onnx's is told that of the KV cache.
        weights: file of its weights.
        read: share of that file read for a token, such as a half if fp32 is held as bf16.
        note: details that the name lacks.
        slow: writes shorter texts where it is compared with itself.
        cold: whether its start as a process is timed.
        environment: folder of its installation, for its size.
    """

    name: str
    family: str
    driver: str
    python: str
    model: str
    precision: str
    weights: str
    read: float = 1.0
    note: str = ""
    slow: bool = False
    cold: bool = False
    environment: str = ""

    @property
    def ours(self) -> bool:
        return self.driver == OURS

    def read_bytes(self) -> int:
        """Bytes of weights that one step of decoding reads."""
        return round(Path(self.weights).stat().st_size * self.read)

    def model_bytes(self) -> int:
        """Bytes of the model on disk, with its tokenizer if it has one."""
        path = Path(self.model)
        return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def from_file(path: Path) -> list[Contender]:
    """Reads contenders from a JSON list, for your own comparisons."""
    return [Contender(**each) for each in json.loads(path.read_text())]


def standard(work: Path) -> list[Contender]:
    """Contenders of the report, as `prepare` has made them."""
    return list(_standard(work))


def _standard(work: Path) -> Iterator[Contender]:
    models = work / "models"

    def contender(name: str, family: str, environment: str, driver: str, model: str, **more: object) -> Contender:
        weights = str(models / model / str(more.pop("file"))) if "file" in more else str(models / model)
        python = str(environments.interpreter(work, environment))
        model, folder = str(models / model), os.fspath(work / "environments" / environment)
        return Contender(
            name=name, family=family, driver=driver, python=python, model=model, weights=weights, environment=folder,
            **more,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def ours(family: str, export: str, cache: str = "fp32", cold: bool = False) -> Contender:
        name = f"gpt2onnx {export}" if cache == "fp32" else f"gpt2onnx {export}, {cache} cache"
        return contender(
            name, family, "gpt2onnx", OURS, f"gpt2onnx-{export.replace(' ', '-')}", precision=cache,
            file="onnx/model.onnx_data", cold=cold,
        )  # fmt: skip

    def transformers(family: str, precision: str, read: float) -> Contender:
        return contender(
            f"transformers {precision}", family, "transformers", "transformers_peer", "checkpoint", read=read, slow=True,
            precision=precision, file="model.safetensors", cold=precision == "fp32",
        )  # fmt: skip

    def llama(family: str, kind: str) -> Contender:
        return contender(
            f"llama.cpp {kind}", family, "llama.cpp", "llama_cpp_peer", f"gpt2-{kind}.gguf", precision=kind,
            cold=kind == "q8_0",
        )  # fmt: skip

    def ctranslate2(precision: str) -> Contender:
        return contender(
            f"CTranslate2 {precision}", precision, "ctranslate2", "ctranslate2_peer", f"ctranslate2-{precision}",
            precision=precision, file="model.bin", cold=precision == "int8", slow=True,
        )  # fmt: skip

    def openvino(name: str, family: str, weights: str, precision: str, note: str, read: float = 1.0) -> Contender:
        return contender(
            f"OpenVINO GenAI {name}", family, "openvino", "openvino_peer", f"openvino-{weights}", precision=precision,
            file="openvino_model.bin", note=note, read=read, cold=weights == "int8",
        )  # fmt: skip

    def genai(precision: str) -> Contender:
        return contender(
            f"onnxruntime-genai {precision}", precision, "onnxruntime-genai", "genai_peer", f"gpt2onnx-{precision}",
            precision=precision, file="onnx/model.onnx_data", note="on gpt2onnx's bundle", cold=precision == "int8",
        )  # fmt: skip

    usual = "default: bf16 arithmetic if the processor has it, 8-bit KV cache"
    yield ours("fp32", "fp32")
    yield ours("fp32", "fp32", "int8")
    yield transformers("fp32", "fp32", 1.0)
    # Its graph holds the embedding twice; one copy is a lookup table.
    yield contender(
        "optimum fp32", "fp32", "optimum", "optimum_peer", "optimum", precision="fp32", file="model.onnx",
        note="ORTModelForCausalLM on its own export", read=0.763, slow=True, cold=True,
    )  # fmt: skip
    yield ctranslate2("fp32")
    yield llama("fp32", "f32")
    yield openvino("fp32", "fp32", "fp32", "f32", "set to compute in fp32; default 8-bit KV cache")
    yield genai("fp32")
    yield ours("16 bit", "fp32")
    yield ours("16 bit", "int8")
    yield transformers("16 bit", "bf16", 0.5)
    yield llama("16 bit", "bf16")
    yield openvino("fp32 as bf16", "16 bit", "fp32", "default", f"fp32 weights, {usual}", 0.5)
    yield ours("int8", "int8", cold=True)
    yield ours("int8", "int8", "int8")
    yield ctranslate2("int8")
    yield llama("int8", "q8_0")
    yield openvino("int8", "int8", "int8", "default", usual)
    yield genai("int8")
    yield ours("int4", "int4")
    yield ours("int4", "int4 pure")
    yield ours("int4", "int4 pure", "int8")
    yield llama("int4", "q4_0")
    yield openvino("int4", "int4", "int4", "default", f"embedding and head int8; {usual}")
    yield genai("int4")
