"""One weight of GPT2LMHeadModel, read from the arrays that a checkpoint stores of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import CheckpointError

from .arrays import FLOATS, StoredArray


@dataclass(frozen=True)
class Weight:
    """One weight and the stored arrays that it is made of.

    Attributes:
        parts: joined along the last axis, a matrix's outputs.
        transposed: whether the parts are stored [out, in], as torch.nn.Linear has them. GPT2LMHeadModel has [in, out].
    """

    parts: tuple[StoredArray, ...]
    transposed: bool = False

    def check(self, expected: tuple[int, ...]) -> None:
        """Checks that the parts make a weight of the expected shape.

        Raises:
            CheckpointError: a part has another shape, or isn't floating-point.
        """
        wanted = (*expected[:-1], expected[-1] // len(self.parts))[:: -1 if self.transposed else 1]
        for part in self.parts:
            if part.shape != wanted:
                raise CheckpointError(
                    f"{part.path}: tensor {part.name} has shape {list(part.shape)}, the configuration asks for {list(wanted)}"
                )
            if part.dtype not in FLOATS:
                raise CheckpointError(
                    f"{part.path}: tensor {part.name} holds {part.dtype}, not floating-point numbers:"
                    " export the checkpoint that it was quantised or converted from"
                )

    def read(self) -> npt.NDArray[np.float32]:
        """The weight in float32."""
        arrays = [part.read().T if self.transposed else part.read() for part in self.parts]
        if len(arrays) == 1:
            return np.ascontiguousarray(arrays[0], dtype=np.float32)
        return np.concatenate(arrays, axis=-1, dtype=np.float32)

    def equals(self, other: "Weight") -> bool:
        """Whether both hold the same numbers. Arrays at the same place in the same file aren't read."""
        if (self.transposed, len(self.parts)) != (other.transposed, len(other.parts)):
            return np.array_equal(self.read(), other.read())
        pairs = zip(self.parts, other.parts, strict=True)  # in their own types: 16-bit ones take half the memory
        return all(mine == its or np.array_equal(mine.read(), its.read()) for mine, its in pairs)
