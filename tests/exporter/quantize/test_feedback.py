"""Matrices rounded in blocks, to nearest or with feedback, and what that does to outputs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2onnx.exporter.graph.blocks import QuantizedMatrix, dequantize, quantize
from gpt2onnx.exporter.quantize.activations import Moments
from gpt2onnx.exporter.quantize.feedback import quantize_with_feedback


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_error_is_no_larger_than_that_of_plain_rounding(
    seed: int, rows: int, width: int, bits: int, block_size: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    quantized = quantize(matrix, bits, block_size)
    blocks = -(-width // block_size)
    assert quantized.data.shape == (rows, blocks, block_size * bits // 8)
    assert quantized.scales.shape == (rows, blocks)
    found = dequantize(quantized)
    assert found.shape == matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, blocks * block_size - width))).reshape(rows, blocks, block_size)
    step = np.abs(padded).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    plain = np.rint(padded / np.where(step == 0, 1, step)) * step
    error, plain_error = ((found - matrix) ** 2).sum(), ((plain - padded) ** 2).sum()
    assert error <= plain_error * (1 + 1e-5) + 1e-12, f"squared error {error:.4g}, plain rounding has {plain_error:.4g}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_feedback_lowers_the_error_of_what_was_not_calibrated_with(bits: int, block_size: int) -> None:
    """Inputs of 90 numbers that come from 30; error of the outputs for others of the same kind."""
    random = np.random.default_rng(bits)
    mixing = random.standard_normal((30, 90))

    def inputs(count: int) -> np.ndarray:
        return random.standard_normal((count, 30)) @ mixing + 0.1 * random.standard_normal((count, 90))

    matrix = random.standard_normal((50, 90)).astype(np.float32)
    covariance = np.cov(inputs(2000).T).astype(np.float32)
    others = inputs(500)

    def error(quantized: QuantizedMatrix) -> float:
        return float((((dequantize(quantized) - matrix) @ others.T) ** 2).mean())

    nearest, fed_back = (
        error(quantize(matrix, bits, block_size)),
        error(quantize_with_feedback(matrix, bits, block_size, covariance)),
    )
    assert fed_back < 0.3 * nearest, f"mean squared error {fed_back:.3g}, rounding to nearest has {nearest:.3g}"


@pytest.mark.parametrize("bits", [4, 8])
def test_feedback_without_correlations_is_rounding_to_nearest(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    plain = quantize(matrix, bits, 16)
    fed_back = quantize_with_feedback(matrix, bits, 16, np.diag(np.full(40, 3.0, np.float32)))
    np.testing.assert_array_equal(fed_back.scales, plain.scales.astype(np.float16))  # in which they are stored
    # What lies halfway between two values may go either way, since scales are refitted after rounding.
    moved = np.abs(dequantize(fed_back) - matrix).sum() / np.abs(dequantize(plain) - matrix).sum()
    assert moved <= 1 + 1e-3


def test_feedback_between_rows_lowers_what_errors_cost() -> None:
    """Outputs whose gradients are those of a few directions; cost for other inputs and gradients of the same kind."""
    random = np.random.default_rng(0)
    mixing, directions = random.standard_normal((30, 90)), random.standard_normal((12, 50))

    def of(mixed: np.ndarray, count: int) -> np.ndarray:
        noise = 0.1 * random.standard_normal((count, mixed.shape[1]))
        return random.standard_normal((count, len(mixed))) @ mixed + noise

    matrix = random.standard_normal((50, 90)).astype(np.float32)
    covariance = np.cov(of(mixing, 2000).T).astype(np.float32)
    seen = of(directions, 2000)
    gradients = (seen.T @ seen / len(seen)).astype(np.float32)
    inputs, others = of(mixing, 500), of(directions, 500)

    def cost(*given: np.ndarray) -> float:
        errors = inputs @ (dequantize(quantize_with_feedback(matrix, 4, 32, *given)) - matrix).T
        return float(((errors @ others.T) ** 2).mean())

    alone, together = cost(covariance), cost(covariance, gradients)
    assert together < 0.4 * alone, f"cost {together:.4g}, with rows on their own {alone:.4g}"


def test_the_last_row_makes_up_for_the_others() -> None:
    """With 8 bits it comes close to what is best for it, after rows of 4 bits that say the same of the output."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((16, 48)).astype(np.float32)
    matrix[-1] = 0
    gradients = np.ones((16, 16), np.float32) + 1e-3 * np.eye(16, dtype=np.float32)
    found = dequantize(quantize_with_feedback(matrix, 4, 16, np.eye(48, dtype=np.float32), gradients))
    errors = matrix - found
    # The damping, 0.2 of the variance, leaves the last row 1 / 1.2 of the sum to take on itself, and it rounds that.
    best = errors[:-1].sum(0) / 1.2
    assert np.abs(found[-1] - best).max() < 0.6 * np.abs(best).max() / 7
    rest = np.abs(errors[:-1].sum(0)).mean()
    plain = np.abs(
        (matrix - dequantize(quantize_with_feedback(matrix, 4, 16, np.eye(48, dtype=np.float32)))).sum(0)
    ).mean()
    assert rest < plain, f"errors add up to {rest:.3g}, with rows on their own to {plain:.3g}"


