import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microadam_jax import Blocks
from microadam_jax.codecs import Affine4, Plain, affine4, as_codec
from microadam_jax.codecs.packing import pack_codes, unpack_codes
from tests.oracles.microadam import encode, runs

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

SHAPES = [(), (1,), (7,), (257,), (3, 64), (2, 5, 300), (4, 0), (0, 4)]


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(codec: Affine4, x: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x), key), x.shape))


def oracle(x: np.ndarray, bucket: int) -> np.ndarray:
    rows = np.atleast_1d(x).astype(np.float64)
    rows = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    out = np.zeros_like(rows)
    for row in range(len(rows)):
        for run in runs(rows.shape[1], bucket):
            out[row, run] = encode(rows[row, run]).decode()
    return out.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_oracle(shape: tuple[int, ...]) -> None:
    codec = affine4(64)
    x = draw(shape)
    bucket = codec.buckets.layout_of(jnp.asarray(x)).size
    np.testing.assert_allclose(decoded(codec, x), oracle(x, bucket), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from(["float32", "bfloat16"]), st.floats(-50, 50))
def test_error_is_at_most_half_a_step(seed: int, statistics: str, mean: float) -> None:
    x = draw((4, 64), seed) + np.float32(mean)
    codec = affine4(64, statistics=statistics)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    # Statistics in bfloat16 widen the range by at most one part in 128 at either end.
    slack = 0.0 if statistics == "float32" else (np.abs(low) + np.abs(high)) / 128
    bound = (high - low + slack) / 15 / 2
    assert (np.abs(decoded(codec, x) - x) <= bound * (1 + 1e-4) + 1e-6 * np.abs(x)).all()


def test_extremes_are_exact() -> None:
    x = draw((8, 64))
    back = decoded(affine4(64), x)
    np.testing.assert_allclose(back.min(-1), x.min(-1), rtol=1e-6)
    np.testing.assert_allclose(back.max(-1), x.max(-1), rtol=1e-6)


def test_halves_round_up() -> None:
    x = np.array([[0.0, 15.0, 0.5, 1.5, 2.5, 3.49]], np.float32)
    np.testing.assert_array_equal(decoded(affine4(6), x), [[0, 15, 1, 2, 3, 3]])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e-45, 3e38])
@pytest.mark.parametrize("statistics", ["float32", "bfloat16"])
def test_a_constant_bucket_decodes_to_its_constant(value: float, statistics: str) -> None:
    x = np.full((2, 64), value, np.float32)
    back = decoded(affine4(64, statistics=statistics), x)
    np.testing.assert_allclose(back, x, rtol=1e-2 if statistics == "bfloat16" else 1e-6, atol=1e-44)
    assert value != 0 or (back == 0).all()


def test_levels_never_leave_four_bits_when_statistics_are_rounded() -> None:
    """A bucket of large mean and small spread: statistics rounded inwards would give level 22."""
    x = 1000 + 0.1 * draw((64, 64))
    codes = affine4(Blocks(64, shards=1), statistics="bfloat16").encode(jnp.asarray(x))
    assert (np.asarray(codes.low)[:, 0] <= x.min(-1)).all()
    assert (np.asarray(codes.high)[:, 0] >= x.max(-1)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_spoils_its_bucket_only(bad: float) -> None:
    x = draw((1, 128))
    x[0, 3] = bad
    back = decoded(Affine4(Blocks(64, shards=1)), x)
    assert not np.isfinite(back[0, :64]).all()
    np.testing.assert_array_less(np.abs(back[0, 64:] - x[0, 64:]), 1.0)


def test_stochastic_rounding_is_unbiased_and_bounded() -> None:
    codec = affine4(64, rounding="stochastic")
    x = draw((64,))
    keys = jax.random.split(jax.random.key(0), 20_000)
    back = jax.vmap(lambda key: codec.decode(codec.encode(jnp.asarray(x), key), x.shape))(keys)
    step = (x.max() - x.min()) / 15
    assert np.abs(np.asarray(back).mean(0) - x).max() < 4 * step / 2 / np.sqrt(20_000)
    assert np.abs(np.asarray(back) - x).max() <= step * (1 + 1e-5)


@given(st.integers(1, 20))
def test_packing_is_lossless_and_pairs_the_halves(half: int) -> None:
    levels = np.random.default_rng(half).integers(0, 16, (3, 2 * half)).astype(np.uint8)
    codes = pack_codes(jnp.split(jnp.asarray(levels), 2, axis=-1))
    np.testing.assert_array_equal(np.asarray(codes) & 0xF, levels[:, :half])
    np.testing.assert_array_equal(unpack_codes(codes, 4), levels)


@pytest.mark.parametrize("codec", [affine4(), affine4(64, statistics="bfloat16"), Plain()])
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_encode_to_zeros(codec: Affine4 | Plain, shape: tuple[int, ...]) -> None:
    zeros = jnp.zeros(shape)
    for made, encoded in zip(codec.zeros(zeros), codec.encode(zeros, None), strict=True):
        assert (made.shape, made.dtype) == (encoded.shape, encoded.dtype)
        np.testing.assert_array_equal(np.asarray(made), np.asarray(encoded))
    np.testing.assert_array_equal(codec.decode(codec.zeros(zeros), shape), zeros)


def test_slicing_rows_commutes_with_the_codec() -> None:
    x = draw((6, 300))
    np.testing.assert_array_equal(decoded(affine4(64), x)[2:4], decoded(affine4(64), x[2:4]))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' or 'stochastic'; got 'up'"):
        affine4(rounding="up")
    with pytest.raises(ValueError, match="'float32' or 'bfloat16'; got 'float16'"):
        affine4(statistics="float16")
    with pytest.raises(ValueError, match="'float32' or 'bfloat16'; got 'int8'"):
        Plain("int8")
    with pytest.raises(ValueError, match=r"Unknown codec 'fp4'; choose one of \['affine4'"):
        as_codec("fp4")
