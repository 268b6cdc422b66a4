"""The forward pass, in place on the cache.

Knows neither text nor strategies. Beside `runtime.providers` the only importer of onnxruntime, whose errors it wraps.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, OptionError

from ...models import contract
from ...models.bundle import BODY_GRAPH, GRAPH, WIDE_GRAPH, Bundle
from ..host import resources
from ..ort import devices, providers, signature
from . import footprint, head
from .kv_cache import Cache, Copy, HostStorage, Shape, check_room
from .second_graph import WORTH, WideGraph

# First, since it says what to do where onnxruntime isn't installed.

import onnxruntime as ort  # isort: skip

_log = logging.getLogger(__name__)
# Buffers of a forward pass over more tokens than this belong to one prompt and aren't kept.
_KEPT_SEQUENCE = 16


@dataclass(frozen=True)
class _Binding:
    """Arrays that ONNX Runtime reads and writes in place, for one choice of rows and lengths."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    # Logits, or what an output head by itself makes them of.
    output: npt.NDArray[np.float32]
    io: ort.IOBinding
    # An OrtValue shares its array's memory without keeping the array alive, nor does the binding keep the OrtValue.
    values: list[object]


class Session:
    """A bundle's graph, loaded on a device.

    Args:
        bundle: the bundle to load.
        device: "cpu", "cuda", the name of another execution provider, or "auto": CUDA where it loads and runs this
            bundle, else the CPU.
        threads: of one operator; by default as many as this process may use, fewer for very small models.
        wide_after: tokens in passes of many after which these go through the bundle's second graph, if it has one for
            this device; 0 opens it right away, None never.
        screen_after: passes for searches that need few logits after which the others are estimated, if the bundle has
            its output head by itself; None never.
        screens: whether they may be estimated; None: where the processor adds up products of bytes exactly.

    Attributes:
        device: what it runs on, as the argument would name it.
        threads: of one operator.

    Raises:
        OptionError: `threads` is below 1, `wide_after` or `screen_after` below 0, or the device is unknown.
        BundleError: a graph isn't the one that config.json describes.
        BackendError: the device isn't there, doesn't load, or doesn't run this bundle; the weights don't fit into
            memory; or ONNX Runtime can't load the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        wide_after: int | None = WORTH,
        screen_after: int | None = head.WORTH,
        screens: bool | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads must be at least 1, not {threads}")
        if wide_after is not None and wide_after < 0:
            raise OptionError(f"wide_after must be at least 0, not {wide_after}")
        if screen_after is not None and screen_after < 0:
            raise OptionError(f"screen_after must be at least 0, not {screen_after}")
        self.config = bundle.config
        self.dtype = np.dtype(np.float16 if bundle.manifest.dtype == "fp16" else np.float32)
        self.threads = threads or footprint.threads(bundle)
        self._graph, provider = _load(bundle, device, self.threads, screens)
        self.device = devices.device_name(provider)
        self._in_place = bundle.manifest.graph != "portable"
        # The device's own memory, where the cache is kept in it.
        self._memory = devices.MEMORY.get(provider) if self._in_place else None
        self._storage = device_storage(provider, self._memory, self.dtype) if self._memory else HostStorage
        name = _file(bundle, provider, screens)
        path = bundle.folder / name
        inputs, outputs = providers.declared(self._graph, path)
        floats = "tensor(float16)" if self.dtype == np.float16 else "tensor(float)"
        self._head = head.OutputHead(bundle, self.threads, screen_after) if name == BODY_GRAPH else None
        signature.check(self.config, floats, inputs, outputs, path, body=self._head is not None)
        self._inputs = list(inputs)
        offered = provider == devices.CPU and WIDE_GRAPH in bundle.manifest.files
        self._wide = WideGraph(bundle, self.threads, wide_after) if offered and wide_after is not None else None

    def open_wide(self) -> None:
        """Opens the second graph now, if there is one and it isn't open.

        Raises:
            BundleError: it isn't the graph that config.json describes.
            BackendError: it takes more memory than there is, or ONNX Runtime can't load it.
        """
        if self._wide is not None:
            self._wide.open()

    def check_room(self, rows: int, positions: int, held: int = 0) -> None:
        """Refuses what can't fit into memory: the cache of so many sequences of so many tokens, and their logits.

        Args:
            rows: sequences.
            positions: tokens in each.
            held: bytes that a cache takes already, which serves again.

        Raises:
            OptionError: with the numbers, and what to lower.
        """
        config = self.config
        cache = 2 * config.n_layer * config.n_embd * positions * self.dtype.itemsize if self._memory is None else 0
        needed = rows * (cache + config.vocab_size * np.dtype(np.float32).itemsize)
        check_room(rows, positions, max(0, needed - held))

    def new_cache(self, rows: int, positions: int) -> Cache:
        """An empty cache for so many sequences of so many tokens.

        Raises:
            OptionError: there isn't as much memory.
        """
        config = self.config
        shape = (config.n_layer, 2, rows, config.n_head, positions, config.head_size)
        try:
            return Cache(shape, self.dtype, self._storage)
        except MemoryError as error:
            needed = resources.in_words(math.prod(shape) * self.dtype.itemsize)
            raise OptionError(
                f"no memory for a cache of {needed} ({rows} sequences of {positions} tokens):"
                " lower the batch size, the beams or the length"
            ) from error

    def forward(
        self,
        cache: Cache,
        rows: slice,
        tokens: npt.NDArray[np.int64],
        keep: int = 1,
        lengths: npt.NDArray[np.int64] | None = None,
        certain: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Runs the next tokens of each row through the network, and takes them into the cache.

        Args:
            cache: from `new_cache`.
            rows: of the cache, one after another; where they have a past, either one row or one token in each.
            tokens: int64 [rows, count].
            keep: of how many last tokens of each row the logits are wanted.
            lengths: int64 [rows], how many of each row's tokens count, where the rows have no past; the others are
                padding, which nothing looks at. All of them by default.
            certain: of how many largest logits at each position the values are needed; all by default. The others may
                be estimates that are less than those.

        Returns:
            Logits, float32 [rows, keep, vocabulary]; the array may be overwritten by the next call of this shape.

        Raises:
            BundleError: the second graph, opened now, isn't the one that config.json describes.
            BackendError: ONNX Runtime failed.
        """
        if not self._in_place:
            return self._forward_copying(cache, rows, tokens, keep, lengths)
        graph = (self._wide and self._wide.take(tokens.size)) or self._graph
        positions = cache.advance(rows, tokens.shape[1], lengths)
        padding = 0 if lengths is None else int(tokens.shape[1] - lengths.min())
        binding = self._binding(graph, cache, rows, tokens.shape[1], keep + padding, padded=lengths is not None)
        if self._memory is None:
            binding.input_ids[:] = tokens
            binding.position_ids[:] = positions
        else:
            # What a device is to read is copied there when it is bound, so it is bound anew for each pass.
            binding.io.bind_cpu_input(contract.INPUT_IDS, tokens)
            binding.io.bind_cpu_input(contract.POSITION_IDS, positions)
            if lengths is None:
                used = int(cache.lengths[rows].max())
                binding.io.bind_cpu_input(contract.ATTENTION_MASK, cache.mask[rows, :used].copy())
        try:
            graph.run_with_iobinding(binding.io)
        except Exception as error:
            raise providers.failure("ONNX Runtime failed", error) from error
        output = binding.output if lengths is None else _last(binding.output, tokens.shape[1] - lengths, keep)
        return _finite(self._head.logits(output, certain) if self._head else output)

    def _forward_copying(
        self,
        cache: Cache,
        rows: slice,
        tokens: npt.NDArray[np.int64],
        keep: int,
        lengths: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.float32]:
        """As `forward`, on a graph that returns keys and values in arrays of its own, past and new ones.

        It appends behind the longest row's past; what lies between a shorter row's past and that is masked.
        """
        count, pasts = tokens.shape[1], cache.lengths[rows].copy()
        past = int(pasts.max(initial=0))
        ones = np.ones((len(tokens), count), np.int64)
        inputs = {
            contract.INPUT_IDS: tokens,
            contract.ATTENTION_MASK: np.concatenate([cache.mask[rows, :past], ones], axis=1),
            contract.POSITION_IDS: cache.advance(rows, count, lengths),
        }
        names = [contract.LOGITS]
        for layer in range(self.config.n_layer):
            for part, name in enumerate(contract.past_names(layer)):
                inputs[name] = cache.data[layer, part, rows, :, :past]
            names += contract.present_names(layer)
        logits: npt.NDArray[np.float32]
        logits, *present = providers.run(self._graph, names, {name: inputs[name] for name in self._inputs})
        for index, array in enumerate(present):
            layer, part = divmod(index, 2)
            for row, length in enumerate(pasts):
                cache.data[layer, part, rows.start + row, :, length : length + count] = array[row, :, past:]
        return _finite(logits[:, -keep:] if lengths is None else _last(logits, count - lengths, keep))

    def _binding(
        self, graph: providers.Graph, cache: Cache, rows: slice, count: int, keep: int, *, padded: bool
    ) -> _Binding:
        # GroupQueryAttention takes several tokens in several rows where the mask is as wide: then there is no past. Padding
        # takes part, as no token looks at later ones: left out, it would be computed from memory that nobody has written
        # (up to ONNX Runtime 1.26), which may be NaN and which inputs rounded with one scale would all suffer from.
        if padded:
            return self._bind(graph, cache, rows, count, keep, np.ones((rows.stop - rows.start, count), np.int64))
        key = (graph is self._graph, rows.start, rows.stop, count, keep, cache.storage.base)
        binding = cache.bindings.get(key)
        if binding is None:
            # As wide as the cache: its ones say how far each row reaches, so it never has to grow.
            binding = self._bind(graph, cache, rows, count, keep, cache.mask[rows])
            if count <= _KEPT_SEQUENCE:
                cache.bindings[key] = binding
        return binding

    def _bind(
        self,
        graph: providers.Graph,
        cache: Cache,
        rows: slice,
        count: int,
        keep: int,
        mask: npt.NDArray[np.int64],
    ) -> _Binding:
        batch = rows.stop - rows.start
        input_ids = np.zeros((batch, count), np.int64)
        position_ids = np.zeros((batch, count), np.int64)
        name, width = (
            (contract.LOGITS, self.config.vocab_size)
            if self._head is None
            else (contract.HIDDEN_STATES, self.config.n_embd)
        )
        output = np.zeros((batch, keep, width), np.float32)
        io = graph.io_binding()
        values: list[object] = []

        def value(array: npt.NDArray[np.generic]) -> ort.OrtValue:
            ort_value = ort.OrtValue.ortvalue_from_numpy(array)
            values.extend((array, ort_value))
            return ort_value

        io.bind_ortvalue_input(contract.INPUT_IDS, value(input_ids))
        io.bind_ortvalue_input(contract.POSITION_IDS, value(position_ids))
        io.bind_ortvalue_input(contract.ATTENTION_MASK, value(mask))
        io.bind_ortvalue_input(contract.LOGITS_TO_KEEP, value(np.array([keep], np.int64)))
        io.bind_ortvalue_output(name, value(output))
        shape = [batch, self.config.n_head, cache.positions, self.config.head_size]
        for layer in range(self.config.n_layer):
            names = zip(contract.past_names(layer), contract.present_names(layer), strict=True)
            for part, (past, present) in enumerate(names):
                # The same memory as input and output: the graph appends to it and nothing is copied.
                shared = (self._memory or "cpu", 0, self.dtype, shape, cache.address(layer, part, rows.start))
                io.bind_input(past, *shared)
                io.bind_output(present, *shared)
        return _Binding(input_ids, position_ids, output, io, values)


