"""A bundle's second graph, for prefill and batches, opened once it pays.

Opening it takes as long as it saves on 600 to 1,000 tokens, and it takes memory: a process with one short prompt does without.
Tokens are counted, not time, so that a run can be repeated.
"""

import logging

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError

from ...models.bundle import SECOND_GRAPH, SECOND_GRAPH_WEIGHTS, Bundle
from ..host import resources
from ..ort import devices, providers, signature
from . import graphs

_log = logging.getLogger(__name__)
# Tokens of a pass from which on the second graph is faster.
MIN_TOKENS = {"fp32": 8, "int8": 6, "int4": 6}
# In fp32 only tokens whose logits are asked for count. With more of them than this, the first graph is faster.
_MOST_IN_FP32 = 48
OPEN_AFTER = 512  # tokens in such passes, after which opening it has paid


def make_weights(bundle: Bundle, threads: int) -> dict[str, npt.NDArray[np.generic]]:
    """The second graph's own weights, by name: what `exporter.graph.second_graph` and `exporter.graph.transposed` say.

    Raises:
        BackendError: ONNX Runtime failed.
    """
    path = bundle.checked_path(SECOND_GRAPH_WEIGHTS)
    # Unoptimised: otherwise all of it would be computed while it is opened, and nothing given back before the end.
    graph = providers.open_graph(path, devices.CPU, threads=threads, name=path, optimize=False)
    names = list(providers.declared(graph, path)[1])
    return dict(zip(names, providers.run(graph, names, {}), strict=True))


def pays(bundle: Bundle) -> bool:
    """Whether a bundle has a second graph, and one that is faster on this processor."""
    dtype = bundle.manifest.dtype
    return SECOND_GRAPH in bundle.manifest.files and dtype in MIN_TOKENS and (dtype != "fp32" or resources.has_avx512())


class SecondGraph:
    """The second graph of a bundle, on the CPU.

    Args:
        bundle: whose it is.
        threads: of one operator.
        after: tokens that have to come in passes of many until it is opened; 0 opens it right away.

    Raises:
        BundleError: it isn't the graph that config.json describes.
    """

    def __init__(self, bundle: Bundle, threads: int, after: int) -> None:
        self._bundle, self._threads, self._left, self._tried = bundle, threads, after, False
        self._graph: providers.Graph | None = None
        if after == 0:
            self._try()

    def take(self, tokens: int, logits: int) -> providers.Graph | None:
        """The graph for a pass of some tokens and logits; None if it isn't faster for them, or there isn't the memory.

        Raises:
            BundleError: it isn't the graph that config.json describes.
        """
        dtype = self._bundle.manifest.dtype
        if dtype == "fp32":
            tokens = logits if logits <= _MOST_IN_FP32 else 0
        if tokens < MIN_TOKENS[dtype]:
            return None
        if not self._tried:
            self._left -= tokens
            if self._left < 0:
                self._try()
        return self._graph

    def _try(self) -> None:
        self._tried = True
        try:
            self.open()
        except BackendError as error:
            _log.info("prompts and batches stay slower: %s", error)

    def open(self) -> None:
        """Opens it now, unless it is open.

        Raises:
            BundleError: it isn't the graph that config.json describes.
            BackendError: it takes more memory than there is, ONNX Runtime can't load it, or another bundle has taken its place.
        """
        if self._graph is not None:
            return
        self._bundle.check_in_place()
        path = self._bundle.checked_path(SECOND_GRAPH)
        if short := resources.shortage(2 * graphs.weight_bytes(self._bundle)):
            raise BackendError(f"{path} needs about {short}")
        weights = make_weights(self._bundle, self._threads)
        graph = providers.open_graph(path, devices.CPU, threads=self._threads, name=path, weights=weights)
        self._bundle.check_in_place()  # again: all that was read is of one bundle
        signature.check(self._bundle, np.float32, *providers.declared(graph, path), path, ragged=True)
        self._graph = graph
        del weights
        resources.return_freed_memory()
