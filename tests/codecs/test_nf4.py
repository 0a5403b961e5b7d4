"""NF4 against the published quantiles and a float64 oracle, and what it takes to quantize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microadam_jax import Blocks
from microadam_jax.codecs import Nf4Codes, nf4
from microadam_jax.codecs.maps import NF4
from microadam_jax.codecs.packing import unpack_codes
from tests.oracles import nf4 as oracle

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

LEVELS = np.asarray(NF4.values, float)
SHAPES = [(3, 768), (8, 1000), (2, 11008), (3, 50257), (2, 5, 256), (), (0, 64), (7,)]


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(x: np.ndarray, codec=nf4()) -> np.ndarray:
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x)), x.shape))


def all_codes(codes: Nf4Codes, block: int = 64) -> np.ndarray:
    return np.asarray(unpack_codes(codes.codes.reshape(-1, block // 2), 4)).reshape(-1)


def test_levels_are_the_published_quantiles() -> None:
    np.testing.assert_allclose(LEVELS, oracle.levels(), atol=2e-7)
    rounded = "-1 -.69619 -.52507 -.39492 -.28444 -.18477 -.09105 0 .07958 .16093 .24611 .33792"
    np.testing.assert_allclose(
        LEVELS, [*map(float, rounded.split()), 0.44071, 0.56262, 0.72296, 1], atol=5.1e-6
    )


def test_levels_come_back_exactly() -> None:
    x = np.tile(NF4.values, 4)
    np.testing.assert_array_equal(decoded(x), x)


def test_codes_are_nearest_by_midpoints() -> None:
    midpoints = ((NF4.values[1:] + NF4.values[:-1]) / 2).astype(np.float32)
    near = np.stack([np.nextafter(midpoints, -2), np.nextafter(midpoints, 2)], 1).reshape(-1)
    x = np.concatenate([[1.0], near, np.zeros(33)]).astype(np.float32)
    codes = all_codes(nf4().encode(jnp.asarray(x)))[1:31].reshape(15, 2)
    # The middle itself is a float32 rounding away from either side.
    np.testing.assert_allclose(codes[:, 0], np.arange(15), atol=1)
    far = np.sort(np.concatenate([midpoints - 1e-5, midpoints + 1e-5]))
    x = np.concatenate([[1.0], far, np.zeros(33)]).astype(np.float32)
    codes = all_codes(nf4().encode(jnp.asarray(x)))[1:31].reshape(15, 2)
    np.testing.assert_array_equal(codes, np.stack([np.arange(15), np.arange(1, 16)], 1))


@pytest.mark.parametrize("rows", [3, 40])
def test_equals_the_oracle(rows: int) -> None:
    x = normal((rows, 1024)) * np.exp(normal((rows, 1)))
    codec = nf4()
    encoded = codec.encode(jnp.asarray(x))
    codes, scales = oracle.quantize(x.reshape(-1).astype(float))
    assert (all_codes(encoded) != codes).mean() < 1e-4  # ties of float32
    np.testing.assert_allclose(np.asarray(codec.decode_scales(encoded)).reshape(-1), scales, 1e-2)
    close = np.isclose(decoded(x).reshape(-1), oracle.round_trip(x.reshape(-1).astype(float)), 1e-5)
    assert close.mean() > 0.99  # a scale between two codes may go either way


def test_scales_within_the_bound_of_double_quantization() -> None:
    # Cells of the top decade are 0.9 / 64 of the group's largest deviation: half of one either
    # way, and a whole one at -1, which has no code.
    x = normal((64, 4096)) * np.exp(normal((64, 1)) / 4)
    codec = nf4()
    encoded = codec.encode(jnp.asarray(x))
    scales = np.abs(x.reshape(64, 64, 64)).max(-1)
    error = np.abs(np.asarray(codec.decode_scales(encoded)) - scales).reshape(-1, 256)
    bound = np.asarray(encoded.groups)[:, None] * 0.9 / 64 / 2 + 1e-6
    assert np.all(error <= bound)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, "float32") for s in SHAPES), ((3, 768), "bfloat16")]
)
def test_every_shape_comes_back(shape: tuple[int, ...], dtype: str) -> None:
    x = jnp.asarray(normal(shape)).astype(dtype)
    codec = nf4()
    encoded = codec.encode(x)
    back = codec.decode(encoded, x.shape, dtype)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    expected = jax.eval_shape(codec.zeros, x)
    assert [(a.shape, a.dtype) for a in encoded] == [(a.shape, a.dtype) for a in expected]
    if x.size > 100:
        error = np.linalg.norm(np.asarray(back - x, float)) / np.linalg.norm(np.asarray(x, float))
        assert error < 0.1


def test_llama_weights_take_4_127_bits() -> None:
    for shape in [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]:
        arrays = jax.eval_shape(nf4().zeros, jax.ShapeDtypeStruct(shape, jnp.float32))
        bits = 8 * sum(a.size * a.dtype.itemsize for a in arrays) / np.prod(shape)
        assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_zeros_stay_zero_beside_other_blocks() -> None:
    x = normal((2, 2, 128))
    x[0, 1], x[1, 0, 64:], x[1, 1, 5] = 0, 0, 0
    back = decoded(x)
    assert np.all(back[x == 0] == 0)
    codec = nf4()
    empty = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    assert np.all(np.asarray(codec.decode(codec.zeros(empty), x.shape)) == 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = normal((2, 2, 128))
    x[1, 0, 3] = bad
    assert np.isnan(decoded(x)).all()


def test_stacked_layers_are_quantized_one_by_one() -> None:
    x = jnp.asarray(normal((3, 2, 2, 128)))
    codec = nf4()
    stacked = jax.vmap(codec.encode)(x)
    for layer in range(3):
        for part, alone in zip(stacked, codec.encode(x[layer]), strict=True):
            np.testing.assert_array_equal(part[layer], alone)


def test_no_temporary_of_many_times_the_weights() -> None:
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    codec = nf4()
    sizes = jax.jit(codec.encode).lower(x).compile().memory_analysis()
    print(f"temporary {sizes.temp_size_in_bytes / (4 * 1024 * 4096):.3f} of the weights")
    # The quotients, before they are compared; not one array for each of 16 levels.
    assert sizes.temp_size_in_bytes <= 1.1 * 4 * 1024 * 4096
    encoded = jax.eval_shape(codec.encode, x)
    decode = jax.jit(lambda codes: codec.decode(codes, x.shape, jnp.bfloat16))
    assert decode.lower(encoded).compile().memory_analysis().temp_size_in_bytes <= 4 * 1024 * 4096


def test_refuses_a_group_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"group must be a positive integer; got 0\."):
        nf4(group=0)
    assert nf4(Blocks(32)).name == "nf4_b32_g256"
