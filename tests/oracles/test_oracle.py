"""The MicroAdam oracle against facts that can be computed without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest

from tests.oracles.microadam import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    AdamOracle,
    Floats,
    MicroAdamOracle,
    adam_stats,
    encode,
    largest_magnitudes,
    rounded,
)

B1, B2 = 0.9, 0.999
FOREVER = 10**6  # Steps after which both bias corrections are 1 in float64.


def gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


def amplification(window: list[float], step: int) -> float:
    """Size of the update of a coordinate with these window values, newest first."""
    rows = [np.array(value) for value in window]
    squares = [row**2 for row in rows]
    return float(adam_stats(B1, rows, step) / np.sqrt(adam_stats(B2, squares, step)))


# --- AdamStats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "published"),
    [(10, 1.0), (20, 1.05), (50, 1.45), (100, 2.01), (300, 3.32), (1000, 5.19), (3000, 6.36)],
)
def test_a_persistent_coordinate_is_amplified_as_published(step: int, published: float) -> None:
    weight = [(1 - beta**10) / (1 - beta**step) for beta in (B1, B2)]
    measured = amplification([1.0] * 10, step)
    assert measured == pytest.approx(weight[0] / math.sqrt(weight[1]), rel=1e-12)
    assert measured == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize(
    ("length", "limit"), [(5, 5.80), (10, 6.53), (20, 6.24), (50, 4.50), (100, 3.24)]
)
def test_amplification_limits_of_other_windows(length: int, limit: float) -> None:
    assert amplification([1.0] * length, FOREVER) == pytest.approx(limit, abs=0.005)


@pytest.mark.parametrize(
    ("step", "peak", "life"),
    [(10, 0.48, 3.2), (20, 0.51, 3.3), (100, 0.98, 6.4), (1000, 2.51, 16.4), (FOREVER, 3.16, 20.6)],
)
def test_a_single_hit_moves_its_coordinate_as_published(
    step: int, peak: float, life: float
) -> None:
    aged = [amplification(list(np.eye(10)[age]), step) for age in range(10)]
    assert aged[0] == pytest.approx(peak, abs=0.005)
    assert sum(aged) == pytest.approx(life, abs=0.05)


def test_the_oracle_walks_the_amplification_table() -> None:
    oracle = MicroAdamOracle(np.zeros(()), block_size=1, count=1, learning_rate=1.0)
    updates = [float(oracle.step(1.0)) for _ in range(300)]
    np.testing.assert_allclose(updates[:10], -1.0, rtol=1e-6)
    np.testing.assert_allclose(
        [-updates[step - 1] for step in (20, 50, 100, 300)],
        [amplification([1.0] * 10, step) for step in (20, 50, 100, 300)],
        rtol=1e-7,
    )


@pytest.mark.parametrize("step", [1, 3, 10, 11, 25])
def test_ages_are_those_of_a_ring_indexed_from_zero(step: int) -> None:
    history, length = gaussian(step, 4), 10
    ring = np.zeros((length, 4))
    for written, values in enumerate(history):
        ring[written % length] = values
    filled = range(min(step, length))
    total = sum(B1 ** ((step - 1 - row) % length) * ring[row] for row in filled)
    newest_first = list(history[::-1][:length])
    np.testing.assert_allclose(
        adam_stats(B1, newest_first, step), (1 - B1) * total / (1 - B1**step), rtol=1e-12
    )


def test_normalized_weights_equal_the_literal_ones_until_the_window_is_full() -> None:
    rows = [np.array(value) for value in (3.0, -1.0, 2.0)]
    both = [adam_stats(B1, rows, 3, normalized=choice) for choice in (False, True)]
    assert both[0] == pytest.approx(both[1], rel=1e-12)
    assert adam_stats(B1, [np.array(1.0)] * 10, 500, normalized=True) == pytest.approx(1.0)


# --- Adam --------------------------------------------------------------------------------------


def test_density_one_without_quantization_is_adam_until_the_window_is_full() -> None:
    knobs = {"learning_rate": 0.1, "weight_decay": 0.01}
    micro = MicroAdamOracle(gaussian(3, 8), block_size=4, count=4, quantize=False, **knobs)
    adam = AdamOracle(gaussian(3, 8), **knobs)
    for gradient in gaussian(micro.window, 3, 8, seed=1):
        np.testing.assert_allclose(micro.step(gradient), adam.step(gradient), rtol=1e-12)
    last = gaussian(3, 8, seed=2)
    assert not np.allclose(micro.step(last), adam.step(last), rtol=1e-2)


def test_adam_is_the_adamw_of_optax() -> None:
    def schedule(step: int) -> float:
        return 0.1 / (1 + step)

    start = gaussian(6).astype(np.float32)
    oracle = AdamOracle(start, learning_rate=schedule, weight_decay=0.05)
    reference = optax.adamw(schedule, weight_decay=0.05)
    params, state = start, reference.init(start)
    for gradient in gaussian(20, 6, seed=1).astype(np.float32):
        updates, state = reference.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        oracle.step(gradient)
    np.testing.assert_allclose(oracle.theta, params, rtol=2e-4, atol=2e-6)


# --- Selection and error feedback --------------------------------------------------------------


def test_the_first_step_is_the_sign_of_the_selected() -> None:
    oracle = MicroAdamOracle(np.zeros((2, 6)), block_size=6, count=2, learning_rate=1.0)
    gradient = np.array([[1.0, -5.0, 0.0, 2.0, -3.0, 0.5], [0.0, 0.0, 9.0, 0.0, 0.0, -7.0]])
    expected = [[0, 1, 0, 0, 1, 0], [0, 0, -1, 0, 0, 1]]
    np.testing.assert_allclose(oracle.step(gradient), expected, atol=1e-7)
    assert [list(indices) for indices in oracle.selections[0]] == [[1, 4], [2, 5]]


def test_ties_go_to_the_lowest_index() -> None:
    assert list(largest_magnitudes(np.array([1.0, -2.0, 2.0, 0.0, -2.0]), 2)) == [1, 2]
    assert list(largest_magnitudes(np.zeros(4), 2)) == [0, 1]


@pytest.mark.parametrize("length", [20, 64, 256])
def test_selection_contracts(length: int) -> None:
    values, count = gaussian(length), 5
    left = values.copy()
    left[largest_magnitudes(values, count)] = 0
    assert left @ left <= (1 - count / length) * (values @ values)


def test_nothing_is_lost_without_quantization() -> None:
    oracle = MicroAdamOracle(np.zeros((2, 40)), block_size=16, count=1, quantize=False, window=1)
    gradients = gaussian(200, 2, 40)
    sent = np.zeros((2, 40))
    for gradient in gradients:
        oracle.step(gradient)
        sent += oracle.rows[0]
    np.testing.assert_allclose(gradients.sum(0), sent + oracle.error, atol=1e-12)


def test_nothing_is_lost_through_alpha() -> None:
    oracle = MicroAdamOracle(np.zeros(30), block_size=30, count=2, quantize=False, alpha=0.25)
    plain = MicroAdamOracle(np.zeros(30), block_size=30, count=2, quantize=False)
    gradient = gaussian(30)
    densified = (plain.step(gradient) - oracle.step(gradient)) / oracle.learning_rate
    np.testing.assert_allclose(densified + oracle.error, plain.error, atol=1e-12)
    np.testing.assert_allclose(densified, 0.25 * plain.error, atol=1e-12)


def test_alpha_sends_and_reencodes_the_decoded_error() -> None:
    oracle = MicroAdamOracle(np.zeros(32), block_size=32, count=3, bucket=16, alpha=0.5)
    plain = MicroAdamOracle(np.zeros(32), block_size=32, count=3, bucket=16)
    gradient = gaussian(32)
    densified = (plain.step(gradient) - oracle.step(gradient)) / oracle.learning_rate
    np.testing.assert_allclose(densified, 0.5 * plain.error, atol=1e-12)
    fresh = [encode(half).decode() for half in np.split(0.5 * plain.error, 2)]
    np.testing.assert_array_equal(oracle.error, np.concatenate(fresh))


def test_unused_rows_stay_untouched() -> None:
    start = gaussian(4, 32)
    oracle = MicroAdamOracle(start, block_size=32, count=1, bucket=16)
    for gradient in gaussian(20, 4, 32, seed=1):
        gradient[2] = 0
        oracle.step(gradient)
    np.testing.assert_array_equal(oracle.theta[2], start[2])


# --- Quantizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7, 32, 64, 1024])
@pytest.mark.parametrize("draw", [np.asarray, np.exp, np.tan], ids=["normal", "skewed", "heavy"])
def test_the_quantizer_meets_its_bounds(size: int, draw: Callable[[Floats], Floats]) -> None:
    bucket = draw(gaussian(size, seed=size))
    low, high = bucket.min(), bucket.max()
    decoded = encode(bucket).decode()
    slack = 1e-12 * np.abs(bucket).max()
    assert np.abs(decoded - bucket).max() <= (high - low) / 30 + slack
    np.testing.assert_allclose([decoded.min(), decoded.max()], [low, high], rtol=0, atol=slack)
    omega = math.sqrt(size - 2) / 15 * (high - low) / math.hypot(high, low)
    assert np.linalg.norm(decoded - bucket) <= 0.5 * omega * np.linalg.norm(bucket) + slack


def test_halves_round_up() -> None:
    assert list(encode(np.array([0.0, 0.5, 1.5, 2.5, 15.0])).levels) == [0, 1, 2, 3, 15]


@pytest.mark.parametrize("value", [0.0, -3.25, 0.1])
def test_a_constant_bucket_decodes_to_its_value(value: float) -> None:
    np.testing.assert_array_equal(encode(np.full(5, value)).decode(), value)


def test_levels_are_clamped_when_rounded_statistics_lie_inside_the_data() -> None:
    bucket = 100 + np.linspace(0.05, 1.2, 16)
    codes = encode(bucket, BFLOAT16)
    unclamped = np.floor((bucket - codes.low) / codes.unit + 0.5)
    assert unclamped.max() > 15
    assert codes.levels.max() == 15


@pytest.mark.parametrize(("dtype", "bound"), [(FLOAT64, 0.0), (FLOAT32, 2**-24), (BFLOAT16, 2**-8)])
def test_rounding_is_to_nearest(dtype: np.dtype[Any], bound: float) -> None:
    values = gaussian(100)
    assert np.all(np.abs(rounded(values, dtype) - values) <= bound * np.abs(values))


# --- Shapes ------------------------------------------------------------------------------------


def test_ragged_blocks_and_buckets_are_shorter_ones() -> None:
    oracle = MicroAdamOracle(np.zeros((2, 11)), block_size=4, count=lambda n: -(-n // 2), bucket=3)
    gradient = gaussian(2, 11)
    oracle.step(gradient)
    assert [len(indices) for indices in oracle.selections[0]] == [2, 2, 2] * 2
    tail = MicroAdamOracle(np.zeros(3), block_size=3, count=2, bucket=3)
    tail.step(gradient[0, 8:])
    np.testing.assert_array_equal(oracle.error[0, 8:], tail.error)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 4), (1,), (2, 3, 5)])
def test_any_shape_is_a_leaf(shape: tuple[int, ...]) -> None:
    oracle = MicroAdamOracle(
        np.ones(shape), block_size=4, count=1, value_dtype=BFLOAT16, statistics_dtype=FLOAT32
    )
    for gradient in gaussian(3, *shape):
        assert oracle.step(gradient).shape == shape
    assert oracle.error.shape == oracle.theta.shape == shape
    assert np.isfinite(oracle.theta).all()
