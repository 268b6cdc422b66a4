"""The forward pass, in place on the cache; the only importer of onnxruntime.

Knows neither text nor strategies. onnxruntime's errors are wrapped here, once.
"""

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BackendError, MissingExtraError, OptionError

from ..models import contract
from ..models.bundle import GRAPH, Bundle
from .cache import Cache

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingExtraError("Generating", "onnxruntime", "cpu") from error

_WARNINGS_OFF = 3  # onnxruntime's severity "error"
# Buffers of a forward pass over more tokens than this belong to one prompt and aren't kept.
_KEPT_SEQUENCE = 16
# What one core reads in the time that it takes to share an operator's work with another.
_BYTES_PER_THREAD = 8e6


@dataclass(frozen=True)
class _Binding:
    """Arrays that ONNX Runtime reads and writes in place, for one choice of rows and lengths."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    io: ort.IOBinding
    # An OrtValue shares its array's memory without keeping the array alive, nor does the binding keep the OrtValue.
    values: list[object]


class Session:
    """A bundle's graph, loaded on a device.

    Args:
        bundle: the bundle to load.
        device: "cpu".
        threads: of one operator; by default as many as this process may use, fewer for very small models.

    Raises:
        OptionError: `threads` is below 1, or the device is unknown.
        BackendError: ONNX Runtime can't load the graph.
    """

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise OptionError(f"threads must be at least 1, not {threads}")
        if device not in ("cpu", "auto"):
            raise OptionError(f"device must be cpu or auto, not {device!r}")
        self.config = bundle.config
        self._in_place = bundle.manifest.graph != "portable"
        self.dtype = np.dtype(np.float16 if bundle.manifest.dtype == "fp16" else np.float32)
        options = ort.SessionOptions()
        options.log_severity_level = _WARNINGS_OFF
        options.intra_op_num_threads = threads or _suitable_threads(bundle)
        try:
            self._session = ort.InferenceSession(bundle.folder / GRAPH, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime can't load {bundle.folder / GRAPH}: {_one_line(error)}") from error
        self._inputs = [each.name for each in self._session.get_inputs()]

    def new_cache(self, rows: int, positions: int) -> Cache:
        """An empty cache for so many sequences of so many tokens."""
        config = self.config
        return Cache((config.n_layer, 2, rows, config.n_head, positions, config.head_size), self.dtype)

    def forward(
        self, cache: Cache, rows: slice, tokens: npt.NDArray[np.int64], keep: int = 1
    ) -> npt.NDArray[np.float32]:
        """Runs the next tokens of each row through the network, and takes them into the cache.

        Args:
            cache: from `new_cache`.
            rows: of the cache, one after another; only one where more than one token is given.
            tokens: int64 [rows, count].
            keep: of how many last positions the logits are wanted.

        Returns:
            Logits, float32 [rows, keep, vocabulary]; the array is overwritten by the next call of this shape.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        if not self._in_place:
            return self._forward_copying(cache, rows, tokens, keep)
        binding = self._binding(cache, rows, tokens.shape[1], keep)
        binding.input_ids[:] = tokens
        binding.position_ids[:] = cache.advance(rows, tokens.shape[1])
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {_one_line(error)}") from error
        return binding.logits

    def _forward_copying(
        self, cache: Cache, rows: slice, tokens: npt.NDArray[np.int64], keep: int
    ) -> npt.NDArray[np.float32]:
        """As `forward`, on a graph that returns keys and values in arrays of its own, past and new ones.

        It appends behind the longest row's past; what lies between a shorter row's past and that is masked.
        """
        count, lengths = tokens.shape[1], cache.lengths[rows].copy()
        past = int(lengths.max(initial=0))
        ones = np.ones((len(tokens), count), np.int64)
        inputs = {
            contract.INPUT_IDS: tokens,
            contract.ATTENTION_MASK: np.concatenate([cache.mask[rows, :past], ones], axis=1),
            contract.POSITION_IDS: cache.advance(rows, count),
        }
        names = [contract.LOGITS]
        for layer in range(self.config.n_layer):
            for part, name in enumerate(contract.past_names(layer)):
                inputs[name] = cache.data[layer, part, rows, :, :past]
            names += contract.present_names(layer)
        try:
            outputs = self._session.run(names, {name: inputs[name] for name in self._inputs})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {_one_line(error)}") from error
        logits: npt.NDArray[np.float32]
        logits, *present = (np.asarray(each) for each in outputs)
        for index, array in enumerate(present):
            layer, part = divmod(index, 2)
            for row, length in enumerate(lengths):
                cache.data[layer, part, rows.start + row, :, length : length + count] = array[row, :, past:]
        return logits[:, -keep:]

    def _binding(self, cache: Cache, rows: slice, count: int, keep: int) -> _Binding:
        key = (rows.start, rows.stop, count, keep)
        binding = cache.bindings.get(key)
        if binding is None:
            binding = self._bind(cache, rows, count, keep)
            if count <= _KEPT_SEQUENCE:
                cache.bindings[key] = binding
        return binding

    def _bind(self, cache: Cache, rows: slice, count: int, keep: int) -> _Binding:
        batch = rows.stop - rows.start
        input_ids = np.zeros((batch, count), np.int64)
        position_ids = np.zeros((batch, count), np.int64)
        logits = np.zeros((batch, keep, self.config.vocab_size), np.float32)
        io = self._session.io_binding()
        values: list[object] = []

        def value(array: npt.NDArray[np.generic]) -> ort.OrtValue:
            ort_value = ort.OrtValue.ortvalue_from_numpy(array)
            values.extend((array, ort_value))
            return ort_value

        io.bind_ortvalue_input(contract.INPUT_IDS, value(input_ids))
        io.bind_ortvalue_input(contract.POSITION_IDS, value(position_ids))
        # The mask is as wide as the cache: its ones say how far each row reaches, so it never has to grow.
        io.bind_ortvalue_input(contract.ATTENTION_MASK, value(cache.mask[rows]))
        io.bind_ortvalue_input(contract.LOGITS_TO_KEEP, value(np.array([keep], np.int64)))
        io.bind_ortvalue_output(contract.LOGITS, value(logits))
        for layer in range(self.config.n_layer):
            names = zip(contract.past_names(layer), contract.present_names(layer), strict=True)
            for part, (past, present) in enumerate(names):
                # The same memory as input and output: the graph appends to it and nothing is copied.
                shared = value(cache.data[layer, part, rows])
                io.bind_ortvalue_input(past, shared)
                io.bind_ortvalue_output(present, shared)
        return _Binding(input_ids, position_ids, logits, io, values)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _suitable_threads(bundle: Bundle) -> int:
    """All cores, but none for less than so many bytes of weights: threads also wait for one another."""
    weights = sum(record.size for name, record in bundle.manifest.files.items() if name.startswith("onnx/"))
    return max(1, min(available_cores(), round(weights / _BYTES_PER_THREAD)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
