"""The machine's power while the server runs, measured one stretch of time after the other."""

import threading

from ..experiments.energy.power import PowerMeter
from .metrics import Metrics

_STRETCH = 5.0  # seconds


class Power:
    """Measures in a thread of its own; arguments and errors are those of `PowerMeter`.

    Attributes:
        watts: mean power in the last stretch; None before the first has ended.
        method: how it is found.
        seconds: what takes less time is only estimated by it.
    """

    def __init__(self, metrics: Metrics, country: str | None = None) -> None:
        self._meter = PowerMeter(country)
        self._metrics = metrics
        self.watts: float | None = None
        self.method = f"{self._meter.method.name}; a share of the machine's mean power"
        self.seconds = max(_STRETCH, self._meter.method.seconds)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpt2onnx-power", daemon=True)

    def start(self) -> None:
        """Starts to measure."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the measurement."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        stretch = 1.0  # the first one is short, so that there soon is a figure
        while not self._stopped.is_set():
            measurement = self._meter.start()
            self._stopped.wait(stretch)
            reading = measurement.stop()
            stretch = _STRETCH
            self.watts = reading.joules / reading.seconds
            self._metrics.machine_joules.inc(reading.joules)
            self._metrics.watts.set(self.watts)
