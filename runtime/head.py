"""The output head by itself, for bundles that have one: all logits in full, or only the largest ones.

It begins in full, and notes what it is given. When it would have been worth it, estimates for such inputs are made of the
head, and from then on it is screened (see `screening`): a fourth of it is read in place of the whole. Where estimates turn out to
be too rough for the network, it goes back for good. Passes are counted, not time, so that a run can be repeated.
"""

import logging
from collections import deque
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, BundleError

from ..models import contract, external_data
from ..models.bundle import BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH, Bundle
from ..models.config import GPT2Config
from . import devices, providers, resources, screening, signature
from .screening import Array

_log = logging.getLogger(__name__)
# Passes that could have been screened, after which the next one is: making the estimates takes as long as so many save.
WORTH = 96
# So many of the last inputs show what the next ones will be like.
_NOTED = 256
# After so many screened passes it goes on if this share of them was certain; otherwise the whole head was read, too.
_TRIED, _LEAST_SUCCESS = 128, 0.75


def usable(bundle: Bundle) -> bool:
    """Whether a bundle has its output head by itself, and logits can be screened here."""
    # Where sums of products of bytes overflow, estimates may be off by more than is known.
    parts = {BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH} <= bundle.manifest.files.keys()
    return parts and not resources.sums_of_byte_products_overflow()


def bytes_read(bundle: Bundle, positions: int) -> int:
    """Bytes of weights that the head reads in a pass of greedy search: once it screens, unless the positions are too many for that."""
    config = bundle.config
    block_size = screening.block_size(config.n_embd)
    weights = config.vocab_size * config.n_embd
    if not block_size or not screening.candidates(positions, 1, config.vocab_size):
        return 4 * weights
    return weights + 4 * weights // block_size


class OutputHead:
    """A bundle's output head, on the CPU.

    Args:
        bundle: one that has the graph of its head.
        threads: of one operator.
        screen_after: passes that could be screened, after which the next one is; None never.

    Raises:
        BundleError: the graph isn't the head that config.json describes.
        BackendError: ONNX Runtime can't load it, or there isn't the memory.
    """

    def __init__(self, bundle: Bundle, threads: int, screen_after: int | None = WORTH) -> None:
        self._bundle, self._threads = bundle, threads
        # Its weights packed for the processor, which takes memory of its own; and as they are in the file, which is slower.
        # The one is open at first, the other beside the head that screens; then the first, too, where it is called for again.
        self._packed: providers.Graph | None = self._open()
        self._mapped: providers.Graph | None = None
        self._noted = deque[Array](maxlen=_NOTED)
        self._left = screen_after
        self._screening: _Screening | None = None
        self._tried = self._failed = 0

    def logits(self, states: Array, certain: int | None = None) -> Array:
        """Logits of what the body puts out.

        Args:
            states: float32 [rows, positions, width].
            certain: of how many largest logits at each position the values are needed; all by default. The others may
                be estimates that are less than those.

        Returns:
            float32 [rows, positions, vocabulary].

        Raises:
            BackendError: ONNX Runtime failed, or there isn't the memory.
        """
        flat = states.reshape(-1, states.shape[-1])
        count = screening.candidates(len(flat), certain, self._bundle.config.vocab_size)
        if certain is None or not count:
            return self._all(states)
        if self._left is not None:
            self._noted.extend(flat.copy())
            self._left -= 1
            if self._left < 0:
                self._left = None
                self._begin_to_screen(states)
        if self._screening is None:
            return self._all(states)
        logits, enough = self._screening.logits(flat, certain, count)
        self._tried += 1
        self._failed += not enough
        if not enough:
            logits = self._all(states, seldom=True)
        if self._tried == _TRIED:
            if self._failed > (1 - _LEAST_SUCCESS) * _TRIED:
                _log.info("logits aren't screened any more: estimates of them are too rough")
                self._screening = None
            self._tried = self._failed = 0
        return logits.reshape(*states.shape[:2], -1)

    def _begin_to_screen(self, states: Array) -> None:
        exact = self._all(states)
        noted = np.stack(self._noted)
        self._noted.clear()
        try:
            mapped = self._open(pack=False)
            made = _Screening(self._bundle, noted, self._threads)
            made.check(states, exact)
            self._bundle.check_in_place()  # again: all that was read since the first time is of one bundle
        except Exception as error:  # noqa: BLE001  # whatever it is, the whole head does without this
            _log.info("logits aren't screened: %s", str(error) or type(error).__name__)
        else:
            self._screening, self._mapped, self._packed = made, mapped, None

    def _all(self, states: Array, *, seldom: bool = False) -> Array:
        """All logits in full; where that is seldom called for, weights aren't packed for it."""
        if self._packed is None and not seldom:
            config = self._bundle.config
            try:
                if short := resources.shortage(4 * config.vocab_size * config.n_embd):
                    raise BackendError(f"packing the output head needs about {short}")
                self._packed = self._open()
            except BackendError as error:
                _log.info("logits take longer: %s", error)
                self._packed = self._mapped
        graph = self._packed or self._mapped
        assert graph is not None
        (logits,) = providers.run(graph, [contract.LOGITS], {contract.HIDDEN_STATES: states})
        return logits

    def _open(self, *, pack: bool = True) -> providers.Graph:
        path = self._bundle.folder / HEAD_GRAPH
        self._bundle.check_in_place()
        graph = providers.open_graph(path, devices.CPU, threads=self._threads, name=path, pack=pack, alone=False)
        signature.check_head(self._bundle.config, *providers.declared(graph, path), path)
        return graph


