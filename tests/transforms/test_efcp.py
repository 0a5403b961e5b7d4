"""M-FAC and GGT of every representation against dense float64 inverses of the window's Fisher."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Blocks,
    Window,
    error_feedback,
    lowrank_mfac,
    memory_report,
    mfac,
    scale_by_ggt,
    scale_by_mfac,
    scale_by_window_adam,
    sparse_ggt,
    sparse_mfac,
    to_dense,
    top_k,
)
from microadam_jax.compressors import power_sgd
from tests.oracles.efcp import (
    Floats,
    GgtOracle,
    MfacOracle,
    PowerSgdOracle,
    TopKOracle,
    gram_schmidt,
)

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

LENGTH = 4
SHAPES = {"bias": (9,), "conv": (2, 3, 16), "matrix": (4, 24), "odd": (5, 7), "scalar": ()}
EVERY = {"min_size": 0, "min_row": 0}
COMPRESSORS = {
    "dense": None,
    "sparse": top_k(count=3, blocks=Blocks(16), **EVERY),
    "sparse, many per block": top_k(count=9, blocks=Blocks(16), **EVERY),
    "low rank": power_sgd(rank=2),
    "low rank, stacked": power_sgd(rank=2, stacked="conv"),
}

each_compressor = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("sparse", "low rank") else pytest.mark.slow)
        for name in COMPRESSORS
    ],
)


def parameters() -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, jax.Array]:
    """Gradients with a mean, so that the window's rows are far from orthogonal."""
    mean, random = np.random.default_rng(99), np.random.default_rng(step)
    return {
        name: jnp.asarray(
            0.1 * (mean.standard_normal(shape) + random.standard_normal(shape)), jnp.float32
        )
        for name, shape in SHAPES.items()
    }


def flat(tree: dict[str, Any]) -> Floats:
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in SHAPES])


def distance(one: Floats, other: Floats) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@functools.cache
def sent_updates(name: str) -> list[Any]:
    """What the compressor with error feedback sends in the first steps."""
    compressor = COMPRESSORS[name]
    if compressor is None:
        return [gradients(step) for step in range(2 * LENGTH + 1)]
    feedback = error_feedback(compressor, "float32")
    state, update, sent = feedback.init(parameters()), jax.jit(feedback.update), []
    for step in range(2 * LENGTH + 1):
        compressed, state = update(gradients(step), state)
        sent.append(compressed)
    return sent


def as_dense(sent: Any) -> Floats:
    return flat(to_dense().update(sent, optax.EmptyState())[0])


# A traced damping compiles once for all: inject_hyperparams makes it one.
def windowed(link: Any, name: str, **number: float) -> tuple[Any, Any]:
    factory = functools.partial(link, Window(LENGTH, "float32"), compressor=COMPRESSORS[name])
    tx = optax.inject_hyperparams(lambda value: factory(value))(*number.values())
    return jax.jit(tx.update), tx.init(parameters())


@each_compressor
def test_mfac_is_the_inverse_of_the_whole_fisher(name: str) -> None:
    """While the window fills and after it has wrapped, without loss at a small damping."""
    update, fresh = windowed(scale_by_mfac, name, damping=1.0)
    for damping in (1e-7, 1e-5, 1e-3, 1e-1):
        oracle = MfacOracle(LENGTH, damping)
        state = fresh._replace(hyperparams={"value": jnp.float32(damping)})
        for sent in sent_updates(name):
            updates, state = update(sent, state)
            assert distance(flat(updates), oracle.step(as_dense(sent))) < 5e-6


@each_compressor
def test_ggt_is_the_inverse_root_of_the_whole_second_moment(name: str) -> None:
    update, fresh = windowed(scale_by_ggt, name, eps=1.0)
    for eps in (1e-7, 1e-1):
        oracle = GgtOracle(LENGTH, eps)
        state = fresh._replace(hyperparams={"value": jnp.float32(eps)})
        for sent in sent_updates(name):
            updates, state = update(sent, state)
            assert distance(flat(updates), oracle.step(as_dense(sent))) < 5e-6


def test_a_normalized_window_divides_by_the_filled_rows() -> None:
    tx = scale_by_mfac(Window(LENGTH, "float32", normalized=True), 1e-2)
    oracle, state, update = MfacOracle(LENGTH, 1e-2, normalized=True), None, jax.jit(tx.update)
    state = tx.init(parameters())
    for step in range(LENGTH + 2):
        updates, state = update(gradients(step), state)
        assert distance(flat(updates), oracle.step(flat(gradients(step)))) < 5e-6


