"""Opens graphs on execution providers.

ONNX Runtime falls back to the CPU without a word in its results; here nothing does. Its errors are wrapped.
"""

import contextlib
import functools
import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, MissingExtraError

from ...models.messages import one_line
from ..host import resources
from ..host.native import captured_stderr, silenced_stderr
from . import devices, forks
from .signature import Declared

try:
    with silenced_stderr():  # lines about processors and devices that it can't look at, as in a sandbox without /proc
        import onnxruntime as ort
except ModuleNotFoundError as error:
    raise MissingExtraError("Generating", "onnxruntime", "cpu") from error

VERSION = str(ort.__version__)
# The package that it comes from, where several could be meant.
PACKAGE = str(getattr(ort, "package_name", "onnxruntime"))

_log = logging.getLogger(__name__)
# onnxruntime's severities. An error that it logs is raised, too.
_SILENT, _WARNINGS = 4, 2
# A graph that ONNX Runtime has loaded.
Graph: TypeAlias = ort.InferenceSession
# Weights that a graph reads in place, kept as long as the graph.
_weights_in_use: WeakKeyDictionary[Graph, Mapping[str, npt.NDArray[np.generic]]] = WeakKeyDictionary()
# 1 ms spans the gap between two passes: a thread that sleeps there is slow to wake, above all in virtual machines. The
# default is far longer: processes side by side then take each other's cores.
_SPIN_MICROSECONDS = "1000"


def available() -> list[str]:
    """The execution providers that the installed ONNX Runtime was built with, in its order."""
    return list(ort.get_available_providers())


def candidates(device: str) -> list[str]:
    """The providers that a device's name stands for, in the order in which they are to be tried.

    Raises:
        OptionError: there is no device of this name.
        BackendError: the installed ONNX Runtime doesn't offer it.
    """
    offered = available()
    if device == devices.AUTO:
        # Looking for the installed packages takes time.
        if devices.CUDA not in offered and _log.isEnabledFor(logging.INFO):
            _log.info("%s", devices.not_offered(devices.CUDA, offered, f"{PACKAGE} {VERSION}"))
        return [provider for provider in (devices.CUDA, devices.CPU) if provider in offered]
    provider = devices.find(device, ort.get_all_providers())
    if provider not in offered:
        raise devices.not_offered(provider, offered, f"{PACKAGE} {VERSION}")
    return [provider]


