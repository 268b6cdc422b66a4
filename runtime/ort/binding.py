"""IO binding: arrays that a graph reads and writes in place, and keys and values in a device's memory."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ..arrays import CacheCopy, CacheShape
from . import forks, helper_graphs, providers

# After providers, whose error says how to install it.
import onnxruntime as ort  # isort: skip


class Binding:
    """Inputs and outputs bound to memory, for passes of one shape.

    Args:
        graph: reads and writes them.
    """

    def __init__(self, graph: providers.Graph) -> None:
        self._graph = graph
        self._io = graph.io_binding()
        # An OrtValue shares its array's memory without keeping the array alive, nor does the binding keep the OrtValue.
        self._kept: list[object] = []

    def bind_input(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Binds an array in host memory; what it holds at the time of `run` counts."""
        self._io.bind_ortvalue_input(name, self._value(array))

    def bind_output(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Binds an array in host memory, which `run` overwrites."""
        self._io.bind_ortvalue_output(name, self._value(array))

    def copy_input(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Copies an array to the graph's device now."""
        self._io.bind_cpu_input(name, array)

    def bind_in_place(
        self, names: tuple[str, str], device: str, dtype: npt.DTypeLike, shape: Sequence[int], address: int
    ) -> None:
        """Binds one memory as an input and an output: the graph appends to it, and nothing is copied."""
        self._io.bind_input(names[0], device, 0, dtype, shape, address)
        self._io.bind_output(names[1], device, 0, dtype, shape, address)

    def run(self) -> None:
        """Runs the graph.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        forks.check(self._graph)
        try:
            self._graph.run_with_iobinding(self._io)
        except Exception as error:
            raise providers.failure("ONNX Runtime failed", error) from error

    def _value(self, array: npt.NDArray[np.generic]) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._kept += [array, value]
        return value


class DeviceStorage:
    """Keys and values in a device's memory, moved there by a small graph: row numbers go to the device, no content.

    Args:
        mover: the graph `helper_graphs.rearrangement`.
        device: ONNX Runtime's name of it.
        shape: [layer, key or value, row, head, position, size].
        dtype: of keys and values.
    """

    def __init__(self, mover: providers.Graph, device: str, shape: CacheShape, dtype: npt.DTypeLike) -> None:
        self._mover, self._device, self._shape, self._dtype = mover, device, shape, np.dtype(dtype)
        # Zeros: attention gives positions that aren't in use no weight, and no weight times NaN is NaN.
        self._memory = ort.OrtValue.ortvalue_from_numpy(np.zeros(max(1, math.prod(shape)), dtype), device, 0)
        self._spare: ort.OrtValue | None = None
        self.base = int(self._memory.data_ptr())

    def copy(self, copies: Sequence[CacheCopy]) -> None:
        """Copies whole rows to a second memory; nobody reads what lies beyond the copied positions."""
        rows = np.arange(self._shape[2])
        rows[[one.target for one in copies]] = [one.source for one in copies]
        if self._spare is None:
            size = [math.prod(self._shape)]
            self._spare = ort.OrtValue.ortvalue_from_shape_and_type(size, self._dtype, self._device, 0)
        self._move(self, rows, self._spare)
        self._memory, self._spare = self._spare, self._memory
        self.base = int(self._memory.data_ptr())

    def take_over(self, smaller: "DeviceStorage", rows: int) -> None:
        """Copies the first rows of a smaller storage."""
        if rows:
            chosen = np.zeros(self._shape[2], np.int64)
            chosen[:rows] = np.arange(rows)
            self._move(smaller, chosen, self._memory)

    def _move(self, source: "DeviceStorage", rows: npt.NDArray[np.int64], target: ort.OrtValue) -> None:
        """Writes these rows of the source, each lengthened by zeros."""
        layers, parts, count, heads, positions, size = source._shape
        longer = self._shape[4] * size
        place = (self._device, 0, self._dtype)
        forks.check(self._mover)
        io = self._mover.io_binding()
        io.bind_input("data", *place, [layers * parts, count, heads, positions * size], source.base)
        io.bind_cpu_input("rows", rows)
        io.bind_cpu_input("pads", np.array([0] * 7 + [longer - positions * size]))
        io.bind_output("moved", *place, [layers * parts, len(rows), heads, longer], target.data_ptr())
        try:
            self._mover.run_with_iobinding(io)
        except Exception as error:
            raise providers.failure("ONNX Runtime failed", error) from error


def device_storage(provider: str, device: str, dtype: npt.DTypeLike) -> partial[DeviceStorage]:
    """A constructor of storages in the memory of a provider's device."""
    graph = helper_graphs.rearrangement(dtype)
    mover = providers.open_graph(graph, provider, threads=1, name="a graph that moves the cache")
    return partial(DeviceStorage, mover, device)
