"""The codec of activations against float64 NumPy, and what it does at the ends of the range."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from microadam_jax.layers import Fp8ActivationCodes, fp8_activation
from tests.oracles.fp8_activations import numbers, quantized

FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def round_trip(x: Any, **options: Any) -> np.ndarray:
    codec = fp8_activation(**options)
    x = jnp.asarray(x)
    return np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x), x.shape))(x))


def samples(shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.normal(size=shape) * 10.0 ** random.uniform(-3, 3, shape)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [16, 5, None], ids=str)
@pytest.mark.parametrize("width", [64, 37])
def test_it_agrees_with_the_oracle(format: str, group: int | None, width: int) -> None:  # noqa: A002
    x = samples((9, width))
    actual = round_trip(x, format=format, group=group)
    expected = quantized(x, format, group)
    # Division in float32 can fall on the other side of a half.
    same = np.isclose(actual, expected, rtol=1e-5, atol=0)
    assert same.mean() > 0.998
    np.testing.assert_allclose(actual, expected, rtol=0.3)


@pytest.mark.parametrize("format", FORMATS)
def test_the_formats_are_those_of_the_hardware(format: str) -> None:  # noqa: A002
    """The oracle's numbers, and the codes as the bits of the 8-bit dtypes."""
    table = numbers(format)
    np.testing.assert_array_equal(
        np.arange(len(table), dtype=np.uint8).view(FORMATS[format]).astype(np.float64), table
    )
    # The largest number makes the scale 1, so that codes are those of a cast.
    y = np.sort(np.random.default_rng(1).uniform(-table[-1], table[-1], 15)).astype(np.float32)
    y = np.append(y, np.float32(table[-1]))
    codes, scales = fp8_activation(format).encode(jnp.asarray(y))
    assert scales == 1
    np.testing.assert_array_equal(codes, y.astype(FORMATS[format]).view(np.uint8))


def test_shapes_and_dtypes() -> None:
    for shape, scales in [((3, 4, 37), (3, 4, 3)), ((5,), (1,)), ((2, 0), (2, 0)), ((), (1,))]:
        encoded = fp8_activation().encode(jnp.ones(shape, jnp.bfloat16))
        assert (encoded.codes.shape, encoded.codes.dtype) == (shape, jnp.uint8)
        assert encoded.scales.dtype == jnp.bfloat16
        if shape:
            assert encoded.scales.shape == scales
    assert fp8_activation(group=None).encode(jnp.ones((3, 4))).scales.shape == ()


@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e38])
@pytest.mark.parametrize("group", [16, None], ids=str)
def test_all_magnitudes_have_the_same_relative_error(magnitude: float, group: int | None) -> None:
    x = np.float32(magnitude) * np.linspace(0.05, 1, 32, dtype=np.float32).reshape(2, 16)
    # Its scale rounded up, the largest float32 comes back as infinity, and is limited where used.
    back = np.minimum(round_trip(x, group=group), np.finfo(np.float32).max)
    np.testing.assert_allclose(back, x, rtol=2**-4)


def test_zeros_infinities_and_nans() -> None:
    x = np.ones((6, 32), np.float32)
    x[0], x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 0, np.nan, np.inf, -np.inf, 0
    back = round_trip(x)
    np.testing.assert_array_equal(back[0], 0)
    assert np.isnan(back[1:4, :16]).all()
    assert np.isfinite(back[1:4, 16:]).all()  # other groups are as they were
    np.testing.assert_allclose(back[4], x[4], rtol=2**-4)
    assert back[4, 3] == 0
    assert np.isnan(round_trip(x, group=None)).all()
    assert np.isfinite(round_trip(x[4:], group=None)).all()
    np.testing.assert_array_equal(round_trip(np.zeros((2, 4)), group=None), 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [16, None], ids=str)
def test_stochastic_rounding_has_no_bias(format: str, group: int | None) -> None:  # noqa: A002
    x = jnp.asarray(samples((2, 48)))
    codec = fp8_activation(format, group=group, rounding="stochastic")
    keys = jax.random.split(jax.random.key(0), 1000)
    draws = np.asarray(
        jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key), x.shape)))(keys), float
    )
    error = draws.std(0, ddof=1) / np.sqrt(len(keys))
    deviation = np.abs(draws.mean(0) - np.asarray(x, float))
    # Of 96 elements a fraction may be out by chance; none by much.
    within = deviation <= 3 * error + 1e-6 * np.abs(x)
    assert within.mean() > 0.98
    assert (deviation <= 5 * error + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("group", [16, None], ids=str)
def test_a_sharded_last_axis_gives_the_codes_of_one_device(devices: int, group: int | None) -> None:
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = samples((4, 256))
    encode = jax.jit(fp8_activation(group=group).encode)
    there = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(None, "x")))
    assert_same(encode(there), encode(x))


def assert_same(actual: Fp8ActivationCodes, expected: Fp8ActivationCodes) -> None:
    np.testing.assert_array_equal(actual.codes, expected.codes)
    np.testing.assert_array_equal(
        np.asarray(actual.scales, np.float32), np.asarray(expected.scales, np.float32)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "e3m4"}, "format must be one of"),
        ({"group": 0}, "group must be a positive integer"),
        ({"group": 2.5}, "group must be a positive integer"),
        ({"rounding": "up"}, "rounding must be"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fp8_activation(**options)
