"""The output head by itself, for bundles that have one: all logits in full, or only the largest ones.

It begins in full, and notes what it is given. When it would have been worth it, estimates for such inputs are made of the
head, and from then on it is screened (see `screening`): a fourth of it is read in place of the whole. Where estimates turn out to
be too rough for the network, it goes back for good. Passes are counted, not time, so that a run can be repeated.
"""

import logging
import math
from collections import deque

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, BundleError

from ...models import contract, external_data
from ...models.bundle import BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH, Bundle
from ..host import resources
from ..ort import devices, helper_graphs, providers, signature
from . import screening
from .screening import Array

_log = logging.getLogger(__name__)
# Passes that could have been screened, after which the next one is: making the estimates takes as long as so many save.
WORTH = 96
# So many of the last inputs show what the next ones will be like.
_NOTED = 256
# After so many screened passes it goes on if this share of them was certain; otherwise the whole head was read, too.
_TRIED, _LEAST_SUCCESS = 128, 0.75
# First and last rows of the table that are looked at, and by what share of the largest logit theirs may be off.
_FEW, _CLOSE = 32, 1e-4


def usable(bundle: Bundle, screens: bool | None = None) -> bool:
    """Whether a bundle has its output head by itself, and logits are screened here.

    Args:
        bundle: whose head it is.
        screens: whether they may be; None asks the processor.
    """
    parts = {BODY_GRAPH, HEAD_GRAPH, SCREENING_GRAPH} <= bundle.manifest.files.keys()
    # Where sums of products of bytes overflow, estimates may be off by more than is known.
    return parts and (not resources.sums_of_byte_products_overflow() if screens is None else screens)


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
        # Weights packed for the processor, which takes memory of its own: open at first, and then where all logits are called
        # for again. The table is slower, for the few passes of the head that screens that turn out not to be certain.
        self._packed: providers.Graph | None = self._open()
        self._table: _Table | None = None
        self._can_pack = True
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
            self._bundle.check_in_place()
            table = _Table(self._bundle, self._threads)
            table.check(states, exact)
            self._bundle.check_in_place()  # again: what is mapped belongs to this bundle
            # The packed head's memory serves the estimates.
            self._table, self._packed = table, None
            made = _Screening(self._bundle, table, noted, self._threads)
            made.check(states, exact)
            self._bundle.check_in_place()
        except Exception as error:  # noqa: BLE001  # whatever it is, the whole head does without this
            _log.info("logits aren't screened: %s", str(error) or type(error).__name__)
        else:
            self._screening = made

    def _all(self, states: Array, *, seldom: bool = False) -> Array:
        """All logits in full; where that is seldom called for, weights aren't packed for it."""
        if self._packed is None and self._can_pack and not seldom:
            config = self._bundle.config
            try:
                if short := resources.shortage(4 * config.vocab_size * config.n_embd):
                    raise BackendError(f"packing the output head needs about {short}")
                self._packed = self._open()
            except BackendError as error:
                _log.info("logits take longer: %s", error)
                self._can_pack = False
        if self._packed is None:
            assert self._table is not None
            flat = states.reshape(-1, states.shape[-1])
            return self._table.logits(flat).reshape(*states.shape[:2], -1)
        (logits,) = providers.run(self._packed, [contract.LOGITS], {contract.HIDDEN_STATES: states})
        return logits

    def _open(self) -> providers.Graph:
        path = self._bundle.folder / HEAD_GRAPH
        self._bundle.check_in_place()
        graph = providers.open_graph(path, devices.CPU, threads=self._threads, name=path, alone=False)
        self._bundle.check_in_place()
        signature.check_head(self._bundle.config, *providers.declared(graph, path), path)
        return graph


class _Table:
    """The head's rows as they lie in the bundle's file, mapped once for all that reads them.

    Attributes:
        rows: float32 [vocabulary, width].
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        graph, config = bundle.folder / HEAD_GRAPH, bundle.config
        parts = external_data.places(graph.read_bytes())
        shape = config.vocab_size, config.n_embd
        if sum(part.length for part in parts) != 4 * math.prod(shape):
            raise BundleError(f"{graph} isn't the output head that config.json describes")
        # One after another, as `check` will see.
        self._path, self._offset = graph.parent / parts[0].location, min(part.offset for part in parts)
        self.rows = np.memmap(self._path, np.float32, "r", self._offset, shape)
        name = "a graph of the output head"
        self._graph = providers.open_graph(
            helper_graphs.products(), devices.CPU, threads=threads, name=name, alone=False
        )

    def check(self, states: Array, exact: Array) -> None:
        """Compares some rows' products with logits: are they the head's?

        Raises:
            BackendError: they aren't.
        """
        flat = states.reshape(-1, states.shape[-1])
        expected = exact.reshape(len(flat), -1)
        # Not from all over: with each row far more around it would be mapped.
        for some in (slice(_FEW), slice(-_FEW, None)):
            errors = np.abs(flat @ self.rows[some].T - expected[:, some])
            if errors.max() > _CLOSE * np.abs(expected).max():
                raise BackendError(f"{self._path} doesn't hold the output head")

    def logits(self, states: Array) -> Array:
        """All logits [positions, vocabulary] of states [positions, width], more slowly than by weights that are packed."""
        (logits,) = providers.run(self._graph, ["products"], {"x": states, "rows": self.rows})
        return logits

    def read(self, first: int, last: int) -> Array:
        """Rows from one number up to another, read from the file: what is mapped counts as memory of this process."""
        width = self.rows.shape[1]
        count, offset = (last - first) * width, self._offset + 4 * first * width
        return np.fromfile(self._path, np.float32, count, offset=offset).reshape(last - first, width)


class _Screening:
    """The head that screens, with weights that are made for such states as these, float32 [count, width]."""

    def __init__(self, bundle: Bundle, table: _Table, states: Array, threads: int) -> None:
        path, config = bundle.folder / SCREENING_GRAPH, bundle.config
        size = screening.block_size(config.n_embd)
        if not size:
            raise BundleError(f"{path} can't be for a network {config.n_embd} wide")
        rounded, estimates = screening.round_head(table.read, config.vocab_size, states, size, threads)
        weights = dict[str, npt.NDArray[np.generic]](zip(contract.ESTIMATES, rounded, strict=True))
        self._table, self._estimates = table, estimates
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
            contract.HEAD: self._table.rows,
        }
        logits, highest = providers.run(self._graph, [contract.LOGITS, contract.HIGHEST], inputs)
        return logits, highest, made.margin(states, balanced)