class _DeviceStorage:
    """Keys and values in a device's memory, where a small graph moves them: numbers of rows go there, no content."""

    def __init__(self, mover: providers.Graph, device: str, shape: Shape, dtype: npt.DTypeLike) -> None:
        self._mover, self._device, self._shape, self._dtype = mover, device, shape, np.dtype(dtype)
        # Zeros, since attention gives what isn't in use no weight, and no weight times NaN is NaN.
        self._memory = ort.OrtValue.ortvalue_from_numpy(np.zeros(max(1, math.prod(shape)), dtype), device, 0)
        self._spare: ort.OrtValue | None = None
        self.base = int(self._memory.data_ptr())

    def copy(self, copies: Sequence[Copy]) -> None:
        # Whole rows, to a second memory: what a row holds beyond the copied positions is in nobody's use.
        rows = np.arange(self._shape[2])
        rows[[one.target for one in copies]] = [one.source for one in copies]
        if self._spare is None:
            size = [math.prod(self._shape)]
            self._spare = ort.OrtValue.ortvalue_from_shape_and_type(size, self._dtype, self._device, 0)
        self._move(self, rows, self._spare)
        self._memory, self._spare = self._spare, self._memory
        self.base = int(self._memory.data_ptr())

    def take_over(self, smaller: "_DeviceStorage", rows: int) -> None:
        if rows:
            chosen = np.zeros(self._shape[2], np.int64)
            chosen[:rows] = np.arange(rows)
            self._move(smaller, chosen, self._memory)

    def _move(self, source: "_DeviceStorage", rows: npt.NDArray[np.int64], target: ort.OrtValue) -> None:
        """Writes these rows of the source, each lengthened by zeros."""
        layers, parts, count, heads, positions, size = source._shape
        longer = self._shape[4] * size
        place = (self._device, 0, self._dtype)
        io = self._mover.io_binding()
        io.bind_input("data", *place, [layers * parts, count, heads, positions * size], source.base)
        io.bind_cpu_input("rows", rows)
        io.bind_cpu_input("pads", np.array([0] * 7 + [longer - positions * size]))
        io.bind_output("moved", *place, [layers * parts, len(rows), heads, longer], target.data_ptr())
        try:
            self._mover.run_with_iobinding(io)
        except Exception as error:
            raise providers.failure("ONNX Runtime failed", error) from error