@pytest.mark.parametrize("name", ["dense", "sparse", "low rank"])
def test_a_bfloat16_window_is_exact_for_the_rows_that_it_holds(name: str) -> None:
    """The Gram matrix is that of the stored rows, so rounding cannot make it indefinite."""
    tx = scale_by_mfac(Window(LENGTH), 1e-5, compressor=COMPRESSORS[name])
    update, state = jax.jit(tx.update), tx.init(parameters())
    for step, sent in enumerate(sent_updates(name)):
        updates, state = update(sent, state)
        rows = [stored_row(sent, state, row) for row in range(LENGTH)]
        gram = np.array([[one @ other for other in rows] for one in rows])
        np.testing.assert_allclose(state.gram, gram, rtol=2e-6, atol=2e-6 * gram.max())
        newest = rows[step % LENGTH]
        oracle = MfacOracle(LENGTH, 1e-5, rows=[r for r in rows if r is not newest])
        assert distance(flat(updates), oracle.step(newest)) < 5e-6


def stored_row(sent: Any, state: Any, row: int) -> Floats:
    """Row ``row`` of the window, dense."""

    def dense(update: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        left, right = left[..., row, :].astype(jnp.float32), right[..., row, :] if right.size else 0
        if hasattr(update, "indices"):
            return update.__class__(
                left, right.astype(jnp.int32), None, update.shape, update.dtype, update.layout
            ).to_dense()
        if hasattr(update, "left"):
            return update.__class__(
                left, right.astype(jnp.float32), None, update.mark, update.shape, update.dtype
            ).to_dense()
        return left[..., 0]

    return flat(
        {
            name: dense(sent[name], state.window_left[name], _with_rows(state.window_right[name]))
            for name in SHAPES
        }
    )


def _with_rows(right: jax.Array) -> jax.Array:
    return right if right.size > 1 else jnp.zeros((LENGTH, 1))


@pytest.mark.parametrize("link", [scale_by_mfac, scale_by_ggt])
@pytest.mark.parametrize("length", [3, 64])
def test_gradients_may_repeat(link: Any, length: int) -> None:
    """The system is singular then, and the damping far below float32's reach."""
    tx = link(Window(length, "float32"), 1e-7)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal((20, 50)), jnp.float32)
    state, update = tx.init(direction), jax.jit(tx.update)
    for step in range(length + 3):
        updates, state = update(direction, state)
        filled = min(step + 1, length)
        norm = jnp.linalg.norm(direction)
        size = length / (filled * norm**2) if link is scale_by_mfac else 1 / (filled**0.5 * norm)
        np.testing.assert_allclose(updates, size * direction, rtol=1e-3)
    for scale in (1e-3, 1e3, 1e-6, 0.0, 1.0):
        updates, state = update(scale * direction, state)
        assert np.isfinite(updates).all()


def test_a_row_beyond_the_resolution_waits_until_the_largest_is_gone() -> None:
    small = np.ones(8, np.float32)
    tx = scale_by_mfac(Window(2, "float32"), 1e-5)
    updates = []
    state = tx.init(jnp.zeros(8))
    for gradient in (1e6 * np.eye(1, 8, dtype=np.float32)[0], small, small):
        update, state = tx.update(jnp.asarray(gradient), state)
        updates.append(np.asarray(update))
    assert np.abs(updates[1]).max() < 1e-5  # the exact update has 2 / 7 there
    np.testing.assert_allclose(updates[2], 1 / 8, rtol=1e-5)


def assert_trajectory(tx: optax.GradientTransformation, step_of: Any, params: Any) -> None:
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        gradient = np.random.default_rng(step).standard_normal(params.shape)
        expected = step_of(np.asarray(params, np.float64), gradient)
        updates, state = update(jnp.asarray(gradient, jnp.float32), state, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())
        params = optax.apply_updates(params, updates)


PARAMS = np.random.default_rng(7).standard_normal((6, 16)).astype(np.float32)
WINDOW = Window(LENGTH, "float32")


@pytest.mark.parametrize("method", ["mfac", "ggt"])
def test_sparse_aliases_follow_the_oracle(method: str) -> None:
    compressor = top_k(count=3, blocks=Blocks(16, shards=1), **EVERY)
    feedback = TopKOracle(16, 3, np.zeros((6, 16)))
    options = {"compressor": compressor, "residual": "float32", "window": WINDOW}
    if method == "mfac":
        tx = sparse_mfac(0.1, 1e-3, weight_decay=0.2, **options)
        oracle, before, after = MfacOracle(LENGTH, 1e-3), 0.0, 0.2  # decoupled, times the rate
    else:
        tx = sparse_ggt(0.1, 1e-3, weight_decay=0.2, **options)
        oracle, before, after = GgtOracle(LENGTH, 1e-3), 0.2, 0.0  # coupled

    def step_of(params: Floats, gradient: Floats) -> Floats:
        sent = feedback.step(gradient + before * params)
        direction = oracle.step(sent.ravel()).reshape(sent.shape)
        return -0.1 * (direction + after * params)

    assert_trajectory(tx, step_of, jnp.asarray(PARAMS))


