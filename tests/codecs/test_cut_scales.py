"""Two bits a number or four, over some root mean squares of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microadam_jax import Blocks, Storage
from microadam_jax.codecs import as_codec, encoded_bytes, int4, linear2
from microadam_jax.codecs.rounding import dither

SHAPES = [(), (1,), (3,), (5, 1), (4, 768), (3, 1000), (2, 50257), (2, 2, 11008), (0, 8), (3, 0)]


# The codec, its levels, its scale in root mean squares, its block, and what that is a multiple of.
CODECS = {
    "linear2": (linear2, np.array([-3, -1, 1, 3]) / 3, 1.5, 256, 4),
    "int4": (int4, np.arange(-7, 8) / 7, 2.5, 128, 2),
}


def numbers(name: str, x: np.ndarray, xi: np.ndarray) -> np.ndarray:
    """Rounds one block in float64; NaN where float32 may decide otherwise."""
    _, levels, cut, _, _ = CODECS[name]
    x = x.astype(np.float64)
    there = x[x != 0]
    scale = min(cut * np.sqrt(np.mean(there**2)), abs(there).max()) if there.size else 0.0
    levels = scale * levels
    below = np.clip(np.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 2)
    threshold = levels[below] + xi * (levels[below + 1] - levels[below])
    decided = (np.abs(x - threshold) > 1e-6 * scale) | (scale == 0)
    return np.where(decided, levels[below + (x > threshold)], np.nan)


def row_by_row(name: str, x: np.ndarray, xi: np.ndarray | None) -> np.ndarray:
    _, _, _, block, multiple = CODECS[name]
    flat = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1] if x.ndim else 1)
    xi = np.full(flat.shape, 0.5) if xi is None else xi.reshape(flat.shape)
    size = Blocks(block, multiple=multiple).layout(flat.shape[-1]).size
    out = np.zeros(flat.shape)
    for row in range(len(flat)):
        for start in range(0, flat.shape[1], size):
            cut = slice(start, start + size)
            out[row, cut] = numbers(name, flat[row, cut], xi[row, cut])
    return out.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", CODECS)
def test_as_in_the_oracle(name: str, shape: tuple[int, ...], rounding: str) -> None:
    make, _, _, block, multiple = CODECS[name]
    codec, key = make(rounding=rounding), jax.random.key(3)
    x = np.random.default_rng(0).standard_t(4, shape).astype(np.float32)
    encoded = codec.encode(jnp.asarray(x), key if rounding == "stochastic" else None)
    xi = np.asarray(dither(key, shape)) if rounding == "stochastic" else None
    decoded = np.asarray(codec.decode(encoded, shape))
    expected = row_by_row(name, x, xi)
    decided = ~np.isnan(expected)
    assert decided.sum() >= 0.999 * x.size - 1
    np.testing.assert_allclose(decoded[decided], expected[decided], rtol=1e-5)
    layout = Blocks(block, multiple=multiple).layout(shape[-1] if shape else 1)
    assert encoded.codes.shape == (*shape[:-1], layout.count * layout.size // multiple)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_of_any_size(size: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    small, large = (linear2().encode(jnp.asarray(y, jnp.float32)) for y in (x, x * size))
    np.testing.assert_array_equal(small.codes, large.codes)
    np.testing.assert_allclose(large.scales, small.scales * np.float32(size), rtol=1e-5)


def test_zeros_stay_zero_and_do_not_make_the_scale_smaller() -> None:
    x = jnp.zeros(256).at[:4].set(jnp.array([1.0, -1, 5, -1]))
    np.testing.assert_allclose(linear2().encode(x).scales, [1.5 * 7**0.5, 0], rtol=1e-6)
    encoded = linear2().encode(jnp.zeros(256))
    assert not encoded.codes.any()
    assert not linear2().decode(encoded, (256,)).any()


def test_signs_of_one_size_are_exact() -> None:
    x = jnp.where(jnp.arange(64) % 3 == 0, -2.0, 2.0)
    np.testing.assert_array_equal(linear2().decode(linear2().encode(x), x.shape), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_becomes_nan(bad: float) -> None:
    x = jnp.ones((1, 512)).at[0, 3].set(bad)
    decoded = np.asarray(linear2(256).decode(linear2(256).encode(x), x.shape))
    assert np.isnan(decoded[0, :128]).all()
    assert np.isfinite(decoded[0, 128:]).all()


def test_stochastic_rounding_has_no_bias_below_the_cut() -> None:
    x = np.linspace(-1.4, 1.4, 256).astype(np.float32)
    cut = 1.5 * np.sqrt(np.mean(np.square(x)))
    codec = linear2(rounding="stochastic")
    draws = jax.vmap(lambda key: codec.decode(codec.encode(x, key), x.shape))(
        jax.random.split(jax.random.key(0), 2000)
    )
    inside = np.abs(x) < cut
    error = np.asarray(draws).std(0) / np.sqrt(len(draws)) + 1e-6
    assert (np.abs(np.asarray(draws).mean(0) - x) < 5 * error)[inside].all()
    np.testing.assert_allclose(np.abs(draws[0][~inside]), cut, rtol=1e-5)


def test_a_quarter_of_a_byte_each() -> None:
    assert encoded_bytes("linear2", (4096, 4096)) == 4096**2 * (1 / 4 + 4 / 256)
    assert as_codec("linear2") == linear2()
    assert Storage(linear2(Blocks(128))).label == "linear2_b128m4"


def test_one_large_number_does_not_take_the_steps_of_the_others() -> None:
    x = jnp.where(jnp.arange(1024) == 5, 100.0, jnp.cos(jnp.arange(1024)))
    codec = int4()
    decoded = codec.decode(codec.encode(x), x.shape)
    np.testing.assert_allclose(decoded[5], 2.5 * jnp.sqrt(jnp.mean(x[:128] ** 2)), rtol=1e-6)
    exact = int4(deviations=None)
    assert exact.decode(exact.encode(x), x.shape)[5] == 100
    assert as_codec("int4") == codec
    assert Storage(codec).label == Storage(exact).label == "int4_b128"


def test_a_scale_is_a_positive_number_of_root_mean_squares() -> None:
    with pytest.raises(ValueError, match=r"deviations must be a positive number.*got 0"):
        int4(deviations=0)


def test_blocks_must_fill_bytes() -> None:
    with pytest.raises(ValueError, match="positive multiple of 4; got 6"):
        linear2(6)
    with pytest.raises(ValueError, match=r"Blocks.multiple must be 2 or 4; got 3"):
        Blocks(6, multiple=3)
