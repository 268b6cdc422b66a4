"""Metrics for Prometheus."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..runtime.model import Model

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
# vLLM's names for what means the same, by ours: https://docs.vllm.ai/en/latest/usage/metrics.html
_VLLM = {
    "gpt2onnx_running": "vllm:num_requests_running",
    "gpt2onnx_waiting": "vllm:num_requests_waiting",
    "gpt2onnx_cache_use": "vllm:kv_cache_usage_perc",
    "gpt2onnx_prompt_tokens": "vllm:prompt_tokens",
    "gpt2onnx_completion_tokens": "vllm:generation_tokens",
    "gpt2onnx_queue_seconds": "vllm:request_queue_time_seconds",
    "gpt2onnx_first_token_seconds": "vllm:time_to_first_token_seconds",
    "gpt2onnx_token_gap_seconds": "vllm:inter_token_latency_seconds",
    "gpt2onnx_request_seconds": "vllm:e2e_request_latency_seconds",
}


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """Metrics of one model."""

    prompt_tokens: Counter
    completion_tokens: Counter
    queue_seconds: Histogram
    first_token_seconds: Histogram
    token_gap_seconds: Histogram
    request_seconds: Histogram
    batch_rows: Histogram
    running: Gauge
    waiting: Gauge
    cache_use: Gauge


class Metrics:
    """Metrics of one server, in a registry of its own.

    Args:
        joules: the machine's energy since its last call, in joules; None: energy isn't measured.

    Attributes:
        models: metrics of the models that were ever loaded, by name.
    """

    def __init__(self, joules: Callable[[], float] | None = None) -> None:
        self._read_joules, self._reading = joules, threading.Lock()
        self.registry = registry = CollectorRegistry()
        self._vllm = CollectorRegistry()
        self._vllm.register(_VllmNames(registry))
        self.models: dict[str, ModelMetrics] = {}
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gpt2onnx_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"gpt2onnx_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"gpt2onnx_{name}", text, ["model"], buckets=buckets, registry=registry)

        self.requests = counter("http_requests", "Answers to requests for completions, by status.", "status")
        self.abandoned = counter(
            "abandoned",
            "Requests that ended early: their client left or stopped reading, or their time was over.",
            "reason",
        )
        self._of_models: dict[str, Any] = {
            "prompt_tokens": counter("prompt_tokens", "Prompt tokens computed.", "model"),
            "completion_tokens": counter("completion_tokens", "Tokens generated.", "model"),
            "queue_seconds": histogram("queue_seconds", "From a prompt's arrival to its place in the batch."),
            "first_token_seconds": histogram("first_token_seconds", "From a prompt's arrival to its first token."),
            "token_gap_seconds": histogram("token_gap_seconds", "Between two tokens of a prompt."),
            "request_seconds": histogram("request_seconds", "From a prompt's arrival to its end."),
            "batch_rows": histogram("batch_rows", "Sequences in the batch at each step.", _ROWS),
            "running": gauge("running", "Prompts in the batch.", "model"),
            "waiting": gauge("waiting", "Prompts in the queue.", "model"),
            "cache_use": gauge("cache_use", "Share of the KV cache's rows in use, from 0 to 1.", "model"),
        }
        self._joules = None if joules is None else counter("joules", "Energy of the machine since the server's start.")
        self._info = gauge("info", "The served model.", "model", "dtype", "device", "version")

    def of(self, name: str, model: Model) -> ModelMetrics:
        """The metrics of a model that is served by that name."""
        self._info.labels(name, model.bundle.manifest.dtype, model.runner.device, version("gpt2onnx")).set(1)
        found = {field: metric.labels(name) for field, metric in self._of_models.items()}
        return self.models.setdefault(name, ModelMetrics(**found))

    def page(self) -> bytes:
        """All metrics in Prometheus' text format. Reads the energy, which may take a second: not for the event loop's thread."""
        if self._read_joules is not None and self._joules is not None:
            with self._reading:
                self._joules.inc(self._read_joules())
        return generate_latest(self.registry) + generate_latest(self._vllm)


class _VllmNames(Collector):
    """Metrics of a registry by vLLM's names, so that its dashboards fit."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if name := _VLLM.get(metric.name):
                renamed = Metric(name, metric.documentation, metric.type)
                for sample in metric.samples:
                    labels = {
                        "model_name" if label == "model" else label: value for label, value in sample.labels.items()
                    }
                    renamed.add_sample(sample.name.replace(metric.name, name, 1), labels, sample.value)
                yield renamed
