import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microadam_jax import Blocks, codecs
from microadam_jax.codecs import (
    Codec,
    RankOne,
    Scaled,
    affine4,
    as_codec,
    dynamic4,
    dynamic8,
    encoded_bytes,
    float8,
    linear4,
    rank1_dynamic4,
    rank1_linear4,
)
from microadam_jax.codecs.codec import named_codecs
from microadam_jax.codecs.minifloat import E4M3, E5M2, MiniFloat
from tests.oracles import low_bit as oracle

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

DE8, DE8_UNSIGNED = oracle.dynamic_map(8, True), oracle.dynamic_map(8, False)
DE4, DE4_UNSIGNED = oracle.dynamic_map(4, True), oracle.dynamic_map(4, False)
SIXTEENTHS = np.arange(1, 17) / 16
ODD = np.arange(-15, 16, 2) / 15
ROW = Blocks(64, shards=1)  # rows of 64 are one block
MAPS = {
    "dynamic8": (dynamic8(ROW), DE8, 0.00704),
    "dynamic8 unsigned": (dynamic8(ROW, signed=False), DE8_UNSIGNED, 0.00352),
    "dynamic8 symmetric": (dynamic8(ROW, symmetric=True), oracle.symmetric(DE8), 0.00704),
    "dynamic4": (dynamic4(ROW), DE4, 0.1126),
    "dynamic4 unsigned": (dynamic4(ROW, signed=False), oracle.without_zero(DE4_UNSIGNED), 0.0563),
    "dynamic4 symmetric": (dynamic4(ROW, symmetric=True), oracle.symmetric(DE4), 0.1126),
    "linear4": (linear4(ROW, signed=True), ODD, 0.0667),
    "linear4 unsigned": (linear4(ROW, signed=False), SIXTEENTHS, 0.0625),
}
each_map = pytest.mark.parametrize("name", MAPS)
each_codec = pytest.mark.parametrize("name", named_codecs())
X = np.array([0.9, -0.9, 0.05, -0.01, 0.3, 0, 1e-4, 0.6], np.float32)
V = np.array([1, 0.5, 0.03, 0.031, 0, 1e-6, 0.96875, 0.28125], np.float32)


def draw(shape: tuple[int, ...], signed: bool = True, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape) ** 3
    return (x if signed else np.abs(x)).astype(np.float32)


def decoded(codec, x: np.ndarray, key=None) -> np.ndarray:
    return np.asarray(codec.decode(codec.encode(jnp.asarray(x), key), x.shape))


def unpacked(codes) -> list[int]:
    low, high = np.asarray(codes).ravel() & 15, np.asarray(codes).ravel() >> 4
    return [*low, *high]


@each_map
def test_the_code_of_zero(name: str) -> None:
    codec, values, _ = MAPS[name]
    zeros = np.flatnonzero(values == 0)
    assert codec.map.zero == (zeros[0] if zeros.size else None)


@each_map
def test_maps_have_the_published_numbers(name: str) -> None:
    codec, values, _ = MAPS[name]
    np.testing.assert_allclose(codec.map.values, values, rtol=1e-6, atol=1e-9)


def test_published_checksums() -> None:
    assert dynamic8().map.values.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-5)
    unsigned = dynamic8(signed=False).map.values.sum(dtype=np.float64)
    assert unsigned == pytest.approx(75.1052631, abs=1e-4)


def test_golden_codes() -> None:
    codes = lambda codec, x: codec.encode(jnp.asarray(x)).codes  # noqa: E731
    assert list(codes(dynamic8(), X).ravel()) == [255, 0, 175, 95, 207, 127, 134, 231]
    assert list(codes(dynamic8(signed=False), V).ravel()) == [255, 183, 77, 77, 0, 2, 250, 152]
    assert unpacked(codes(dynamic4(), X)) == [15, 0, 10, 6, 12, 7, 7, 13]
    assert unpacked(codes(linear4(signed=False), V)) == [15, 7, 0, 0, 0, 0, 14, 3]


def test_golden_rank_one() -> None:
    v = np.array([[4, 1, 0.5], [0.2, 8, 0.1]], np.float32)
    expected = [[4, 1, 0.5], [0.25, 8, 0.09375]]
    np.testing.assert_array_equal(decoded(rank1_linear4(), v), expected)


