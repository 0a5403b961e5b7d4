"""XLA's program for GPUs computes what the reference does; here it runs on the CPU."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import affine4, dynamic4, dynamic8, float8, linear4
from microadam_jax.codecs import Plain, as_codec
from microadam_jax.transforms.two_passes import in_two_passes, takes_two_passes
from pallas_kernels.blockwise_codec.reference import step
from pallas_kernels.topk_compress import one_reduction

COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")

CODECS = {
    "8 bits": (dynamic8(keep_sign=True), dynamic8(signed=False)),
    "8 bits symmetric": (dynamic8(symmetric=True), dynamic8(signed=False, rounding="stochastic")),
    "4 bits": (dynamic4(), linear4(rounding="stochastic")),
    "floats": (float8("e4m3", expansion=False), float8("e5m2", expansion=False)),
    "expanded": (float8("e4m3"), float8("e5m2", rounding="stochastic")),
    "8 bits and bfloat16": (dynamic8(), Plain("bfloat16")),
}


def rule(moments: Any, inputs: Any) -> Any:
    mu, nu = moments
    gradient, params = inputs
    # Sums of products that are exact in any order of rounding: multiples of a power of two.
    mu, nu = 0.5 * mu + 0.5 * gradient, 0.5 * nu + 0.25 * jnp.abs(gradient)
    return params - 0.5 * mu, [mu, nu]


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("shape", [(3, 2, 512), (4, 601), ()], ids=str)
def test_it_gives_the_bits_of_the_reference(codecs: Any, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    keys = [jax.random.key(1), jax.random.key(2)]
    zeros = [
        jax.eval_shape(codec.zeros, jax.ShapeDtypeStruct(shape, "float32")) for codec in codecs
    ]
    encoded = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
    one = jax.jit(lambda encoded, inputs: step(rule, codecs, encoded, inputs, keys))
    two = jax.jit(lambda encoded, inputs: in_two_passes(rule, codecs, encoded, inputs, keys))
    for _ in range(3):
        inputs = tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
        output, stored = two(encoded, inputs)
        wanted, encoded = one(encoded, inputs)
        np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-5)
        for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(encoded), strict=True):
            assert x.dtype == y.dtype
            if codecs is CODECS["expanded"]:  # powers are approximations, which programs differ in
                assert np.mean(~np.isclose(x, y, rtol=1e-6, atol=0)) < 0.01
            else:
                np.testing.assert_array_equal(x, y)


def test_blocks_of_zeros_and_of_what_is_not_finite() -> None:
    codecs, shape = CODECS["8 bits"], (3, 512)
    gradient = np.zeros(shape, np.float32)
    gradient[1, 3], gradient[2, 400] = np.nan, np.inf
    inputs = jnp.asarray(gradient), jnp.zeros(shape)
    encoded = [codec.encode(jnp.zeros(shape)) for codec in codecs]
    wanted = step(rule, codecs, encoded, inputs, [None, None])
    found = in_two_passes(rule, codecs, encoded, inputs, [None, None])
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_scales_that_all_rows_share_need_another_pass() -> None:
    assert not takes_two_passes([as_codec("rank1_linear4")])
    assert takes_two_passes([as_codec("e4m3"), as_codec("float32")])


@pytest.mark.parametrize("types", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("spec", [P("x", "y"), P(None, ("x", "y"))], ids=str)
def test_on_a_mesh_nothing_moves(spec: P, types: AxisType) -> None:
    """Both of XLA's programs for GPUs, which no test runs where there is none."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(types,) * 2)

    def placed(x: Any) -> jax.Array:
        return jax.device_put(jnp.zeros(x.shape, x.dtype), NamedSharding(mesh, spec))

    shape = jax.ShapeDtypeStruct((4, 2048), jnp.float32)
    codec, residual = dynamic4(rounding="stochastic"), affine4().zeros(shape)
    moment = codec.Encoded(*map(placed, jax.eval_shape(codec.zeros, shape)))

    def step_of(moment: Any, gradient: jax.Array) -> Any:
        key = jax.random.key(0)
        return in_two_passes(
            lambda m, g: (m[0] + g[0], [m[0] + g[0]]), [codec], [moment], [gradient], [key]
        )

    gradient = placed(shape)
    compress = jax.jit(functools.partial(one_reduction.compress, k=3))
    with jax.set_mesh(mesh):
        programs = (
            jax.jit(step_of).lower(moment, gradient).compile(),
            compress.lower(gradient, *map(placed, residual)).compile(),
        )
    for program in programs:
        assert COLLECTIVE.findall(program.as_text()) == []