def open_graph(
    graph: Path | bytes,
    provider: str,
    *,
    threads: int,
    name: object,
    optimize: bool = True,
    alone: bool = True,
    weights: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> Graph:
    """Opens a graph on a provider and, for operators that this lacks, the CPU; never on the CPU alone instead.

    Args:
        graph: a file, or its content.
        provider: one of `available`.
        threads: of one operator.
        name: what errors call the graph.
        optimize: otherwise the graph's nodes run as they are, none of them already while it is opened.
        alone: otherwise another graph runs between its passes, in whose way its threads would be if they waited for the next.
        weights: in place of external data of these names; not to be changed afterwards.

    Raises:
        BackendError: the provider doesn't load or takes none of the graph's operators, or the graph can't be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    # How long threads wait for the next operator in a loop, from ONNX Runtime 1.26 on.
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if resources.sums_of_byte_products_overflow():
        # Exact sums of products of 8-bit numbers, at the price of speed.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
    if weights:
        _give(options, weights)
    elsewhere = provider != devices.CPU
    if elsewhere:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        _preload(provider)
        # `why_not` tells why it falls back, which it would log.
        ort.set_default_logger_severity(_SILENT)
    try:
        session = ort.InferenceSession(graph, options, providers=[provider], enable_fallback=False)
    except Exception as error:
        raise failure(f"ONNX Runtime can't load {name}", error) from error
    finally:
        if elsewhere:
            ort.set_default_logger_severity(_WARNINGS)
    if provider not in session.get_providers():
        raise devices.not_loaded(provider, why_not(provider) or "ONNX Runtime took the CPU instead and doesn't say why")
    if elsewhere:
        _check_share(session, provider, name)
    if weights and not _copies_weights():
        _weights_in_use[session] = weights
    if threads > 1 or elsewhere:
        forks.watch(session)
    return session


def why_not(provider: str) -> str | None:
    """Tries a provider with a graph of one operator.

    Returns:
        Why it doesn't load, in ONNX Runtime's words; None where it does.
    """
    from . import helper_graphs

    with captured_stderr() as log:
        try:
            _preload(provider)
            session = ort.InferenceSession(helper_graphs.identity(), providers=[provider], enable_fallback=False)
            session.run(None, {"x": np.zeros(1, np.float32)})
        except Exception as error:  # noqa: BLE001  # of any kind: it is what was asked for
            return devices.said(one_line(error))
    return None if provider in session.get_providers() else devices.said(log())


def declared(graph: Graph, name: object) -> tuple[dict[str, Declared], dict[str, Declared]]:
    """A graph's inputs and its outputs, by name: type and shape of each.

    Raises:
        BackendError: a name isn't text; the error calls the graph by `name`.
    """
    try:
        inputs, outputs = (
            {each.name: (each.type, each.shape) for each in values}
            for values in (graph.get_inputs(), graph.get_outputs())
        )
    except UnicodeDecodeError as error:
        raise BackendError(f"{name} is damaged: export the bundle again") from error
    return inputs, outputs


def run(
    session: Graph, outputs: Sequence[str], inputs: Mapping[str, npt.NDArray[np.generic]]
) -> list[npt.NDArray[Any]]:
    """Some outputs of a graph for these inputs.

    Raises:
        BackendError: ONNX Runtime failed.
    """
    forks.check(session)
    try:
        return [np.asarray(each) for each in session.run(list(outputs), dict(inputs))]
    except Exception as error:
        raise failure("ONNX Runtime failed", error) from error


def failure(what: str, error: Exception) -> BackendError:
    """The error that tells what failed in ONNX Runtime, and why."""
    reason = one_line(error)
    if re.search(r"bad_alloc|allocate memory|out of memory", reason, re.IGNORECASE):
        limit = resources.memory()
        reason = "there isn't enough memory" + (f" (the tightest limit is {limit.reason})" if limit else "")
    return BackendError(f"{what}: {reason}")


def _give(options: ort.SessionOptions, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
    options.add_external_initializers(
        list(weights), [ort.OrtValue.ortvalue_from_numpy(each) for each in weights.values()]
    )


@functools.cache
def _copies_weights() -> bool:
    """Whether graphs have copies of the weights that they are given, so that the caller's can go.

    ONNX Runtime's documentation doesn't say; its versions 1.23 to 1.32 have.
    """
    from . import helper_graphs

    # Many: a few bytes it treats in another way.
    given = np.ones(1 << 14, np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    _give(options, {"weights": given})
    try:
        graph = helper_graphs.with_weights(len(given))
        session = ort.InferenceSession(graph, options, providers=[devices.CPU], enable_fallback=False)
        given[:] = 2
        (sums,) = session.run(None, {"x": np.zeros_like(given)})
    except Exception:  # noqa: BLE001  # of any kind: then nobody knows
        return False
    return bool((np.asarray(sums) == 1).all())


def _preload(provider: str) -> None:
    """Loads CUDA's libraries from pip's packages, which lie outside the loader's paths."""
    if provider == devices.CUDA and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _check_share(session: Graph, provider: str, name: object) -> None:
    """Refuses a provider that leaves all operators, or the attention, to the CPU; logs what it leaves there."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # ONNX Runtime before 1.24
        return
    taken, left = 0, set[str]()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == provider:
            taken += len(part.get_nodes())
        else:
            left |= {node.op_type for node in part.get_nodes()}
    if not taken:
        raise BackendError(f"{provider} takes none of the operators of {name}: use --device cpu")
    if "GroupQueryAttention" in left:
        # Its cache lies on the device: each pass would copy all of it to the CPU and back.
        raise BackendError(f"{provider} leaves the attention of {name} to the CPU: use --device cpu")
    _log.info("%s: %s runs %d operators, the CPU %s", name, provider, taken, ", ".join(sorted(left)) or "none")
