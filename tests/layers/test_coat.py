"""COAT's layers against float64 NumPy, as parts of models, and what a block of them saves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from microadam_jax.layers import (
    fp8_linear,
    fp8_multiply,
    fp8_rms_norm,
    fp8_silu,
    fp8_silu_gate,
    saved_bytes,
)
from microadam_jax.layers.nnx import Fp8Linear, Fp8RMSNorm, Fp8SwiGLU
from tests.oracles import fp8_activations as oracle


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X, W, SCALE = normal(0, 24, 40), normal(1, 40, 56) / 6, 1 + normal(2, 40) / 10
GATE, UP = 2 * normal(3, 24, 40), normal(4, 24, 40)


def value_and_slopes(f: Callable[..., Any], dy: jax.Array, *args: jax.Array) -> list[Any]:
    @jax.jit
    def both(dy: jax.Array, *args: jax.Array) -> Any:
        value, pull = jax.vjp(f, *args)
        return value, *pull(dy)

    return [np.asarray(a, float) for a in both(dy, *args)]


def assert_near(actual: list[Any], expected: tuple[np.ndarray, ...], most: float = 2e-3) -> None:
    """In norm: a division in float32 may round to the other neighbour."""
    for a, e in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - e) <= most * np.linalg.norm(e)


def float64(*arrays: jax.Array) -> list[np.ndarray]:
    return [np.asarray(a, float) for a in arrays]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(dtype: str) -> None:
    x, dy = X.astype(dtype), normal(5, 24, 56).astype(dtype)
    actual = value_and_slopes(fp8_linear, dy, x, W)
    expected = oracle.linear(*float64(x, W, dy))
    assert_near(actual, expected, 1e-4 if dtype == "float32" else 5e-3)
    assert fp8_linear(x, W).dtype == dtype
    exact = (x @ W.astype(dtype), dy @ W.T.astype(dtype), x.T @ dy)
    assert_near(actual, tuple(float64(*exact)), 0.1)


def test_linear_of_several_kernels_and_axes() -> None:
    x, kernels = normal(6, 2, 3, 16), (normal(7, 16, 8), normal(8, 16, 24))
    together = value_and_slopes(
        lambda x, v, w: jnp.concatenate(fp8_linear(x, (v, w)), -1),
        jnp.ones((2, 3, 32)),
        x,
        *kernels,
    )
    single = [value_and_slopes(fp8_linear, jnp.ones((2, 3, w.shape[1])), x, w) for w in kernels]
    np.testing.assert_allclose(together[0], np.concatenate([s[0] for s in single], -1), rtol=1e-6)
    np.testing.assert_allclose(together[1], single[0][1] + single[1][1], rtol=1e-4, atol=1e-5)
    for dw, (_, _, expected) in zip(together[2:], single, strict=True):
        np.testing.assert_allclose(dw, expected, rtol=1e-5)
    f = lambda w, x: fp8_linear(x, w)  # noqa: E731
    report = saved_bytes(f, kernels, x, after=f)
    assert report.before == {(x.shape, "uint8"): 1, ((), "float32"): 1}
    assert report.of_parameters == (0, 0)


def test_norm() -> None:
    dy = normal(9, 24, 40)
    actual = value_and_slopes(fp8_rms_norm, dy, X, SCALE)
    assert_near(actual, oracle.rms_norm(*float64(X, SCALE, dy), 1e-6))


def test_silu_product_and_gate() -> None:
    dy = normal(10, 24, 40)
    gated = value_and_slopes(fp8_silu_gate, dy, GATE, UP)
    assert_near(gated, oracle.silu_gate(*float64(GATE, UP, dy)))
    apart = value_and_slopes(lambda g, u: fp8_multiply(fp8_silu(g), u), dy, GATE, UP)
    for a, b in zip(gated, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [16, 37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_widths_and_dtypes(width: int, dtype: str) -> None:
    x = normal(11, 5, width).astype(dtype)
    for f in (fp8_silu, lambda x: fp8_rms_norm(x, jnp.ones(width)), lambda x: fp8_multiply(x, x)):
        value, slope = jax.value_and_grad(lambda x, f=f: jnp.sum(f(x).astype("float32")))(x)
        assert slope.dtype == jnp.dtype(dtype)
        assert np.isfinite(value)
        assert f(x).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_linear_of_any_magnitude(magnitude: float) -> None:
    dy = normal(5, 24, 56)
    scaled = value_and_slopes(fp8_linear, dy, X * magnitude, W)
    plain = value_and_slopes(fp8_linear, dy, X, W)
    for a, b, by in zip(scaled, plain, (magnitude, 1, magnitude), strict=True):
        np.testing.assert_allclose(a / by, b, rtol=0.2, atol=0.2)


def test_a_small_product_of_large_inputs_and_small_weights_is_finite() -> None:
    small = fp8_linear(X * 1e37, W * 1e-3)
    np.testing.assert_allclose(small / 1e34, fp8_linear(X, W), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fp8_linear(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 4))),
        lambda: fp8_silu(2.0),
        lambda: fp8_multiply(jnp.arange(3), jnp.arange(3)),
        lambda: fp8_rms_norm(jnp.arange(3), jnp.ones(3)),
    ],
)
def test_what_is_no_floating_point_array_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="takes a floating-point array as"):
        call()


def test_zeros_and_nans() -> None:
    for f in (
        lambda x: fp8_linear(x, W),
        lambda x: fp8_rms_norm(x, SCALE),
        fp8_silu,
        lambda x: fp8_silu_gate(x, x),
    ):
        np.testing.assert_array_equal(f(jnp.zeros_like(X)), 0)
        assert np.isnan(f(X.at[1, 2].set(jnp.nan))[1, :16]).all()
    # One scale for the whole tensor: nothing of it is left. Of a norm, a row; else a group.
    assert np.isnan(fp8_linear(X.at[1, 2].set(jnp.inf), W)).all()
    rows = fp8_rms_norm(X.at[1, 2].set(jnp.inf), SCALE)
    assert np.isnan(rows[1]).all()
    assert np.isfinite(rows[2:]).all()
    assert np.isfinite(fp8_silu(X.at[1, 2].set(jnp.inf))[1, 16:]).all()


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_sharded_inputs_give_the_numbers_of_one_device(devices: int) -> None:
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    there = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
    gate, up, dy = (normal(seed, 4, 256) for seed in (12, 13, 14))
    for f, args in [(fp8_silu_gate, (gate, up)), (fp8_multiply, (gate, up))]:
        expected = value_and_slopes(f, dy, *args)
        actual = value_and_slopes(f, *(jax.device_put(a, there) for a in (dy, *args)))
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)
    # Sums over the sharded axis have another order.
    f = lambda x, w: fp8_rms_norm(fp8_linear(x, w), jnp.ones(256))  # noqa: E731
    args = (dy, gate, normal(15, 256, 256) / 16)
    actual = value_and_slopes(f, *(jax.device_put(a, there) for a in args))
    assert_near(actual, tuple(value_and_slopes(f, *args)), 2e-2)


def test_explicit_axes_give_gradients_sharded_as_their_arguments() -> None:
    def layer(*args: jax.Array, out_sharding: Any = None) -> jax.Array:
        x, scale, gate, up, down = args
        h = fp8_silu_gate(*fp8_linear(fp8_rms_norm(x, scale), (gate, up)))
        return fp8_linear(h, down, out_sharding=out_sharding)

    wide = [normal(seed, 64, 128) / 8 for seed in (17, 18)]
    args = (normal(19, 4, 64), 1 + normal(20, 64) / 10, *wide, normal(21, 128, 64) / 11)
    specs = jax.P("data", None), jax.P(None), *[jax.P(None, "model")] * 2, jax.P("model", None)
    expected = value_and_slopes(layer, args[0], *args)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        there = [jax.device_put(a, spec) for a, spec in zip(args, specs, strict=True)]
        value, pull = jax.vjp(lambda *args: layer(*args, out_sharding=specs[0]), *there)
        slopes = jax.jit(pull)(there[0])
        with pytest.raises(Exception, match=r"ambiguous.*out_sharding"):
            layer(*there)
    assert [slope.sharding.spec for slope in slopes] == list(specs)
    # Sums over a sharded axis have another order.
    assert_near(float64(value, *slopes), tuple(expected), 2e-2)
    linear = Fp8Linear(128, 64, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        linear.kernel = nnx.Param(jax.device_put(linear.kernel[...], specs[-1]))
        x = jax.device_put(normal(22, 4, 128), jax.P("data", "model"))
        assert jax.typeof(linear(x, out_sharding=specs[0])).sharding.spec == specs[0]


def test_modules_of_nnx_have_the_parameters_of_its_own() -> None:
    x = normal(16, 8, 40)
    for ours, theirs, most in [
        (Fp8Linear(40, 24, rngs=nnx.Rngs(0)), nnx.Linear(40, 24, rngs=nnx.Rngs(0)), 0.06),
        (Fp8RMSNorm(40, rngs=nnx.Rngs(0)), nnx.RMSNorm(40, rngs=nnx.Rngs(0)), 0.06),
    ]:
        mine, other = (nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, mine, other)
        assert_near(float64(ours(x)), tuple(float64(theirs(x))), most)
    swiglu = Fp8SwiGLU(40, 56, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    up, gate = (x @ layer.kernel[...] for layer in (swiglu.up, swiglu.gate))
    expected = (nnx.silu(gate) * up) @ swiglu.down.kernel[...]
    assert_near(float64(swiglu(x)), tuple(float64(expected)), 0.1)
    slope = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x).astype("float32"))))(swiglu, x)
    assert np.isfinite(slope["up"]["kernel"][...]).all()


def test_functions_in_linen() -> None:
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scale = self.param("scale", linen.initializers.ones, (40,))
            kernel = self.param("kernel", linen.initializers.lecun_normal(), (40, 56))
            return fp8_silu(fp8_linear(fp8_rms_norm(x, scale), kernel))

    variables = Layer().init(jax.random.key(0), X)
    slope = jax.jit(jax.grad(lambda v: jnp.sum(Layer().apply(v, X))))(variables)
    assert np.linalg.norm(slope["params"]["kernel"]) > 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fp8_linear(X, W.T), r"got inputs of shape \(24, 40\) and a kernel"),
        (lambda: fp8_linear(X, W[None]), "Reshape kernels of more axes"),
        (lambda: fp8_rms_norm(X, SCALE[:3]), r"scale of shape \(n,\)"),
        (lambda: fp8_multiply(GATE, UP[:1]), "of one shape and dtype"),
        (lambda: fp8_silu_gate(GATE, UP.astype("bfloat16")), "Broadcast or cast"),
        (
            lambda: Fp8RMSNorm(4, use_scale=False, rngs=nnx.Rngs(0))(jnp.ones((2, 4))),
            "Use nnx.RMSNorm for others",
        ),
        (
            lambda: Fp8Linear(4, 4, dot_general=jnp.dot, rngs=nnx.Rngs(0))(jnp.ones((2, 4))),
            "cannot call dot_general=",
        ),
    ],
)
def test_other_arguments_are_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
