"""Runner: one forward pass of a bundle's network, in place on the KV cache.

Knows neither text nor strategies.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, OptionError

from ...models import contract, limits
from ...models.bundle import RAGGED_GRAPH, TWIN_GRAPH, Bundle
from ..arrays import Float32Array, Int64Array, Logits
from ..host import resources
from ..ort import binding, devices, providers, signature
from . import graphs
from .kv_cache import HostStorage, KVCache, check_memory
from .second_graph import OPEN_AFTER, SecondGraph, pays

# Most tokens per row of a pass whose bound arrays are kept: prompts rarely have the same length twice.
_KEPT_TOKENS = 16
_KEPT_BYTES = 64 << 20  # of the logits of all passes that are kept, the last one aside


@dataclass(frozen=True)
class _Pass:
    """Arrays bound to a graph for passes of one shape."""

    binding: binding.Binding
    inputs: dict[str, Int64Array]
    output: Logits
    hidden: npt.NDArray[np.floating] | None = None


class Runner:
    """A bundle's network, loaded on a device.

    Args:
        bundle: the bundle to load.
        device: "cpu", "cuda", the name of another execution provider, or "auto": CUDA where it loads and runs this
            bundle, else the CPU.
        threads: of one operator; by default the cores that this process may use, fewer for very small models.
        wide_after: tokens after which the bundle's second graph is opened, if it has one for this device; those in prompts
            and batches count. 0: at once. None: never.
        alone: whether no other network runs between its passes; otherwise its threads don't wait for the next one in a loop.
        twin: load the bundle's quantised twin, on the CPU; in fp32 it can work in caches of the network itself.

    Attributes:
        device: what it runs on, as the argument would name it.
        threads: of one operator.
        has_twin: whether the bundle has a twin for this device.

    Raises:
        OptionError: `threads` is below 1 or above `limits.THREADS`, `wide_after` below 0, or the device is unknown.
        BundleError: a graph isn't the one that config.json describes.
        BackendError: the device doesn't load or doesn't run this bundle, or ONNX Runtime can't load the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        wide_after: int | None = OPEN_AFTER,
        alone: bool = True,
        twin: bool = False,
    ) -> None:
        if threads is not None:
            limits.check_at_least(1, threads=threads)
            if threads > limits.THREADS:
                raise OptionError(
                    f"threads must be at most {limits.THREADS:,}, not {threads}: more than cores are no faster"
                )
        if wide_after is not None:
            limits.check_at_least(0, wide_after=wide_after)
        self.config = bundle.config
        self.dtype = np.dtype(np.float16 if bundle.manifest.dtype == "fp16" and not twin else np.float32)
        self._cache_dtype = np.dtype(np.int8) if bundle.cache_dtype == "int8" else self.dtype
        self.threads = threads or graphs.threads(bundle)
        if twin:
            self._graph, provider, file = graphs.load_twin(bundle, self.threads)
        else:
            self._graph, provider, file = graphs.load(bundle, device, self.threads, alone=alone)
        self.device = devices.device_name(provider)
        self._ragged = file in (RAGGED_GRAPH, TWIN_GRAPH)
        self._in_place = bundle.manifest.graph != "portable"
        # The device's own memory, where the cache is kept in it.
        self._memory = devices.MEMORY.get(provider) if self._in_place else None
        self._storage = binding.device_storage(provider, self._memory, self.dtype) if self._memory else HostStorage
        inputs, outputs = providers.declared(self._graph, path := bundle.path(file))
        signature.check(bundle, self.dtype, inputs, outputs, path, ragged=self._ragged)
        self._inputs = list(inputs)
        self._second_graph = None
        if file == RAGGED_GRAPH and wide_after is not None and pays(bundle):
            self._second_graph = SecondGraph(bundle, self.threads, wide_after)
        self._has_hidden = contract.HIDDEN in outputs
        self._hidden: list[npt.NDArray[np.floating]] = []
        self.has_twin = bundle.has_twin and file == RAGGED_GRAPH
        # Of the cache that passed last. A weak dictionary would swallow a Ctrl-C that comes while it drops an entry.
        self._passes: dict[tuple[object, ...], _Pass] = {}
        self._bound_cache: weakref.ref[KVCache] | None = None

    def open_second_graph(self) -> None:
        """Opens the second graph now, if there is one and it isn't open.

        Raises:
            BundleError: it isn't the graph that config.json describes.
            BackendError: it takes more memory than there is, or ONNX Runtime can't load it.
        """
        if self._second_graph is not None:
            self._second_graph.open()

    def check_memory(self, rows: int, positions: int, reserved: int = 0) -> None:
        """Checks that sequences fit into memory.

        Args:
            rows: sequences.
            positions: tokens of each.
            reserved: bytes of a cache that serves again.

        Raises:
            OptionError: their cache and logits don't fit; says how much is missing and what to lower.
        """
        config = self.config
        itemsize = self._cache_dtype.itemsize if self._memory is None else 0
        cache = 2 * config.n_layer * config.n_embd * positions * itemsize
        needed = rows * (cache + config.vocab_size * np.dtype(np.float32).itemsize)
        check_memory(rows, positions, max(0, needed - reserved))

    def check_hidden(self) -> None:
        """Raises OptionError if passes don't return hidden states."""
        if not self._has_hidden:
            raise OptionError(
                f"contrastive search needs hidden states, which the bundle doesn't return on {self.device}: export it again,"
                " and run it on the CPU with ONNX Runtime 1.32 or newer",
                "penalty_alpha",
            )

    def new_cache(self, rows: int, positions: int) -> KVCache:
        """An empty cache.

        Raises:
            OptionError: it doesn't fit into memory.
        """
        config = self.config
        shape = (config.n_layer, 2, rows, config.n_head, positions, config.head_size)
        try:
            return KVCache(shape, self._cache_dtype, self._storage)
        except MemoryError as error:
            needed = resources.in_words(math.prod(shape) * self._cache_dtype.itemsize)
            raise OptionError(
                f"no memory for a cache of {needed} ({rows} sequences of {positions} tokens):"
                " lower the batch size, the beams or the length"
            ) from error

    def forward(
        self,
        cache: KVCache,
        rows: slice,
        tokens: Int64Array,
        counts: Int64Array | None = None,
        logits: Literal["last", "all"] = "last",
    ) -> Logits:
        """Computes the next tokens of cache rows.

        Args:
            cache: from `new_cache`.
            rows: of the cache, contiguous.
            tokens: [rows, longest], right-padded.
            counts: [rows], valid tokens of each row; 0 leaves a row as it is; None: all are valid.
            logits: of each row's last valid token, or of all valid tokens.

        Returns:
            [positions, vocab], row by row. Overwritten by the next call.

        Raises:
            BundleError: the second graph, opened now, isn't the one that config.json describes.
            BackendError: ONNX Runtime failed.
        """
        if counts is None:
            counts = np.full(len(tokens), tokens.shape[1], np.int64)
        if self._ragged:
            run, parts = self._run_ragged, _fitting_parts(cache, rows, tokens, counts)
        else:
            run, parts = self._run_masked, _equal_parts(cache, rows, tokens, counts)
            run = run if self._in_place else self._run_copying
        self._hidden.clear()
        found = run(cache, *next(parts), logits)
        for part in parts:
            found = np.concatenate([found, run(cache, *part, logits)])
        return _finite(found)

    @property
    def hidden(self) -> Float32Array:
        """Hidden states [positions, width] behind the final layer norm, from which the last pass computed its logits."""
        return np.concatenate(self._hidden, dtype=np.float32)

    def _run_ragged(self, cache: KVCache, rows: slice, tokens: Int64Array, counts: Int64Array, logits: str) -> Logits:
        """A pass of `contract`'s second form: each row brings its own number of tokens."""
        count, longest = tokens.shape
        begins, used = longest * np.arange(count), counts > 0
        if logits == "last":
            at = (begins + counts - 1)[used]
        else:
            at = np.concatenate([np.arange(begin, begin + n) for begin, n in zip(begins, counts, strict=True)])
        graph = (self._second_graph and self._second_graph.take(tokens.size, len(at))) or self._graph
        past = cache.advance(rows, counts)

        def made() -> _Pass:
            inputs = {
                contract.INPUT_IDS: np.zeros((count, longest), np.int64),
                contract.PAST_LENGTHS: np.zeros(count, np.int64),
                contract.COUNTS: np.zeros(count, np.int64),
                contract.LOGITS_AT: np.zeros(len(at), np.int64),
            }
            return self._bound(graph, cache, rows, inputs, (len(at), 1))

        one = self._kept_pass(cache, (graph is self._graph, rows.start, rows.stop, longest, len(at)), longest, made)
        for name, values in zip(one.inputs, (tokens, past, counts, at), strict=True):
            one.inputs[name][:] = values
        one.binding.run()
        if one.hidden is not None:
            self._hidden.append(one.hidden[:, 0])
        return one.output[:, 0]

    def _run_masked(self, cache: KVCache, rows: slice, tokens: Int64Array, counts: Int64Array, logits: str) -> Logits:
        """A pass of the interchange graph, over rows as `_equal_parts` gives them."""
        count, longest = tokens.shape
        past = cache.advance(rows, counts)
        # Without a past, padding counts as valid in the mask: no token looks at later ones, and GroupQueryAttention
        # then knows that there is no past. Otherwise the mask is as wide as the cache and never has to grow.
        fresh = longest > 1 and not past.any()
        ends, width = (np.full(count, longest), longest) if fresh else (past + counts, cache.positions)
        keep = longest if logits == "all" else 1 + int(longest - counts.min())

        def made() -> _Pass:
            inputs = {
                contract.INPUT_IDS: np.zeros((count, longest), np.int64),
                contract.POSITION_IDS: np.zeros((count, longest), np.int64),
                contract.ATTENTION_MASK: np.zeros((count, width), np.int64),
                contract.LOGITS_TO_KEEP: np.array([keep]),
            }
            return self._bound(self._graph, cache, rows, inputs, (count, keep))

        one = self._kept_pass(cache, (rows.start, rows.stop, longest, keep, width), longest, made)
        values = {
            contract.INPUT_IDS: tokens,
            contract.POSITION_IDS: past[:, None] + np.arange(longest),
            contract.ATTENTION_MASK: (np.arange(width) < ends[:, None]).astype(np.int64),
        }
        if self._memory is not None:  # on the device, a mask just as wide as needed keeps attention short
            values[contract.ATTENTION_MASK] = values[contract.ATTENTION_MASK][:, : ends.max()]
        for name, array in values.items():
            if self._memory is None:
                one.inputs[name][:] = array
            else:
                one.binding.copy_input(name, np.ascontiguousarray(array))
        one.binding.run()
        return _chosen(one.output, counts - (longest - keep), logits)

    def _run_copying(self, cache: KVCache, rows: slice, tokens: Int64Array, counts: Int64Array, logits: str) -> Logits:
        """As `_run_masked`, on a graph that returns keys and values in arrays of its own, past and new ones.

        It appends behind the longest row's past; positions between a shorter row's past and that are masked.
        """
        longest, past = tokens.shape[1], cache.advance(rows, counts)
        width = int(past.max(initial=0))
        in_use = (np.arange(width) < past[:, None]).astype(np.int64)
        inputs: dict[str, npt.NDArray[np.generic]] = {
            contract.INPUT_IDS: tokens,
            contract.ATTENTION_MASK: np.concatenate([in_use, np.ones_like(tokens)], axis=1),
            contract.POSITION_IDS: past[:, None] + np.arange(longest),
        }
        names = [contract.LOGITS]
        for layer in range(self.config.n_layer):
            for part, name in enumerate(contract.past_names(layer)):
                inputs[name] = cache.data[layer, part, rows, :, :width]
            names += contract.present_names(layer)
        output, *present = providers.run(self._graph, names, {name: inputs[name] for name in self._inputs})
        for index, array in enumerate(present):
            layer, part = divmod(index, 2)
            for row, (length, count) in enumerate(zip(past, counts, strict=True)):
                new = array[row, :, width : width + count]
                cache.data[layer, part, rows.start + row, :, length : length + count] = new
        return _chosen(output, counts, logits)

    def _kept_pass(self, cache: KVCache, key: tuple[object, ...], longest: int, made: Callable[[], _Pass]) -> _Pass:
        if self._bound_cache is None or self._bound_cache() is not cache:
            self._passes.clear()
            self._bound_cache = weakref.ref(cache)
        key += (cache.storage.base,)
        known = self._passes.pop(key, None)
        one = known or made()
        if longest <= _KEPT_TOKENS:
            self._passes[key] = one  # behind those that were used earlier
            if known is None:
                self._drop_passes()
        return one

    def _drop_passes(self) -> None:
        """Drops the passes that weren't used for longest, until the others fit into `_KEPT_BYTES`."""
        size = sum(each.output.nbytes for each in self._passes.values())
        while size > _KEPT_BYTES and len(self._passes) > 1:
            size -= self._passes.pop(next(iter(self._passes))).output.nbytes

    def _bound(
        self, graph: providers.Graph, cache: KVCache, rows: slice, inputs: dict[str, Int64Array], shape: tuple[int, int]
    ) -> _Pass:
        output = np.zeros((*shape, self.config.vocab_size), np.float32)
        bound = binding.Binding(graph)
        for each, array in inputs.items():
            bound.bind_input(each, array)
        bound.bind_output(contract.LOGITS, output)
        hidden = np.zeros((*shape, self.config.n_embd), self.dtype) if self._has_hidden else None
        if hidden is not None:
            bound.bind_output(contract.HIDDEN, hidden)
        cached = [rows.stop - rows.start, self.config.n_head, cache.positions, self.config.head_size]
        for layer in range(self.config.n_layer):
            names = zip(contract.past_names(layer), contract.present_names(layer), strict=True)
            for part, pair in enumerate(names):
                address = cache.address(layer, part, rows.start)
                bound.bind_in_place(pair, self._memory or "cpu", self._cache_dtype, cached, address)
        return _Pass(bound, inputs, output, hidden)


