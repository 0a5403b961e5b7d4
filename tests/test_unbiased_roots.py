"""Second moments are rounded as published, before anything is trained with them."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.unbiased_roots import WITH_ZERO, ze_eden, zip_sr


def second_moments(rows: int) -> jax.Array:
    return jnp.exp(3 * jax.random.normal(jax.random.key(0), (rows, 128)) - 8)


def test_numbers_are_the_published_ones() -> None:
    published = "0 .00325 .00775 .02125 .04375 .06625 .08875 .15625 .26875"
    published += " .38125 .49375 .60625 .71875 .83125 .94375 1"
    np.testing.assert_allclose(WITH_ZERO.values, np.array(published.split(), float), rtol=1e-6)


def test_zip_sr_is_right_on_average_for_the_root() -> None:
    eps, draws = 0.01, 4096
    codec, (v,) = zip_sr(eps), second_moments(1)
    scale = jnp.max(v, keepdims=True)
    evenly = (jnp.arange(draws)[:, None] + 0.5) / draws  # what random numbers are in the mean
    codes = codec.codes_of(jnp.broadcast_to(v, (draws, 128)), (scale,), evenly)
    factors = 1 / (np.sqrt(codec.values_of(codes, (scale,))) + eps)
    largest_gap = 1 / eps
    np.testing.assert_allclose(factors.mean(0), 1 / (np.sqrt(v) + eps), atol=largest_gap / draws)


def test_zip_sr_hardly_ever_takes_zero() -> None:
    codec, v = zip_sr(), second_moments(1000)
    v = v / jnp.max(v, axis=-1, keepdims=True)
    zeros = np.mean(np.asarray(codec.decode(codec.encode(v, jax.random.key(2)), v.shape)) == 0)
    assert zeros < 1e-3
    assert np.mean(np.asarray(v) < 0.00325 / 2) > 0.1, "which rounding to nearest would make zero"


def test_ze_eden_keeps_the_projection_on_what_is_rounded() -> None:
    codec, v = ze_eden(), second_moments(16).at[3].set(0)
    rounded = codec.decode(codec.encode(v), v.shape)
    np.testing.assert_allclose(jnp.sum(v * rounded, -1), jnp.sum(v * v, -1), rtol=1e-5)
    assert not np.any(rounded[3])