def test_lowrank_mfac_follows_the_oracle() -> None:
    tx = lowrank_mfac(
        0.1, 1e-3, weight_decay=0.2, compressor=power_sgd(2), residual="float32", window=WINDOW
    )
    params = jnp.asarray(PARAMS)
    right = np.asarray(tx.init(params)[1].carried.right, np.float64).reshape(16, 2)
    feedback, oracle = PowerSgdOracle(right, np.zeros((6, 16))), MfacOracle(LENGTH, 1e-3)

    def step_of(params: Floats, gradient: Floats) -> Floats:
        sent = feedback.step(gradient + 0.2 * params)
        return -0.1 * oracle.step(sent.ravel()).reshape(sent.shape)

    assert_trajectory(tx, step_of, params)


def test_mfac_follows_the_oracle() -> None:
    tx, oracle = mfac(0.1, 1e-3, weight_decay=0.2, window=WINDOW), MfacOracle(LENGTH, 1e-3)

    def step_of(params: Floats, gradient: Floats) -> Floats:
        return -0.1 * oracle.step((gradient + 0.2 * params).ravel()).reshape(params.shape)

    assert_trajectory(tx, step_of, jnp.asarray(PARAMS))


def test_a_bad_gradient_spoils_every_leaf_until_it_has_left_the_window() -> None:
    tx = scale_by_mfac(Window(3), 1e-3)
    params = {"one": jnp.zeros(4), "other": jnp.zeros((2, 2))}
    state, update = tx.init(params), jax.jit(tx.update)
    finite = []
    for step in range(5):
        bad = jnp.nan if step == 0 else 1.0
        grads = {"one": jnp.full(4, bad), "other": jnp.arange(4.0).reshape(2, 2) + step}
        updates, state = update(grads, state)
        finite.append([bool(np.isfinite(updates[name]).all()) for name in params])
    assert finite == [[False, False]] * 3 + [[True, True]] * 2
    assert np.isfinite(state.gram).all()


def test_a_step_of_dense_mfac_does_not_copy_its_window() -> None:
    tx = mfac(1e-3)
    params = {"layers": {str(i): jax.ShapeDtypeStruct((257, 768), jnp.float32) for i in range(4)}}
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert step.memory_analysis().temp_size_in_bytes < 0.3 * kept  # a leaf of four


def test_memory_is_the_formula() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
    entries = 64 * 4096
    for length in (32, 1024):
        report = memory_report(sparse_mfac(1e-3, window=Window(length)), params)
        fields = report.fields
        assert fields["GramWindowState.gram"] == 4 * length**2
        window = sum(size for name, size in fields.items() if "window_" in name)
        assert window == 3 * length * 3 / 256 * entries
        report = memory_report(lowrank_mfac(1e-3, window=Window(length)), params)
        window = sum(size for name, size in report.fields.items() if "window_" in name)
        assert window == 2 * 4 * length * (64 + 4096)
        assert report.fields["ErrorFeedbackState.carried.right"] == 4 * 4 * 4096
    report = memory_report(mfac(1e-3), params)
    assert report.fields["GramWindowState.window_left"] == 4 * 32 * entries


def test_what_stays_dense_is_said() -> None:
    params = {"bias": jax.ShapeDtypeStruct((64,), jnp.float32)}
    remarks = memory_report(lowrank_mfac(1e-3), params).remarks
    assert remarks == {"too small for rank 4, kept dense": ("bias",)}


def test_bad_arguments_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="damping must be positive"):
        scale_by_mfac(damping=0.0)
    with pytest.raises(ValueError, match="eps must be positive"):
        scale_by_ggt(eps=0.0)
    with pytest.raises(ValueError, match="nothing to normalize"):
        scale_by_ggt(Window(3, normalized=True))
    with pytest.raises(TypeError, match="Window"):
        scale_by_mfac(jnp.asarray(3))
    with pytest.raises(ValueError, match="positive integer; got 0"):
        power_sgd(0)


def test_updates_of_another_compressor_are_refused() -> None:
    params = {"w": jnp.ones((8, 32))}
    sparse, low_rank = error_feedback(top_k(count=1, **EVERY)), error_feedback(power_sgd(1))
    for feedback, link in [
        (sparse, scale_by_mfac()),
        (low_rank, scale_by_mfac()),
        (optax.identity(), scale_by_mfac(compressor=power_sgd(1))),
        (low_rank, scale_by_mfac(compressor=power_sgd(2))),
    ]:
        tx = optax.chain(feedback, link)
        with pytest.raises(ValueError, match=r"'w' is .*compressor=\.\.\."):
            tx.update(params, tx.init(params))
    tx = optax.chain(low_rank, scale_by_window_adam(top_k(count=1, **EVERY)))
    with pytest.raises(ValueError, match="low-rank update for 'w'"):
        tx.update(params, tx.init(params))


def test_the_oracle_orthonormalizes() -> None:
    columns = gram_schmidt(np.random.default_rng(0).standard_normal((7, 3)))
    np.testing.assert_allclose(columns.T @ columns, np.eye(3), atol=1e-12)