_Part = tuple[slice, Int64Array, Int64Array]  # rows, tokens and counts of a pass


def _fitting_parts(cache: KVCache, rows: slice, tokens: Int64Array, counts: Int64Array) -> Iterator[_Part]:
    """Cuts a pass into those that GroupQueryAttention takes: also a row's padding has to fit into the cache behind its past."""
    # GroupQueryAttention takes a row of no tokens at all for one of a single token.
    past, first = np.maximum(cache.lengths[rows], counts == 0), 0
    if past.max() + tokens.shape[1] <= cache.positions:
        yield rows, tokens, counts
        return
    while first < len(counts):
        last = first + 1
        while last < len(counts) and past[first : last + 1].max() + counts[first : last + 1].max() <= cache.positions:
            last += 1
        if (some := counts[first:last]).any():
            yield slice(rows.start + first, rows.start + last), tokens[first:last, : some.max()], some
        first = last


def _equal_parts(cache: KVCache, rows: slice, tokens: Int64Array, counts: Int64Array) -> Iterator[_Part]:
    """Cuts a pass into those that the interchange graph can make: one token a row, no past, or one row."""
    past, first, stop = cache.lengths[rows], 0, len(counts)
    while first < stop:
        if counts[first] == 0:
            first += 1
            continue
        last = first + 1
        same = (counts == 1) if counts[first] == 1 else (counts > 0) & (past == 0)
        while last < stop and same[first] and same[last]:
            last += 1
        some = counts[first:last]
        yield slice(rows.start + first, rows.start + last), tokens[first:last, : some.max()], some
        first = last


def _chosen(output: Logits, ends: Int64Array, logits: str) -> Logits:
    """Of an output [rows, positions, width], the last position before each row's end, or all before it, [positions, width]."""
    if logits == "last":
        if (ends == output.shape[1]).all():
            return output[:, -1]
        last: Logits = output[np.arange(len(output)), ends - 1]
        return last
    return np.concatenate([row[:end] for row, end in zip(output, ends, strict=True)])


def _finite(logits: Logits) -> Logits:
    """The logits; raises BackendError if one is NaN, which nothing can be chosen from."""
    # NaN counts as the largest. After a pass the processor's caches hold no code, so that each function of NumPy takes
    # long the first time: greedy search goes on with argmax.
    flat = logits.reshape(-1)
    if not math.isfinite(flat[flat.argmax()]):
        raise BackendError(
            "the network's output is not a number: its weights are damaged, or too large for its precision"
            " ('gpt2onnx verify' tells the former, an export in fp32 helps with the latter)"
        )
    return logits
