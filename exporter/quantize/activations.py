"""Activation statistics of a network's layers. Knows no runtime."""

from dataclasses import dataclass

import numpy as np

from ..graph.blocks import Array
from .feedback import damping

SAMPLE_ROWS = 256  # inputs of a layer that are kept as they are


@dataclass(frozen=True)
class InputStats:
    """Activation statistics of a linear layer's input.

    Attributes:
        mean: float32 [in].
        sample: some of the inputs, float32 [rows, in], evenly from all texts and positions.
    """

    mean: Array
    sample: Array


@dataclass(frozen=True)
class Moments:
    """Moments of a layer's inputs in the quantised network, and of its outputs in the fp32 network, over texts.

    Attributes:
        mean: of the inputs, float32 [in].
        covariance: of the inputs, float32 [in, in].
        target: mean of the fp32 outputs, float32 [out].
        cross: covariance of the inputs with the fp32 outputs, float32 [in, out].
        sample: some of the inputs, float32 [rows, in].
    """

    mean: Array
    covariance: Array
    target: Array
    cross: Array
    sample: Array

    @classmethod
    def of(cls, inputs: Array, outputs: Array) -> "Moments":
        """The moments of inputs [count, in] and outputs [count, out]."""
        mean, target, count = inputs.mean(0), outputs.mean(0), np.float32(len(inputs))
        # Means are taken off first: beside large ones float32 would lose what varies.
        centred = inputs - mean
        covariance, cross = centred.T @ centred / count, centred.T @ (outputs - target) / count
        # An odd step meets all positions of texts whose length is a power of two.
        return cls(mean, covariance, target, cross, inputs[:: -(-len(inputs) // SAMPLE_ROWS) | 1].copy())

    def are_finite(self) -> bool:
        """Whether no sum has overflowed."""
        return bool(np.isfinite(self.covariance).all() and np.isfinite(self.cross).all())

    def fitted(self, weight: Array) -> Array:
        """The matrix [in, out] whose outputs for these inputs come closest to the fp32 outputs.

        That is ridge regression, drawn towards the fp32 weight instead of towards zero.
        """
        damped = self.covariance.astype(np.float64)
        added = damping(self.covariance)
        damped[np.diag_indices_from(damped)] += added
        try:
            fitted: Array = np.linalg.solve(damped, self.cross + added * weight.astype(np.float64)).astype(np.float32)
        except np.linalg.LinAlgError:
            return weight
        return fitted

    def bias(self, weight: Array) -> Array:
        """The bias [out] that gives the outputs of a weight [in, out] their fp32 mean."""
        mean: Array = self.mean @ weight
        return self.target - mean