@pytest.mark.parametrize(
    ("x", "codes", "values"),
    [
        (
            [1e-4, -3e-5, 2e-6, 5e-7],
            [448, -36, 0.109375, 0.005859375],
            [1e-4, -3.052934e-5, 1.995565e-6, 5.034042e-7],
        ),
        (
            [0.5, -0.25, 0.125, 1],
            [10, -0.21875, 0.00390625, 448],
            [0.5009191, -0.25, 0.1202507, 0.99999994],
        ),
    ],
)
def test_golden_expansion(x: list[float], codes: list[float], values: list[float]) -> None:
    codec = float8(expansion=True)
    encoded = codec.encode(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(numbers_of(encoded), codes)
    np.testing.assert_allclose(codec.decode(encoded, (4,)), values, rtol=2e-5)
    k, centre, scale = oracle.expansion(np.asarray(x), 448)
    assert abs(encoded.exponents[0] / 16 - k) <= 1 / 16
    # What the paper keeps instead says the same: the decoded largest code.
    np.testing.assert_allclose(encoded.largest[0], (448 * scale) ** (1 / k) * centre, rtol=1e-6)


def numbers_of(encoded) -> np.ndarray:
    return np.asarray(encoded.codes.view(jnp.float8_e4m3fn).astype(jnp.float32)).ravel()


def test_golden_float8() -> None:
    encoded = float8(expansion=False).encode(jnp.asarray([1e-4, -3e-5, 2e-6, 5e-7]))
    np.testing.assert_array_equal(numbers_of(encoded), [448, -128, 9, 2.25])


@each_map
@given(seed=st.integers(0, 1000))
def test_nearest_by_trying_all(name: str, seed: int) -> None:
    codec, values, _ = MAPS[name]
    x = draw((3, 64), codec.signed, seed)
    expected = np.stack([oracle.scaled(values, row.astype(np.float64)) for row in x])
    back = decoded(codec, x)
    # A number within a rounding of the middle may go either way.
    off = np.abs(back - x) - np.abs(expected - x)
    assert (off <= 1e-6 * np.abs(x).max(-1, keepdims=True)).all()


@each_map
@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30))
def test_error_bound_sign_order_and_a_second_pass(name: str, seed: int, exponent: int) -> None:
    codec, _, bound = MAPS[name]
    x = draw((2, 64), codec.signed, seed) * np.float32(2.0**exponent)
    back = decoded(codec, x)
    top = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(back - x) <= bound * top * (1 + 1e-5)).all()
    order = np.argsort(x, -1)
    assert (np.diff(np.take_along_axis(back, order, -1), axis=-1) >= 0).all()
    if "symmetric" not in name and name != "linear4":
        assert (back * x >= 0).all()
    # The published signed maps lose a part of a negative largest element each time.
    if name not in ("dynamic8", "dynamic4"):
        np.testing.assert_allclose(decoded(codec, back), back, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_negative_largest_element_shrinks_unless_the_map_is_symmetric(bits: int) -> None:
    make = dynamic4 if bits == 4 else dynamic8
    x = np.array([-1.0, 0.25], np.float32)
    assert decoded(make(), x)[0] == pytest.approx(-0.8875 if bits == 4 else -0.99296875)
    assert decoded(make(symmetric=True), x)[0] == -1


@pytest.mark.parametrize("make", [dynamic4, dynamic8])
def test_sign_rule(make) -> None:
    x = np.array([1.0, -1e-9, 1e-9, 0.0], np.float32)
    assert (np.sign(decoded(make(keep_sign=True), x)) == [1, -1, 0, 0]).all()
    assert (np.sign(decoded(make(), x)) == [1, 0, 0, 0]).all()
    with pytest.raises(ValueError, match="moves numbers off the code of zero"):
        make(symmetric=True, keep_sign=True)


def test_a_positive_number_does_not_become_zero_where_none_are_negative() -> None:
    x = np.array([1.0, 1e-9, 1e-30, 0.0], np.float32)
    assert (np.sign(decoded(dynamic8(signed=False, keep_sign=True), x)) == [1, 1, 1, 0]).all()
    assert (np.sign(decoded(dynamic8(signed=False), x)) == [1, 0, 0, 0]).all()
    with pytest.raises(ValueError, match="dynamic4_unsigned has none"):
        dynamic4(signed=False, keep_sign=True)


@each_codec
@pytest.mark.parametrize("shape", [(), (1,), (7,), (257,), (3, 64), (2, 5, 300), (0, 4), (4, 0)])
def test_zeros_are_zero_bytes_and_stay_zero(name: str, shape: tuple[int, ...]) -> None:
    codec, zeros = as_codec(name), jnp.zeros(shape)
    for made, encoded in zip(codec.zeros(zeros), codec.encode(zeros, None), strict=True):
        assert (made.shape, made.dtype) == (encoded.shape, encoded.dtype)
        np.testing.assert_array_equal(np.asarray(made), np.asarray(encoded))
    np.testing.assert_array_equal(codec.decode(codec.zeros(zeros), shape), zeros)


DEGENERATE = {
    "one": [0, 0, 3, 0],
    "constant": [2, 2, 2, 2],
    "range": [1e12, 1, 1e-12, 0],
    "denormal": [1e-40, 0, 1e-42, 1e-40],
    "tiny": [1e-37, 2e-37, 0, 1e-37],
    "huge": [3e38, 1e38, 1, 0],
}


@each_codec
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_blocks_are_finite(name: str, case: str) -> None:
    x = np.asarray(DEGENERATE[case], np.float32)
    back = decoded(as_codec(name), x)
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= np.abs(x).max() * 1.01


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_element_is_not_hidden(name: str, bad: float) -> None:
    x = np.full((4, 32), 0.5, np.float32)
    x[1, 3] = bad
    assert not np.isfinite(decoded(as_codec(name), x)[1, 3])


@each_codec
def test_a_compiled_maximum_does_not_pass_over_a_nan(name: str) -> None:
    codec = as_codec(name)
    back = jax.jit(lambda x: codec.decode(codec.encode(x, None), x.shape))
    # Some places of a register are enough for some compilers to lose it.
    x = np.full((16, 7, 257), 0.5, np.float32)
    x[np.arange(16), 3, 7 * np.arange(16)] = np.nan
    assert np.isnan(np.asarray(back(x))[np.isnan(x)]).all()


@pytest.mark.parametrize(
    ("number", "dtype"), [(E4M3, jnp.float8_e4m3fn), (E5M2, jnp.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_minifloats_are_the_formats(number: MiniFloat, dtype: np.dtype) -> None:
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(number.decode(jnp.arange(256))[finite], values[finite])
    numbers = np.unique(values[finite])
    ties = (numbers[1:] + numbers[:-1]) / 2
    between = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    y = np.concatenate([numbers, ties, *between])
    y = y[np.abs(y) > 1e-30]  # neither zero, which has two codes, nor a float32 that is flushed
    np.testing.assert_array_equal(number.encode(jnp.asarray(y)), y.astype(dtype).view(np.uint8))
    low = number.dithered(jnp.asarray(ties), jnp.zeros(ties.shape))
    high = number.dithered(jnp.asarray(ties), jnp.full(ties.shape, 1 - 2.0**-24))
    np.testing.assert_array_equal(low, numbers[:-1])
    np.testing.assert_array_equal(high, numbers[1:])


@given(seed=st.integers(0, 1000), spread=st.floats(0, 5), name=st.sampled_from(["e4m3", "e5m2"]))
def test_expanded_error_is_relative(seed: int, spread: float, name: str) -> None:
    random = np.random.default_rng(seed)
    x = np.exp(spread * random.standard_normal((4, 64))) * random.choice([-1, 1], (4, 64))
    x = x.astype(np.float32)
    codec = float8(name, block=ROW, expansion=True)
    k = np.asarray(codec.encode(jnp.asarray(x)).exponents) / 16
    mantissa = 2.0 ** -(4 if name == "e4m3" else 3)
    subnormal = 1 / 4.6  # the smallest magnitude is 2.3 steps of the format
    error = np.abs(decoded(codec, x) / x - 1)
    assert (error <= np.expm1(np.log1p(max(mantissa, subnormal)) / k) * 1.1).all()


@pytest.mark.parametrize(
    "codec",
    [
        dynamic4(ROW, rounding="stochastic"),
        dynamic4(ROW, rounding="stochastic", symmetric=True),
        dynamic8(ROW, rounding="stochastic"),
        linear4(ROW, signed=True, rounding="stochastic"),
        float8(expansion=False, block=ROW, rounding="stochastic"),
    ],
    ids=lambda codec: codec.name,
)
def test_stochastic_rounding_is_unbiased_and_goes_to_neighbours(codec) -> None:
    x = draw((64,))
    x[0] = np.abs(x).max()  # -1 has no code on the published maps
    keys = jax.random.split(jax.random.key(1), 4000)
    back = np.asarray(jax.vmap(lambda k: codec.decode(codec.encode(x, k), x.shape))(keys))
    values = [np.unique(column) for column in back.T]
    assert max(map(len, values)) <= 2
    gap = np.array([np.ptp(v) for v in values])
    inside = x > -0.88 * np.abs(x).max()
    error = np.abs(back.mean(0, dtype=np.float64) - x)
    assert (error <= 4 * gap / 2 / math.sqrt(4000) + 1e-6)[inside].all()


def test_dither_is_uniform_and_depends_on_key_and_place() -> None:
    from microadam_jax.codecs.rounding import dither

    one, other = (np.asarray(dither(jax.random.key(s), (64, 1000))) for s in (0, 1))
    assert one.min() >= 0
    assert one.max() < 1
    counts = np.histogram(one, 64, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 120  # chi-squared with 63 degrees of freedom
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:, :-1].ravel(), one[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1].ravel(), one[1:].ravel())[0, 1]) < 0.02


def test_dither_takes_keys_of_every_generator() -> None:
    """Those of rbg have four words, which are two equal keys of the default generator."""
    from microadam_jax.codecs.rounding import dither

    def drawn(generator: str) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(3, impl=generator), 5)
        return np.asarray(dither(key, (64, 100)))

    default, rbg, unsafe = map(drawn, ("threefry2x32", "rbg", "unsafe_rbg"))
    np.testing.assert_array_equal(rbg, default)
    assert abs(unsafe.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(unsafe.ravel(), default.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("make", [rank1_linear4, rank1_dynamic4])
def test_rank_one_against_the_oracle(make) -> None:
    codec = make()
    v = draw((24, 36), signed=False)
    np.testing.assert_allclose(
        decoded(codec, v), oracle.rank_one(codec.map.values, v.astype(np.float64)), rtol=1e-5
    )


def test_rank_one_of_stacked_layers_is_that_of_each_layer() -> None:
    codec = rank1_linear4()
    v = draw((3, 16, 40), signed=False)
    stacked = decoded(codec.for_layers(0), v)
    np.testing.assert_array_equal(stacked, np.stack([decoded(codec, layer) for layer in v]))
    vectors = decoded(codec.for_layers(0), v[:, 0])
    np.testing.assert_array_equal(vectors, np.stack([decoded(codec, row) for row in v[:, 0]]))


@pytest.mark.parametrize(
    ("codec", "per_element"),
    [
        ("dynamic8", 1 + 4 / 256),
        ("dynamic4", 0.5 + 4 / 128),
        ("linear4_unsigned", 0.5 + 4 / 128),
        ("rank1_linear4", 0.5 + 4 / 2048 + 4 / 4096),
        ("e4m3", 1 + 4 / 128),
        ("e4m3_expanded", 1 + 5 / 128),
        ("affine4", 0.5 + 8 / 256),
        ("bfloat16", 2),
    ],
)
def test_bytes(codec: str, per_element: float) -> None:
    assert encoded_bytes(codec, (2048, 4096)) == per_element * 2048 * 4096


def test_a_name_is_that_of_the_default_of_its_constructor() -> None:
    named = named_codecs()
    made = {name: getattr(codecs, name)() for name in named if hasattr(codecs, name)}
    assert {"affine4", "dynamic8", "linear4"} <= set(made)
    made |= {
        f"{name}_unsigned": getattr(codecs, name)(signed=False)
        for name in ("dynamic8", "dynamic4", "linear4")
    }
    made |= {f: float8(f) for f in ("e4m3", "e5m2")} | {"e4m3": float8()}
    made |= {f"{f}_expanded": float8(f, expansion=True) for f in ("e4m3", "e5m2")}
    made |= {dtype: codecs.Plain(dtype) for dtype in ("float32", "bfloat16")}
    assert made == named
    assert {name: as_codec(name) for name in made} == made


def test_names_differ_where_arrays_do() -> None:
    names = [codec.name for codec in named_codecs().values()]
    assert len(set(names)) == len(names)
    assert dynamic8(64).name != dynamic8(128).name != dynamic8(Blocks(128, shards=1)).name
    # How numbers were rounded is no property of the numbers.
    assert dynamic4(rounding="stochastic").name == dynamic4().name


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' or 'stochastic'; got 'up'"):
        dynamic8(rounding="up")
    with pytest.raises(ValueError, match="code of -1"):
        dynamic4(signed=False, symmetric=True)
    with pytest.raises(ValueError, match=r"\['e4m3', 'e5m2'\]; got 'e3m4'"):
        float8("e3m4", expansion=True)
    assert isinstance(dataclasses.replace(dynamic8(), rounding="stochastic"), Scaled)
    assert isinstance(rank1_linear4(), RankOne)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("affine4", affine4()),
        ("dynamic4", dynamic4()),
        ("dynamic8", dynamic8()),
        ("e4m3", float8()),
        ("linear4", linear4()),
        ("rank1_dynamic4", rank1_dynamic4()),
        ("rank1_linear4", rank1_linear4()),
    ],
)
def test_a_name_is_the_constructors_default(name: str, codec: Codec) -> None:
    assert as_codec(name) == codec