class _Screening:
    """The head that screens, with weights that are made for such states as these, float32 [count, width]."""

    def __init__(self, bundle: Bundle, states: Array, threads: int) -> None:
        path, config = bundle.folder / SCREENING_GRAPH, bundle.config
        size = screening.block_size(config.n_embd)
        if not size:
            raise BundleError(f"{path} can't be for a network {config.n_embd} wide")
        made = screening.Estimates.of(_rows(path, config), config.vocab_size, states, size, threads)
        # The graph reads them where they are, so they are kept.
        self._estimates = made
        weights: dict[str, npt.NDArray[np.generic]] = dict(
            zip(contract.ESTIMATES, (made.rows, made.scales, made.bias), strict=True)
        )
        self._graph = providers.open_graph(path, devices.CPU, threads=threads, name=path, alone=False, weights=weights)
        signature.check_screening_head(config, *providers.declared(self._graph, path), path)

    def logits(self, states: Array, certain: int, count: int) -> tuple[Array, bool]:
        """Logits [positions, vocabulary] of states [positions, width], and whether so many largest ones are exact."""
        logits, highest, margin = self._run(states, count)
        gap = highest[:, certain - 1] - highest[:, -1]
        return logits, bool((gap > 2 * margin).all())

    def check(self, states: Array, exact: Array) -> None:
        """Compares with exact logits: is it the same head, and are estimates off by no more than is known?

        Raises:
            BackendError: they aren't.
        """
        flat = states.reshape(-1, states.shape[-1])
        logits, _, margin = self._run(flat, 1)
        errors = np.abs(logits - exact.reshape(logits.shape)).max(-1)
        if not (errors <= margin).all():
            raise BackendError("estimates are off by more than rounding explains")

    def _run(self, states: Array, count: int) -> tuple[Array, Array, Array]:
        """Logits, the highest estimates, and by how much estimates are off at most at each position."""
        made = self._estimates
        centred = states - made.mean
        balanced = centred * made.balance
        inputs = {
            contract.HIDDEN_STATES: states,
            contract.BALANCED: balanced,
            contract.COMMON: np.dot(centred, made.common)[:, None],
            contract.CANDIDATES: np.array([count]),
        }
        logits, highest = providers.run(self._graph, [contract.LOGITS, contract.HIGHEST], inputs)
        return logits, highest, made.margin(states, balanced)


def _rows(graph: Path, config: GPT2Config) -> screening.Rows:
    """The head's rows, read from the file in which the graph that screens has them.

    Mapped, they would count as memory of this process.
    """
    try:
        location, offset = external_data.place(graph.read_bytes(), contract.HEAD)
    except ValueError as error:
        raise BundleError(f"{graph} can't be used ({error}): export the bundle again") from error
    path, width = graph.parent / location, config.n_embd
    row_bytes = width * np.dtype(np.float32).itemsize
    if not 0 <= offset <= path.stat().st_size - config.vocab_size * row_bytes:
        raise BundleError(f"{path} doesn't hold the output head: export the bundle again")

    def rows(first: int, last: int) -> Array:
        count = (last - first) * width
        return np.fromfile(path, np.float32, count, offset=offset + first * row_bytes).reshape(last - first, width)

    return rows
