"""The step in one pass is the step in two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import (
    accumulate_into_residual,
    adam_mini,
    adam_mini8bit,
    adamw4bit_factored,
    adamw8bit,
    came,
    fused_apply,
    microadam,
)
from microadam_jax.engine import leaf_loops
from microadam_jax.engine.descent import Fusable
from microadam_jax.methods import METHODS
from tests.contracts.meshes import collectives

# The warnings have tests of their own: here parameters follow no rule on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*no rule of the partition names:UserWarning")

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 4)
SHAPES = {"kernel": (8, 1024), "stacked": (2, 16, 300), "bias": (32,), "scale": ()}


def normal(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, jax.Array]:
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(seed), len(SHAPES)), strict=True))
    return {name: jax.random.normal(keys[name], shape, dtype) for name, shape in SHAPES.items()}


def in_two_passes(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def both(tx: optax.GradientTransformation, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Parameters and state after three steps, in one pass and in two."""
    one = jax.jit(fused_apply(tx), donate_argnums=(1, 2))
    two = jax.jit(functools.partial(in_two_passes, tx))
    found, expected = ((normal(dtype), tx.init(normal(dtype))) for _ in range(2))
    for step in range(3):
        grads = normal(dtype, step)
        found = one(grads, found[1], found[0])
        expected = two(grads, expected[1], expected[0])
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    return found, expected


BUT_KERNELS = {**dict.fromkeys(SHAPES, True), "kernel": False}
CASES = {
    "decay and a schedule": (microadam(SCHEDULE, weight_decay=0.1), "float32"),
    "decay and a schedule, bfloat16": (microadam(SCHEDULE, weight_decay=0.1), "bfloat16"),
    "decay of some": (microadam(1e-2, weight_decay=0.1, mask=BUT_KERNELS), "float32"),
    "an array of a decay": (microadam(1e-2, weight_decay=jnp.float32(0.1)), "bfloat16"),
    "a bypass": (microadam(1e-2, alpha=0.1), "float32"),
    "pretrain": (microadam(1e-2, layout="pretrain"), "bfloat16"),
}


@pytest.mark.parametrize(("tx", "dtype"), CASES.values(), ids=CASES)
def test_the_same_bits_as_two_passes(tx: optax.GradientTransformation, dtype: str) -> None:
    found, expected = both(tx, dtype)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_same_numbers(found: Any, expected: Any) -> None:
    """Equal but for the sum with the parameter.

    XLA contracts it with the product before it, in one pass alone where two have a loop or a
    condition between them.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=3e-7, atol=1e-8)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("make", [adamw8bit, adam_mini8bit, adamw4bit_factored])
def test_the_same_numbers_where_leaves_are_updated_in_chunks(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaf_loops, "CACHED", 2048)
    assert_same_numbers(*both(make(SCHEDULE, weight_decay=0.1)))


def test_the_same_numbers_where_micro_batches_are_added_up_in_the_residual() -> None:
    assert_same_numbers(*both(accumulate_into_residual(microadam(1e-2), 2)))


def test_state_and_parameters_are_updated_in_place() -> None:
    tx = microadam(SCHEDULE, weight_decay=0.1)
    params = normal()
    state = tx.init(params)
    step = jax.jit(fused_apply(tx), donate_argnums=(1, 2))
    aliased = step.lower(params, state, params).compile().memory_analysis().alias_size_in_bytes
    assert aliased == sum(x.nbytes for x in jax.tree.leaves((params, state)))


def test_leaves_that_are_none_or_masked_stay_so() -> None:
    tx = microadam(1e-2, weight_decay=0.1)
    holes = {"none": None, "masked": optax.MaskedNode()}
    params, whole = {**normal(), **holes}, normal()
    step = jax.jit(fused_apply(tx))
    found, _ = step(params, tx.init(params), params)
    assert {name: found.pop(name) for name in holes} == holes
    expected, _ = step(whole, tx.init(whole), whole)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_parameter_without_gradient_stays_what_it_is() -> None:
    tx, whole = adam_mini(1e-2, weight_decay=0.1), normal()
    grads, params = {**whole, "frozen": None}, {**whole, "frozen": jnp.arange(3.0)}
    found, _ = fused_apply(tx)(grads, tx.init(grads), params)
    np.testing.assert_array_equal(found.pop("frozen"), jnp.arange(3.0))
    expected, _ = fused_apply(tx)(whole, tx.init(whole), whole)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_stay_in_their_own_boxes() -> None:
    tx = microadam(1e-2)
    params = {"kernel": nn.LogicallyPartitioned(jnp.ones((8, 1024)), ("embed", "mlp"))}
    found, _ = fused_apply(tx)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert jax.tree.structure(found) == jax.tree.structure(params)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_sharded_it_has_no_collective_and_the_same_bits(mode: AxisType) -> None:
    tx = microadam(SCHEDULE, weight_decay=0.1)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 1024))}
    expected, _ = jax.jit(fused_apply(tx))(params, tx.init(params), params)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(mode,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P("a", "b")))
        state = tx.init(placed)
        step = jax.jit(fused_apply(tx)).lower(placed, state, placed).compile()
        found, _ = step(placed, state, placed)
    assert collectives(step.as_text()) == []
    np.testing.assert_array_equal(found["kernel"], expected["kernel"])
    assert found["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)


WHOLE = microadam(1e-2)


@pytest.mark.parametrize(
    ("tx", "named"),
    [
        (optax.adamw(1e-2), "chain"),
        (optax.chain(optax.clip(1.0), WHOLE), "chain"),
        (optax.masked(WHOLE, True), "masked"),
        (optax.inject_hyperparams(microadam)(learning_rate=1e-2), "inject_hyperparams"),
        (came(1e-2), "chain"),
    ],
    ids=["not ours", "a chain", "a mask", "hyperparameters", "not fused"],
)
def test_what_changes_updates_afterwards_is_refused(tx: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"cannot look into this .*{named}.*optax.apply_updates"):
        fused_apply(tx)


def test_a_schedule_of_the_decay_is_refused() -> None:
    with pytest.raises(TypeError, match="weight_decay must be a number"):
        microadam(1e-2, weight_decay=SCHEDULE)


def test_the_docstring_names_all_that_it_takes() -> None:
    for name, method in METHODS.items():
        if isinstance(method.factory(1e-3), Fusable):
            assert f":func:`{name}`" in (fused_apply.__doc__ or ""), name