def test_independent_rows_are_rounded_on_their_own() -> None:
    random = np.random.default_rng(0)
    matrix = random.standard_normal((35, 40)).astype(np.float32)
    covariance = np.cov(random.standard_normal((300, 40)).T).astype(np.float32)
    alone = quantize_with_feedback(matrix, 4, 16, covariance)
    for gradients in (np.diag(random.uniform(1, 9, 35)), np.zeros((35, 35))):
        found = quantize_with_feedback(matrix, 4, 16, covariance, gradients.astype(np.float32))
        np.testing.assert_array_equal(found.scales, alone.scales)
        np.testing.assert_array_equal(found.data, alone.data)


def test_feedback_heeds_constant_and_dead_inputs() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    for covariance in (np.zeros((32, 32)), np.ones((32, 32))):
        found = dequantize(quantize_with_feedback(matrix, 4, 16, covariance.astype(np.float32)))
        assert np.isfinite(found).all()
        assert np.abs(found - matrix).max() < 1


def test_fitted_weights_make_up_for_inputs_that_are_off() -> None:
    """Inputs that depend on each other reach the matrix with errors; outputs for others of the same kind."""
    random = np.random.default_rng(0)
    mixing, weight = random.standard_normal((10, 40)), random.standard_normal((40, 20)).astype(np.float32)
    errors = 0.3 * random.standard_normal((40, 40)) / math.sqrt(40)

    def inputs(count: int) -> tuple[np.ndarray, np.ndarray]:
        exact = random.standard_normal((count, 10)) @ mixing + 0.5
        return exact, exact + exact @ errors + 0.1 * random.standard_normal((count, 40)) + 0.2

    exact, found = inputs(4000)
    moments = Moments.of(found.astype(np.float32), (exact @ weight).astype(np.float32))
    fitted = moments.fitted(weight)
    exact, found = inputs(1000)
    before = np.square(found @ weight - exact @ weight).mean()
    after = np.square(found @ fitted + moments.bias(fitted) - exact @ weight).mean()
    assert after < 0.1 * before, f"mean squared error {after:.3g}, with the weight as it was {before:.3g}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("matrix", [np.zeros((3, 40)), np.full((2, 33), -7.5), np.eye(20), np.full((1, 1), 3e-30)])
def test_matrices_that_need_no_rounding_come_back(matrix: np.ndarray, bits: int) -> None:
    matrix = matrix.astype(np.float32)
    np.testing.assert_allclose(dequantize(quantize(matrix, bits, 16)), matrix, rtol=1e-6, atol=0)
