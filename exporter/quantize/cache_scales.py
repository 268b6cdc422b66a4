"""Scales of a key-value cache in 8 bits, of the keys and values that a network computes for random tokens."""

import numpy as np

from ...models.bundle import Bundle
from ...runtime.engine.runner import Runner
from ..graph.blocks import Array

_TOKENS = 4096
# Other texts go beyond the largest value by a fifth on average. On `tales` the divergence is least with this much room;
# texts that the network writes itself give no better scales than random tokens (docs/export.md).
_ROOM = 1.25
_LARGEST = 127
_LEAST_SHARE = 2**-10  # of a layer's largest scale, for channels that are 0 or nearly so


def measure(bundle: Bundle) -> Array:
    """The scale of each channel of keys and values, float32 [layer, 2, head, size]: a value is about scale * int8.

    Raises:
        BackendError: ONNX Runtime can't load or run the graph, or its output isn't a number.
        OptionError: there isn't the memory for a cache.
    """
    runner, random = Runner(bundle, wide_after=None), np.random.default_rng(0)
    config = bundle.config
    length = min(config.n_positions, _TOKENS)
    cache = runner.new_cache(1, length)
    largest = np.zeros((config.n_layer, 2, config.n_head, config.head_size), np.float32)
    for _ in range(-(-_TOKENS // length)):
        cache.trim(0, 0)
        runner.forward(cache, slice(0, 1), random.integers(config.vocab_size, size=(1, length)))
        largest = np.maximum(largest, np.abs(cache.data).max(axis=(2, 4)))
    scales = largest * np.float32(_ROOM / _LARGEST)
    least = scales.max(axis=(2, 3), keepdims=True) * np.float32(_LEAST_SHARE)
    bounded: Array = np.maximum(scales, np.maximum(least, np.finfo(np.float32).tiny))
    return bounded
