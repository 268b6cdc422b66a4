"""Array types of the runtime."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Token ids, int64 [length] or [rows, length].
Tokens = npt.NDArray[np.int64]
# Numbers of tokens, rows or places, int64.
Int64Array = npt.NDArray[np.int64]
# Hidden states, [positions, width].
Float32Array = npt.NDArray[np.float32]
# Logits or scores, float32 [vocab] or [rows, vocab].
Logits = npt.NDArray[np.float32]
# Of a KV cache: [layer, key or value, row, head, position, size].
CacheShape = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class CacheCopy:
    """A cache row's positions from `start` to before `end`, to be copied to the same positions of another row."""

    source: int
    target: int
    start: int
    end: int
