"""Which of a bundle's graphs is loaded on which provider, and with how many threads."""

import logging

from gpt2onnx.errors import BackendError

from ...models.bundle import GRAPH, INT8_CACHE_GRAPHS, RAGGED_GRAPH, TWIN_GRAPH, TWIN_WEIGHTS, Bundle
from ..host import resources
from ..ort import devices, providers

_log = logging.getLogger(__name__)
# Bytes of weights that keep one core busy: with less for each, threads wait for one another.
_WEIGHTS_PER_THREAD = 4_000_000
# The first version of ONNX Runtime whose GroupQueryAttention has query_seqlens.
_RAGGED_SINCE = (1, 32)
_BESIDE = frozenset({TWIN_GRAPH, TWIN_WEIGHTS, *INT8_CACHE_GRAPHS.values()})


def threads(bundle: Bundle) -> int:
    """Threads of one operator: one for each 4 MB of weights, at most the cores that this process may use."""
    return min(resources.cores().usable, max(1, round(weight_bytes(bundle) / _WEIGHTS_PER_THREAD)))


def weight_bytes(bundle: Bundle) -> int:
    """Bytes of the bundle's graphs and weights without the twin and other caches; loaded, they take at least as many."""
    return sum(
        record.size
        for name, record in bundle.manifest.files.items()
        if name.startswith("onnx/") and name not in _BESIDE
    )


def load(bundle: Bundle, device: str, threads: int, *, alone: bool) -> tuple[providers.Graph, str, str]:
    """Loads a bundle's graph: on a device, or on the first of "auto"'s that runs it.

    Args:
        bundle: the bundle.
        device: its name.
        threads: of one operator.
        alone: whether no other graph runs between its passes.

    Returns:
        The graph, the provider that it runs on, and its file in the bundle.

    Raises:
        OptionError: the device is unknown.
        BackendError: no provider runs the bundle, or ONNX Runtime can't load the graph.
    """
    *better, last = providers.candidates(device)
    for provider in better:
        try:
            if reason := devices.unsuited(provider, bundle.manifest):
                raise BackendError(reason)
            return _load_on(provider, bundle, threads, alone)
        except BackendError as error:
            _log.info("not on %s: %s", devices.device_name(provider), error)
    if reason := devices.unsuited(last, bundle.manifest):
        # Another export is no help where the device doesn't work at all.
        why = providers.why_not(last)
        raise devices.not_loaded(last, why) if why else BackendError(reason)
    return _load_on(last, bundle, threads, alone)


def _load_on(provider: str, bundle: Bundle, threads: int, alone: bool) -> tuple[providers.Graph, str, str]:
    if provider == devices.CPU and (short := resources.shortage(weight_bytes(bundle))):
        raise BackendError(f"{bundle.folder} needs at least {short}: free some, or export with fewer bits (--dtype)")
    ragged = provider == devices.CPU and RAGGED_GRAPH in bundle.manifest.files and runs_ragged()
    if bundle.cache_dtype == "int8" and not ragged:
        raise BackendError("a cache in int8 is for the CPU, with ONNX Runtime 1.32 or newer: leave out cache_dtype")
    file = RAGGED_GRAPH if ragged else GRAPH
    path = bundle.checked_path(file)
    return providers.open_graph(path, provider, threads=threads, name=path, alone=alone), provider, file


def load_twin(bundle: Bundle, threads: int) -> tuple[providers.Graph, str, str]:
    """Loads the graph of a bundle's twin on the CPU; otherwise as `load`."""
    bundle.check_in_place()
    path, size = bundle.checked_path(TWIN_GRAPH), bundle.manifest.files[TWIN_WEIGHTS].size
    if short := resources.shortage(2 * size):  # packed for the processor, weights are in memory once more
        raise BackendError(f"{path} needs about {short}")
    graph = providers.open_graph(path, devices.CPU, threads=threads, name=path, alone=False)
    bundle.check_in_place()  # again: all that was read is of one bundle
    return graph, devices.CPU, TWIN_GRAPH


def runs_ragged() -> bool:
    """Whether the installed ONNX Runtime runs graphs whose rows bring their own numbers of tokens."""
    major, minor, *_ = providers.VERSION.split(".")
    return (int(major), int(minor)) >= _RAGGED_SINCE