def device_storage(provider: str, device: str, dtype: npt.DTypeLike) -> functools.partial[_DeviceStorage]:
    """Makes storages in the memory of a provider's device."""
    from ..ort import helper_graphs

    graph = helper_graphs.rearrangement(dtype)
    mover = providers.open_graph(graph, provider, threads=1, name="a graph that moves the cache")
    return functools.partial(_DeviceStorage, mover, device)


def _load(bundle: Bundle, device: str, threads: int, screens: bool | None) -> tuple[providers.Graph, str]:
    """The bundle's graph on a device, and the provider that it runs on."""
    *better, last = providers.candidates(device)
    for provider in better:
        try:
            if reason := devices.unsuited(provider, bundle.manifest):
                raise BackendError(reason)
            return _load_on(provider, bundle, threads, screens), provider
        except BackendError as error:
            _log.info("not on %s: %s", devices.device_name(provider), error)
    if reason := devices.unsuited(last, bundle.manifest):
        # Another export is no help where the device doesn't work at all.
        why = providers.why_not(last)
        raise devices.not_loaded(last, why) if why else BackendError(reason)
    return _load_on(last, bundle, threads, screens), last


def _load_on(provider: str, bundle: Bundle, threads: int, screens: bool | None) -> providers.Graph:
    if provider == devices.CPU and (short := resources.shortage(footprint.memory(bundle))):
        raise BackendError(f"{bundle.folder} needs about {short}: free some, or export with fewer bits (--dtype)")
    name = _file(bundle, provider, screens)
    graph = bundle.folder / name
    return providers.open_graph(graph, provider, threads=threads, name=graph, alone=name != BODY_GRAPH)


def _file(bundle: Bundle, provider: str, screens: bool | None) -> str:
    """The graph that is for this provider."""
    return BODY_GRAPH if provider == devices.CPU and head.usable(bundle, screens) else GRAPH


def _last(output: npt.NDArray[np.float32], padding: npt.NDArray[np.int64], keep: int) -> npt.NDArray[np.float32]:
    """The last `keep` positions of each row before its padding."""
    ends = output.shape[1] - padding[:, None]
    last: npt.NDArray[np.float32] = output[np.arange(len(output))[:, None], ends + np.arange(-keep, 0)]
    return last


def _finite(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The logits, which no search could choose from if they were no numbers."""
    # NaN counts as the largest, too. After a pass no code is in the processor's caches any more, so that each function of
    # NumPy takes long the first time: greedy search goes on with this one.
    flat = logits.reshape(-1)
    if not math.isfinite(flat[flat.argmax()]):
        raise BackendError(
            "the network's output is not a number: its weights are damaged, or too large for its precision"
            " ('gpt2onnx verify' tells the former, an export in fp32 helps with the latter)"
        )
    return logits
