"""What the server counts, for Prometheus."""

from importlib.metadata import version

from gpt2onnx.errors import MissingExtraError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
except ImportError as error:
    raise MissingExtraError("Serving", "prometheus-client", "serve") from error

from ..runtime.model import Model

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gpt2onnx_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"gpt2onnx_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"gpt2onnx_{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("http_requests", "Answers to requests for completions, by status.", "status")
        self.abandoned = counter("abandoned", "Requests that were given up, by reason.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.completion_tokens = counter("completion_tokens", "Tokens generated.")
        self.queue_seconds = histogram("queue_seconds", "From a prompt's arrival to its joining the batch.")
        self.first_token_seconds = histogram("first_token_seconds", "From a prompt's arrival to its first token.")
        self.token_gap_seconds = histogram("token_gap_seconds", "Between a prompt's tokens.")
        self.request_seconds = histogram("request_seconds", "From a prompt's arrival to its end.")
        self.batch_rows = histogram("batch_rows", "Sequences in the batch, of each step.", _ROWS)
        self.running = gauge("running", "Prompts in the batch.")
        self.waiting = gauge("waiting", "Prompts that wait for room in the batch.")
        self.joules = counter("joules", "Energy of the machine while the batch ran, where it is measured.")
        self.machine_joules = counter("machine_joules", "Energy of the machine all the time, where it is measured.")
        self.watts = gauge("watts", "Mean power of the machine in the last seconds, where it is measured.")
        self._info = gauge("info", "What is served.", "model", "dtype", "device", "version")

    def describe(self, name: str, model: Model) -> None:
        """Says what is served."""
        self._info.labels(name, model.bundle.manifest.dtype, model.session.device, version("gpt2onnx")).set(1)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
