"""What a bundle takes on the CPU: threads that are worth their while, and memory.

Knows sizes only, no ONNX Runtime; the factors were measured with version 1.31.
"""

import math
import platform

from ...models.bundle import WIDE_GRAPH, Bundle
from ...models.shapes import weight_shapes
from ..host import resources

# What keeps one core busy: of fewer weights one reads as much as two in the time that it takes them to share the work.
_BYTES_PER_THREAD = 4e6
# Loaded weights as a multiple of the file; a little less than was measured.
_IN_MEMORY = {"fp32": 1.0, "fp16": 2.0, "int8": 1.1, "int4": 1.25}


def threads(bundle: Bundle) -> int:
    """All usable cores, but none for less than so many bytes of weights: threads also wait for one another."""
    worth = max(1, round(_weights(bundle) / _BYTES_PER_THREAD))
    return worth if worth == 1 else min(resources.cores().usable, worth)


def memory(bundle: Bundle) -> int:
    """Bytes that the loaded weights take at the least.

    Measured on GPT-2's 124 million weights, pages of the file aside, which the kernel can drop: fp32 1.0 times the
    file, int8 1.2, int4 1.35, fp16 on x86 2.2. Matrices are packed anew for the kernels, with scales in float32, and x86
    processors compute in fp32. Only what is sure counts: a model that would fit must not be refused.
    """
    dtype = bundle.manifest.dtype
    if dtype == "fp16" and platform.machine() not in ("x86_64", "AMD64"):
        return _weights(bundle)
    return int(_weights(bundle) * _IN_MEMORY[dtype])


def wide_memory(bundle: Bundle) -> int:
    """Bytes that the second graph of a bundle takes besides while it is opened, if there is one: its matrices of 8 bits, twice.

    Measured on GPT-2's 124 million weights: 270 MB, of which 123 MB stay.
    """
    if WIDE_GRAPH not in bundle.manifest.files:
        return 0
    config = bundle.config
    shapes = weight_shapes(config, tied=True)
    matrices = [math.prod(shape) for name, shape in shapes.items() if name.startswith("h.") and len(shape) == 2]
    return 2 * (sum(matrices) + config.vocab_size * config.n_embd)


def _weights(bundle: Bundle) -> int:
    return sum(record.size for name, record in bundle.manifest.files.items() if name.startswith("onnx/"))
