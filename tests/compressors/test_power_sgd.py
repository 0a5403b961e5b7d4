import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import compress, error_feedback, to_dense
from microadam_jax.compressors import LowRank, power_sgd
from tests.oracles.efcp import PowerSgdOracle

pytestmark = pytest.mark.usefixtures("fewer_optimizations")


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "stacked", "matrices"),
    [((12, 20), "", (12, 20)), ((3, 4, 20), "", (12, 20)), ((2, 3, 4, 10), "^w", (2, 12, 10))],
)
def test_follows_the_oracle(
    shape: tuple[int, ...], stacked: str, matrices: tuple[int, ...]
) -> None:
    """Leading axes are rows, and a stack of layers is one matrix for each."""
    tx = optax.chain(error_feedback(power_sgd(2, stacked), "float32"), to_dense())
    params = {"w": jnp.zeros(shape)}
    state, update = tx.init(params), jax.jit(tx.update)
    layers = math.prod(matrices[:-2])
    rows, columns = matrices[-2:]
    first = np.asarray(state[0].carried.right["w"], np.float64).reshape(layers, columns, 2)
    oracles = [PowerSgdOracle(right, np.zeros((rows, columns))) for right in first]
    for step in range(6):
        gradient = draw(shape, step)
        sent, state = update({"w": jnp.asarray(gradient)}, state, params)
        expected = [
            oracle.step(matrix)
            for oracle, matrix in zip(oracles, gradient.reshape(layers, rows, columns), strict=True)
        ]
        np.testing.assert_allclose(
            np.reshape(sent["w"], (layers, rows, columns)), expected, atol=5e-5
        )


def test_repeated_steps_find_the_best_approximation() -> None:
    gradient = draw((12, 20)) + 5 * np.outer(draw((12,), 1), draw((20,), 2))
    tx = optax.chain(compress(power_sgd(1)), to_dense())
    state, update = tx.init(jnp.zeros((12, 20))), jax.jit(tx.update)
    for _ in range(20):
        sent, state = update(jnp.asarray(gradient), state)
    left, sizes, right = np.linalg.svd(gradient)
    np.testing.assert_allclose(sent, sizes[0] * np.outer(left[:, 0], right[0]), atol=1e-3)


def test_a_zero_gradient_does_not_stop_the_iteration() -> None:
    tx = optax.chain(compress(power_sgd(1)), to_dense())
    gradient = jnp.outer(jnp.arange(1.0, 7.0), jnp.ones(8))
    state, update = tx.init(gradient), jax.jit(tx.update)
    nothing, state = update(jnp.zeros_like(gradient), state)
    assert not nothing.any()
    sent, _ = update(gradient, state)
    np.testing.assert_allclose(sent, gradient, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1e-8, 1.0, 1e12, 1e20])
def test_the_scale_of_a_gradient_does_not_matter(scale: float) -> None:
    """The published 1e-8 in the orthonormalization would shrink what is sent of a small one."""
    tx = optax.chain(compress(power_sgd(3)), to_dense())
    rank_one = np.outer(draw((12,), 1), draw((20,), 2)) * np.float32(scale)
    state, update = tx.init(jnp.zeros((12, 20))), jax.jit(tx.update)
    for _ in range(3):
        sent, state = update(jnp.asarray(rank_one), state)
        np.testing.assert_allclose(sent / scale, rank_one / scale, atol=1e-4)


def test_the_start_is_random_by_path_and_seed_and_finite_after_nan() -> None:
    params = {"a": jnp.ones((8, 12)), "b": jnp.ones((8, 12))}
    right = compress(power_sgd(2)).init(params).carried.right
    other = compress(power_sgd(2, seed=1)).init(params).carried.right
    assert not np.array_equal(right["a"], right["b"])
    assert not np.array_equal(right["a"], other["a"])
    tx = compress(power_sgd(2))
    bad = {**params, "a": params["a"].at[0, 0].set(jnp.nan)}
    _, state = tx.update(bad, tx.init(params))
    np.testing.assert_array_equal(state.carried.right["a"], right["a"])


def test_vectors_and_matrices_without_gain_are_kept_dense() -> None:
    shape, path = jax.ShapeDtypeStruct, (jax.tree_util.DictKey("layers"),)
    kept = {
        s: power_sgd(4).keeps_dense(path, shape(s, "float32"))
        for s in [(), (512,), (0, 9), (8, 8), (8, 9), (9, 9), (2, 8, 8), (2, 8, 64)]
    }
    assert kept == {
        (): True, (512,): True, (0, 9): True, (8, 8): True, (8, 9): False, (9, 9): False,
        (2, 8, 8): False, (2, 8, 64): False,
    }  # fmt: skip
    assert power_sgd(4, stacked="layers").keeps_dense(path, shape((2, 8, 8), "float32"))


def test_dense_arithmetic_on_a_low_rank_update_is_refused() -> None:
    tx = compress(power_sgd(1))
    sent, _ = tx.update(jnp.ones((4, 6)), tx.init(jnp.ones((4, 6))))
    assert isinstance(jax.tree.map(lambda leaf: leaf, sent), LowRank)
    with pytest.raises(TypeError, match=r"to_dense\(\) before it"):
        jax.tree.map(lambda leaf: -0.1 * leaf, sent)


def test_a_bypass_is_added() -> None:
    tx = optax.chain(error_feedback(power_sgd(1), "float32", alpha=0.5), to_dense())
    gradient = jnp.asarray(draw((6, 9)))
    sent, state = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(sent + state[0].residual.codes, gradient, atol=1e-6)
