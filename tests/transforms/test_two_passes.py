"""The program that GPUs run for quantized moments gives the numbers of the specification."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from microadam_jax.codecs import Plain, dynamic4, dynamic8, float8, int4, linear2, linear4
from microadam_jax.codecs.rank1 import rank1_linear4
from microadam_jax.engine import two_passes
from pallas_kernels.blockwise_codec import step
from tests.contracts.meshes import collectives, mesh_of

PAIRS = {
    "8 bits": (dynamic8(), dynamic8(signed=False)),
    "4 bits": (linear4(rounding="stochastic"), dynamic4(signed=False)),
    "signs kept": (dynamic8(keep_sign=True), Plain("bfloat16")),
    "root mean squares": (int4(), linear2(rounding="stochastic")),
    "2 bits and 8": (linear2(), dynamic8()),
    "fp8": (float8(expansion=True), float8(expansion=True)),
    "fp8, stochastic": (float8("e5m2", expansion=True, rounding="stochastic"), float8()),
}
# Blocks of 250, 172 and 192 elements, and a last one that is padded.
SHAPES = [(8, 1000), (2, 3, 11008), (48, 768), (5, 1021)]


def adam(moments: Sequence[jax.Array], inputs: Sequence[jax.Array]) -> tuple[Any, list[Any]]:
    (mu, nu), (g, p) = moments, inputs
    mu, nu = 0.9 * mu + 0.1 * g, 0.99 * nu + 0.01 * g * g
    return p - 1e-2 * mu / (jnp.sqrt(nu) + 1e-8), [mu, nu]


def gradients(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Of many magnitudes, with blocks of zeros."""
    generator = np.random.default_rng(seed)
    g = generator.standard_normal(shape) * 10.0 ** generator.integers(-6, 2, shape)
    g[..., :400] *= generator.random((*shape[:-1], 1)) > 0.5
    return jnp.asarray(g, jnp.float32)


def equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codecs", PAIRS.values(), ids=PAIRS)
def test_numbers_are_those_of_the_specification(codecs: Any, shape: tuple[int, ...]) -> None:
    params = jnp.ones(shape)
    encoded = tuple(codec.zeros(params) for codec in codecs)
    key = jax.random.key(3)
    keys = tuple(key if codec.needs_key else None for codec in codecs)

    def run(function: Any) -> Any:
        return jax.jit(lambda encoded, inputs: function(adam, codecs, encoded, inputs, keys))

    specified, found = run(step), run(two_passes.step)
    for seed in range(3):
        inputs = gradients(shape, seed), params
        results = found(encoded, inputs)
        wanted = specified(encoded, inputs)
        equal(results[1], wanted[1])
        np.testing.assert_allclose(results[0], wanted[0], rtol=3e-7)
        params, encoded = wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("codecs", [PAIRS["8 bits"], PAIRS["fp8"]], ids=["8 bits", "fp8"])
def test_what_is_not_finite_stays_in_its_block(codecs: Any, bad: float) -> None:
    params = jnp.ones((2, 1024))
    g = gradients((2, 1024), 0).at[1, 700].set(bad)
    encoded = tuple(codec.zeros(params) for codec in codecs)
    keys = (None, None)
    wanted = jax.jit(lambda e: step(adam, codecs, e, (g, params), keys))(encoded)
    found = jax.jit(lambda e: two_passes.step(adam, codecs, e, (g, params), keys))(encoded)
    equal(found[1], wanted[1])


def test_takes_blocks_of_codes() -> None:
    assert all(map(two_passes.takes, PAIRS.values()))
    assert not two_passes.takes((dynamic8(), rank1_linear4()))


@pytest.mark.parametrize("codecs", PAIRS.values(), ids=PAIRS)
def test_no_device_asks_another(codecs: Any) -> None:
    mesh = mesh_of("auto")
    shape, spec = (16, 4096), PartitionSpec("fsdp", "tp")
    params = jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, spec))
    encoded = jax.tree.map(
        lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec)),
        tuple(codec.zeros(jnp.ones(shape)) for codec in codecs),
    )
    keys = tuple(jax.random.key(0) if codec.needs_key else None for codec in codecs)
    jitted = jax.jit(lambda e, g, p: two_passes.step(adam, codecs, e, (g, p), keys))
    program = jitted.lower(encoded, params, params).compile()
    assert collectives(program.as_text()) == []
