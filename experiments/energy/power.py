"""Energy of a stretch of time, as codecarbon measures it: offline, quiet, and without files. Knows nothing of models.

What codecarbon does by itself and must not do here: it warns before its log level applies, locks other trackers
out, writes emissions.csv into the current folder, sends results where a configuration file says so, and takes
seconds to look at the hardware, which `PowerMeter` therefore does when it is made.
"""

import logging
import threading
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from gpt2onnx.errors import BackendError, MissingExtraError, OptionError

from ...models.messages import one_line

JOULES_PER_KWH = 3.6e6
# Seconds that a run is repeated for: enough for codecarbon's samples of the processor's load.
DEFAULT_SECONDS = 3.0
MOST_SECONDS = 3600.0
# Settings that keep codecarbon from the network and the disk; its configuration file can't change them.
_OFFLINE = {
    "allow_multiple_runs": True,
    "output_methods": [],
    "output_handlers": [],
    "emissions_endpoint": None,
    # An empty token, as None would let the configuration's one count.
    "electricitymaps_api_token": "",
    "log_level": "critical",
    "project_name": "gpt2onnx",
}
# An energy counter of a processor wraps after minutes at the soonest; read this often, no round is lost.
_READ_EVERY = 60.0


@dataclass(frozen=True)
class Method:
    """How the processor's power is found.

    Attributes:
        name: what a reader of the figures has to know.
        seconds: a shorter measurement says little. Counters are read at both ends, and move in steps of milliseconds;
            a load is sampled once a second.
    """

    name: str
    seconds: float


_COUNTERS = 1.0
_SAMPLES = DEFAULT_SECONDS
# By codecarbon's own names, CPU._mode of codecarbon.external.hardware; other classes of hardware by class name.
_METHODS = {
    "intel_rapl": Method("RAPL", _COUNTERS),
    "windows_emi": Method("Windows energy meter", _COUNTERS),
    "intel_power_gadget": Method("Intel Power Gadget", _SAMPLES),
    "AppleSiliconChip": Method("powermetrics", _SAMPLES),
    "Raspberry": Method("Raspberry Pi power sensors", _SAMPLES),
    "cpu_load": Method("load x TDP (estimate)", _SAMPLES),
    "constant": Method("constant share of TDP (estimate)", float("inf")),
}


@dataclass(frozen=True)
class Reading:
    """A measurement.

    Attributes:
        columns: codecarbon's own, by name; energies in kWh, powers in W, emissions in kg of CO2 equivalents. The powers
            are means over the time: energy / duration. (codecarbon's own means weigh samples alike, however
            short, and don't add up.)
    """

    columns: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.columns["duration"])

    @property
    def joules(self) -> float:
        return float(self.columns["energy_consumed"]) * JOULES_PER_KWH

    @property
    def g_co2eq(self) -> float:
        return float(self.columns["emissions"]) * 1000


class PowerMeter:
    """Measures the energy of this machine; making one takes about 2 seconds the first time.

    Args:
        country: whose electricity it is, as ISO 3166-1 alpha-3; by default what codecarbon's configuration says,
            or else the world's average.

    Raises:
        MissingExtraError: codecarbon isn't installed.
        OptionError: codecarbon doesn't know the country.
        BackendError: codecarbon failed.
    """

    def __init__(self, country: str | None = None) -> None:
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        try:
            import codecarbon
            from codecarbon.input import DataSource
            from codecarbon.output_methods.emissions_data import EmissionsData
        except ModuleNotFoundError as error:
            raise MissingExtraError("Measuring energy", "codecarbon", "energy") from error
        # Its import sets a level of its own.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self._new_tracker = codecarbon.OfflineEmissionsTracker
        import tempfile  # slow to import, and rarely needed

        self._settings: dict[str, Any] = _OFFLINE | {"output_dir": tempfile.gettempdir()}
        if country is not None:
            self._settings["country_iso_code"] = country.upper()
            if country.upper() not in cast("Any", DataSource)().get_global_energy_mix_data():
                raise OptionError(f"no country {country!r}: give its code of three letters, such as FRA or USA")
        self.columns = [field.name for field in fields(EmissionsData)]
        measurement = self.start()
        self.method = _method(measurement)
        # Loads what is needed to turn energy into emissions, too.
        measurement.stop()

    def start(self) -> "Measurement":
        """Begins to measure."""
        return Measurement(self._new_tracker, self._settings)


class Measurement:
    """A measurement under way; made by `PowerMeter.start`.

    One task of one tracker each: those that codecarbon's tracker measures later share its mean powers.
    """

    def __init__(self, new_tracker: Any, settings: dict[str, Any]) -> None:
        self._stopped = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            self.tracker = new_tracker(**settings)
            self.tracker.start_task("run")
        except Exception as error:
            raise _failure(error) from error
        self._reader.start()

    def stop(self) -> Reading:
        """Ends the measurement.

        Raises:
            BackendError: codecarbon failed.
        """
        self._stopped.set()
        self._reader.join()
        try:
            data = self.tracker.stop_task()
            self.tracker.stop()
        except Exception as error:
            raise _failure(error) from error
        columns = asdict(cast("Any", data))
        for part in ("cpu", "gpu", "ram"):
            columns[f"{part}_power"] = columns[f"{part}_energy"] * JOULES_PER_KWH / columns["duration"]
        return Reading(columns)

    def _read(self) -> None:
        while not self._stopped.wait(_READ_EVERY):
            self.tracker.flush()


def _failure(error: Exception) -> BackendError:
    return BackendError(f"codecarbon failed: {one_line(error) or type(error).__name__}")


def _method(measurement: Measurement) -> Method:
    """How the tracker finds the processor's power; it says so nowhere but in its own attributes."""
    kinds = [(getattr(part, "_mode", None), type(part).__name__) for part in measurement.tracker._hardware]
    processor = next((_METHODS[name] for kind in kinds for name in kind if name in _METHODS), None)
    processor = processor or Method("unknown", float("inf"))
    others = ["GPU: its counters" for _, name in kinds if name == "GPU"] + ["RAM: by its size (estimate)"]
    return Method("; ".join([f"CPU: {processor.name}", *others]), processor.seconds)
