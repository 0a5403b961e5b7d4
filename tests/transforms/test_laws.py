"""Laws that hold for any gradients, on the compressed path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Blocks,
    MicroAdamLayout,
    Window,
    compress,
    error_feedback,
    microadam,
    scale_by_window_adam,
    to_dense,
    top_k,
)
from microadam_jax.codecs import affine4, as_codec

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

EVERYTHING = {"min_size": 0, "min_row": 0}
COMPRESSOR = top_k(count=3, blocks=Blocks(64, shards=1), **EVERYTHING)
RESIDUAL = affine4(Blocks(64, shards=1))
LAYOUT = MicroAdamLayout(COMPRESSOR, RESIDUAL, Window(4))


def gradients(steps: int, shape: tuple[int, ...] = (6, 192), seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(shape)
    return [jnp.asarray(mean + rng.standard_normal(shape), jnp.float32) for _ in range(steps)]


def run(tx: optax.GradientTransformation, grads: list[jax.Array], state: Any = None) -> Any:
    params = jnp.zeros_like(grads[0])
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    updates = []
    for gradient in grads:
        step, state = update(gradient, state, params)
        updates.append(step)
    return updates, state


def test_what_comes_in_is_sent_or_kept() -> None:
    tx = optax.chain(error_feedback(COMPRESSOR, "float32"), to_dense())
    grads = gradients(50)
    sent, state = run(tx, grads)
    np.testing.assert_allclose(
        sum(sent) + state[0].residual.codes, sum(grads), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_quantizing_the_residual_loses_at_most_its_rounding(rounding: str) -> None:
    codec = affine4(Blocks(64, shards=1), rounding)
    tx = optax.chain(error_feedback(COMPRESSOR, codec), to_dense())
    state = tx.init(jnp.zeros((6, 192)))
    for gradient in gradients(12):
        before = codec.decode(state[0].residual, gradient.shape)
        sent, state = tx.update(gradient, state)
        after = codec.decode(state[0].residual, gradient.shape)
        low, high = state[0].residual.low, state[0].residual.high
        step = jnp.repeat((high - low) / 15, 64, axis=-1)
        allowed = step * (0.5 if rounding == "nearest" else 1.0)
        lost = jnp.abs(gradient + before - sent - after)
        assert (lost <= allowed * (1 + 1e-4) + 1e-6).all()


def test_what_is_sent_is_the_largest_of_each_block() -> None:
    tx = optax.chain(compress(COMPRESSOR), to_dense())
    (sent,), _ = run(tx, gradients(1))
    blocks = np.abs(np.asarray(gradients(1)[0])).reshape(6, 3, 64)
    threshold = np.sort(blocks, axis=-1)[..., -3, None]
    np.testing.assert_array_equal(np.asarray(sent).reshape(6, 3, 64) != 0, blocks >= threshold)


def test_density_one_is_adam_until_the_window_is_full() -> None:
    everything = top_k(density=1.0, blocks=Blocks(64), **EVERYTHING)
    layout = MicroAdamLayout(everything, "float32", Window(5, dtype="float32"))
    grads = gradients(7)
    ours, _ = run(microadam(0.1, layout=layout), grads)
    adams, _ = run(optax.adam(0.1), grads)
    for step in range(5):
        np.testing.assert_allclose(ours[step], adams[step], rtol=2e-4, atol=1e-7)
    assert not np.allclose(ours[5], adams[5], rtol=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_resuming_is_exact_also_across_the_ring(steps: int, rounding: str) -> None:
    layout = MicroAdamLayout(COMPRESSOR, affine4(64, rounding), Window(4))
    tx = microadam(0.1, layout=layout, alpha=0.1)
    grads = gradients(12)
    straight, end = run(tx, grads)
    _, state = run(tx, grads[:steps])
    stored = jax.tree.map(np.asarray, state)
    again, resumed = run(tx, grads[steps:], jax.tree.map(jnp.asarray, stored))
    jax.tree.map(np.testing.assert_array_equal, resumed, end)
    jax.tree.map(np.testing.assert_array_equal, again, straight[steps:])


def test_rows_that_never_see_a_gradient_stay_clean() -> None:
    grads = [gradient.at[2].set(0.0) for gradient in gradients(10)]
    updates, state = run(microadam(0.1, layout=LAYOUT), grads)
    assert all((update[2] == 0).all() for update in updates)
    assert (as_codec(RESIDUAL).decode(state[0].residual, (6, 192))[2] == 0).all()


def test_permuting_leading_rows_commutes_with_the_update() -> None:
    order = np.random.default_rng(0).permutation(6)
    grads = gradients(9)
    tx = microadam(0.1, layout=LAYOUT, alpha=0.1)
    updates, _ = run(tx, grads)
    permuted, _ = run(tx, [gradient[order] for gradient in grads])
    for update, other in zip(updates, permuted, strict=True):
        np.testing.assert_array_equal(update[order], other)


def test_stacked_layers_are_looped_layers() -> None:
    grads = gradients(6, (3, 4, 192))
    tx = microadam(0.1, layout=LAYOUT)
    stacked, _ = run(tx, grads)
    for layer in range(3):
        alone, _ = run(tx, [gradient[layer] for gradient in grads])
        for step, update in enumerate(alone):
            np.testing.assert_array_equal(update, stacked[step][layer])


def test_the_step_of_a_persistent_element_grows_as_published() -> None:
    """The amplification of section 1.3 of the notes: the sum is cut at m rows, 1 - b^t is not."""
    compressor = top_k(count=1, blocks=Blocks(2), **EVERYTHING)
    tx = optax.chain(compress(compressor), scale_by_window_adam(compressor, Window(10)))
    update = jax.jit(tx.update)
    state, found = tx.init(jnp.zeros(2)), {}
    for step in range(1, 301):
        updates, state = update(jnp.array([1.0, 0.0]), state)
        found[step] = float(updates[0])
    for step, growth in {10: 1.000, 20: 1.05, 50: 1.45, 100: 2.01, 300: 3.32}.items():
        assert found[step] == pytest.approx(growth, abs=5e-3)


def test_the_normalized_window_does_not_grow() -> None:
    compressor = top_k(count=1, blocks=Blocks(2), **EVERYTHING)
    window = Window(10, normalized=True)
    tx = optax.chain(compress(compressor), scale_by_window_adam(compressor, window))
    updates, _ = run(tx, [jnp.array([1.0, 0.0])] * 40)
    np.testing.assert_allclose(np.stack(updates)[:, 0], 1.0, rtol=1e-5)


def test_non_finite_elements_are_sent_and_not_kept() -> None:
    """Up to k of them in a block leave with the selection: the residual stays finite."""
    bad = gradients(1)[0].at[0, 5].set(jnp.nan).at[1, 70].set(jnp.inf)
    updates, state = run(microadam(0.1, layout=LAYOUT), [bad])
    assert not np.isfinite(updates[0][0, 5])
    assert np.isfinite(RESIDUAL.decode(state[0].residual, bad.shape)).all()


def test_more_of_them_than_are_sent_spoil_their_bucket_only() -> None:
    bad = gradients(1)[0].at[0, :4].set(jnp.nan)
    _, state = run(microadam(0.1, layout=LAYOUT), [bad])
    residual = np.asarray(RESIDUAL.decode(state[0].residual, bad.shape))
    assert np.isnan(residual[0, :64]).any()
    assert np.isfinite(residual[0, 64:]).all()
    assert np.isfinite(residual[1:]).all()


def test_stochastic_rounding_differs_between_leaves_steps_and_seeds() -> None:
    codec = affine4(64, rounding="stochastic")
    grads = {"a": gradients(1)[0], "b": gradients(1)[0]}

    def residuals(seed: int) -> dict[str, jax.Array]:
        tx = error_feedback(COMPRESSOR, codec, seed=seed)
        return tx.update(grads, tx.init(grads))[1].residual.codes

    first, again, other = residuals(0), residuals(0), residuals(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != other["a"]).any()


def test_a_window_says_what_was_given_to_it() -> None:
    params = jnp.zeros((6, 192))
    window = scale_by_window_adam(COMPRESSOR)
    with pytest.raises(ValueError, match=r"dense update for ''.*before it in the chain"):
        window.update(params, window.init(params))
    tx = optax.chain(compress(top_k(count=5, blocks=Blocks(64), **EVERYTHING)), window)
    with pytest.raises(ValueError, match=r"keeps 5 elements in blocks of 48.*same compressor"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: microadam(1e-3, layout="fats"), ValueError, r"'fats'; choose one of \['fast'"),
        (lambda: microadam(1e-3, alpha=1.0), ValueError, r"\[0, 1\), or be None"),
        (lambda: scale_by_window_adam(window=0), ValueError, "positive integer; got 0"),
        (lambda: scale_by_window_adam(window=Window(dtype="int8")), ValueError, "got 'int8'"),
        (
            lambda: scale_by_window_adam(window=jnp.int32(3)),
            TypeError,
            r"Window\(10\).*static_args=\('window',\)",
        ),
        (lambda: error_feedback(residual="fp4"), ValueError, "Unknown codec 'fp4'"),
    ],
)
def test_bad_arguments_are_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
