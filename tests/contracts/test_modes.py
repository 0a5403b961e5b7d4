"""Every transformation in the modes and loops that its users run it in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from microadam_jax import adamw4bit, adamw8bit, microadam, quantize_state
from tests.contracts.catalogue import ENTRIES, VARIANTS, Entry, gradients, marks_of
from tests.contracts.closeness import assert_close_but_for_levels

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
EVERYTHING = {
    **ENTRIES,
    **VARIANTS,
    "microadam, paper": Entry(microadam, {"learning_rate": 1e-2, "layout": "paper"}),
    "microadam, pretrain": Entry(microadam, {"learning_rate": 1e-2, "layout": "pretrain"}),
    "quantize_state of lion": Entry(
        lambda learning_rate: quantize_state(optax.lion(learning_rate), {"mu": "dynamic8"}),
        {"learning_rate": 1e-3},
    ),
}
# Around optax.scale_by_adam, which raises a Python number to the power of a traced integer.
PROMOTES = (
    *("adamw4bit", "adamw_fp8", "adamw8bit, as published", "adamw8bit", "quantize_state"),
    *("ldadam", "grass", "dct_adamw"),
)
each_name = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in EVERYTHING]
)
COMPILED = ("microadam, all compressed", "adam_mini", "sparse_mfac", "galore")
few_compiled = pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in COMPILED else pytest.mark.matrix) for x in EVERYTHING]
)
# Matrices, a stack of them and a vector: few shapes, because each is compiled.
SHAPES = {"kernel": (16, 128), "stacked": (2, 8, 64), "bias": (7,)}


def parameters() -> dict[str, jax.Array]:
    return {name: jnp.full(shape, 0.5) for name, shape in SHAPES.items()}


def trace(tx: optax.GradientTransformation, params: Any) -> Any:
    """The types of the updates and of the state of a step."""
    state = jax.eval_shape(lambda p: tx.init(p), params)
    return jax.eval_shape(tx.update, gradients(params), state, params)


@each_name
def test_ranks_are_not_promoted(name: str) -> None:
    with jax.numpy_rank_promotion("raise"):
        trace(EVERYTHING[name].make(), parameters())


@each_name
def test_dtypes_are_not_promoted(name: str) -> None:
    if name in PROMOTES:
        pytest.skip("Optax promotes them")
    with jax.numpy_dtype_promotion("strict"):
        trace(EVERYTHING[name].make(), parameters())


@each_name
@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_any_random_generator(name: str, generator: str) -> None:
    with jax.default_prng_impl(generator):
        trace(EVERYTHING[name].make(), parameters())


def data_parallel(tx: optax.GradientTransformation, check_vma: bool = True) -> tuple[Any, Any]:
    """The commonest loop: gradients are averaged over devices, all else is on each of them."""
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=check_vma)

    def step(grads: Any, state: Any, params: Any) -> Any:
        own = jax.tree.map(lambda g: jax.lax.pmean(g[0], "data"), grads)
        return tx.update(own, state, params)

    init = shard_map(lambda params: tx.init(params), in_specs=P())
    return jax.jit(init), jax.jit(shard_map(step, in_specs=(P("data"), P(), P())))


def of_two_devices(grads: Any) -> Any:
    """Gradients of two devices whose mean is ``grads`` to the last bit."""
    return jax.tree.map(lambda g: jnp.stack([2 * g, jnp.zeros_like(g)]), grads)


@each_name
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_data(name: str, check_vma: bool) -> None:
    params = parameters()
    init, step = data_parallel(EVERYTHING[name].make(), check_vma)
    state = jax.eval_shape(init, params)
    updates, after = jax.eval_shape(step, of_two_devices(gradients(params)), state, params)
    types = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert types((updates, after)) == types((params, state))


@pytest.mark.parametrize("make", [adamw8bit, adamw4bit, microadam])
def test_shard_map_of_leaves_that_go_in_chunks(make: Any) -> None:
    params = {"kernel": jnp.ones((1024, 512))}
    for check_vma in (True, False):
        init, step = data_parallel(make(1e-3), check_vma)
        jax.eval_shape(step, of_two_devices(params), jax.eval_shape(init, params), params)


@few_compiled
def test_data_parallel_steps_are_those_of_one_device(name: str) -> None:
    tx, params = EVERYTHING[name].make(), parameters()
    init, step = data_parallel(tx)
    alone, one_step = jax.jit(tx.init)(params), jax.jit(tx.update)
    state = init(params)
    updates = expected = None
    for number in range(2):
        grads = gradients(params, number)
        expected, alone = one_step(grads, alone, params)
        updates, state = step(of_two_devices(grads), state, params)
    # The compiler may contract a product and a sum in one of the programs only, which iterations
    # of a basis then repeat.
    if EVERYTHING[name].projects:
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, (updates, state), (expected, alone))
        return
    assert_close_but_for_levels((updates, state), (expected, alone))


@few_compiled
def test_debug_nans_finds_none(name: str) -> None:
    """Gradients of zeros are among them, by which something might be divided."""
    tx, params = EVERYTHING[name].make(), parameters()
    with jax.debug_nans(True):
        state, update = tx.init(params), jax.jit(tx.update)
        for scale in (0.0, 1.0, 0.0):
            grads = jax.tree.map(lambda g: scale * g, gradients(params))  # noqa: B023
            _, state = update(grads, state, params)
