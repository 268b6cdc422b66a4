"""Array types of the runtime."""

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
