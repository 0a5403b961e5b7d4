"""What every transformation of the library promises to whoever composes it."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.contracts.catalogue import ALIKE, ENTRIES, SPECS, Entry, gradients, marks_of, parameters

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
each_entry = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=name, marks=pytest.mark.matrix if name in ALIKE else marks_of(name))
        for name, entry in ENTRIES.items()
    ],
)


def avals(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one: Any, other: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), one, other)


def assert_close_at_scale(one: jax.Array, other: jax.Array) -> None:
    """Another program may sum a whole model's inner products in another order."""
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def run(tx: optax.GradientTransformation, params: Any, steps: int = 4) -> tuple[Any, Any]:
    """The last updates and the state after some jitted steps."""
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    updates = None
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
    return updates, state


def run_on(tx: optax.GradientTransformation, part: Any, params: Any) -> tuple[Any, Any]:
    """As ``run`` for the leaves in ``part``, with the gradients that they have in ``params``."""
    state, update, updates = tx.init(part), jax.jit(tx.update), None
    for step in range(4):
        grads = jax.tree.map(
            lambda leaf, gradient: None if leaf is None else gradient,
            part,
            gradients(params, step),
            is_leaf=lambda leaf: leaf is None,
        )
        updates, state = update(grads, state, part)
    return updates, state


@each_entry
def test_takes_extra_arguments_and_compiles_once(entry: Entry) -> None:
    tx = entry.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = parameters()
    traced = 0

    @jax.jit
    def update(grads: Any, state: Any) -> Any:
        nonlocal traced
        traced += 1
        return tx.update(grads, state, params, unknown=jnp.ones(()))

    state = tx.init(params)
    for step in range(3):
        _, state = update(gradients(params, step), state)
    assert traced == 1


@each_entry
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_updates_and_state_keep_shapes_and_dtypes(entry: Entry, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        tx, params = entry.make(), parameters(dtype)
        state = tx.init(params)
        updates, new = jax.jit(tx.update)(gradients(params), state, params)
        assert avals(updates) == avals(params)
        assert avals(new) == avals(state) == avals(jax.eval_shape(lambda p: tx.init(p), params))
        finite = jax.tree.map(lambda leaf: np.isfinite(leaf.astype(jnp.float32)).all(), updates)
        assert all(jax.tree.leaves(finite))


@each_entry
def test_init_takes_shapes_alone(entry: Entry) -> None:
    tx, params = entry.make(), parameters()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert_equal(tx.init(shapes), tx.init(params))


@each_entry
def test_each_state_field_is_a_tree_of_arrays_like_the_parameters(entry: Entry) -> None:
    """`tree.map_params` puts a spec on every per-parameter leaf, without an `is_leaf`."""
    tx, params = entry.make(), parameters()
    state = tx.init(params)
    specs = jax.tree.map(lambda _: P(), params)
    placed = optax.tree_utils.tree_map_params(
        tx, lambda leaf, _: leaf, state, specs, transform_non_params=lambda leaf: leaf
    )
    assert_equal(placed, state)
    for leaf, parameter in _with_parameters(tx, state, params):
        leading = zip(leaf.shape, parameter.shape[:-1], strict=False)
        assert all(n == size or entry.projects or (entry.shares and n == 1) for n, size in leading)
        assert leaf.ndim >= parameter.ndim
        assert leaf.size or not parameter.size
        assert leaf.dtype in (jnp.uint8, jnp.int16, jnp.int32, jnp.bfloat16, jnp.float32)


def _with_parameters(tx: Any, state: Any, params: Any) -> list[tuple[jax.Array, jax.Array]]:
    pairs: list[tuple[jax.Array, jax.Array]] = []
    optax.tree_utils.tree_map_params(
        tx, lambda leaf, parameter: pairs.append((leaf, parameter)), state, params
    )
    return pairs


@each_entry
@pytest.mark.parametrize("params", [{}, (), {"a": None}, {"a": optax.MaskedNode()}], ids=str)
def test_trees_without_leaves(entry: Entry, params: Any) -> None:
    tx = entry.make()
    updates, state = tx.update(params, tx.init(params), params)
    assert updates == params
    assert avals(state) == avals(tx.init(params))


@each_entry
def test_masked_touches_only_what_it_should(entry: Entry) -> None:
    params = parameters()
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.masked(entry.make(), mask)
    updates, state = run(tx, params)
    alone, _ = run(entry.make(), params)
    if entry.couples:
        # Masked leaves take no part in the inner products: the same as a model without them.
        unmasked = jax.tree.map(lambda leaf, kept: leaf if kept else None, params, mask)
        alone, _ = run_on(entry.make(), unmasked, params)
    if entry.couples:
        assert_close_at_scale(updates["attention"]["kernel"], alone["attention"]["kernel"])
    else:  # rounded otherwise, perhaps, in the program of other leaves
        np.testing.assert_allclose(
            updates["attention"]["kernel"], alone["attention"]["kernel"], rtol=2e-6
        )
    assert_equal(updates["attention"]["bias"], gradients(params, 3)["attention"]["bias"])
    assert avals(state) == avals(tx.init(params))


@each_entry
def test_partition(entry: Entry) -> None:
    params = parameters()
    labels = jax.tree.map(lambda leaf: "ours" if leaf.ndim > 1 else "frozen", params)
    tx = optax.partition({"ours": entry.make(), "frozen": optax.set_to_zero()}, labels)
    updates, _ = run(tx, params)
    alone, _ = run(entry.make(), params)
    if entry.couples:
        ours = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else None, params)
        alone, _ = run_on(entry.make(), ours, params)
    same = assert_close_at_scale if entry.couples else assert_equal
    same(updates["stacked"], alone["stacked"])
    assert not updates["scalar"].any()


@each_entry
def test_multi_steps(entry: Entry) -> None:
    params = parameters()
    tx = optax.MultiSteps(entry.make(), every_k_schedule=2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    first, state = update(gradients(params), state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    second, state = update(gradients(params), state, params)
    alone, _ = run(entry.make(), params, steps=1)
    assert_close(second, alone)


@each_entry
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_under_apply_if_finite_changes_nothing(
    entry: Entry, bad: float
) -> None:
    params = parameters()
    tx = optax.apply_if_finite(entry.make(), max_consecutive_errors=3)
    _, state = run(tx, params)
    grads = gradients(params, 9)
    grads["attention"]["kernel"] = grads["attention"]["kernel"].at[3, 100:110].set(bad)
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert_equal(after.inner_state, state.inner_state)


@each_entry
def test_a_non_finite_gradient_without_a_guard_stays_in_its_leaf(entry: Entry) -> None:
    params = parameters()
    grads = gradients(params)
    grads["attention"]["kernel"] = grads["attention"]["kernel"].at[3, 100].set(jnp.nan)
    tx = entry.make()
    update = jax.jit(tx.update)
    updates, _ = update(grads, tx.init(params), params)
    clean, _ = update(gradients(params), tx.init(params), params)
    assert not np.isfinite(updates["attention"]["kernel"][3, 100])
    if entry.couples:
        assert not any(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates) if leaf.size)
        return
    rest = {**updates, "attention": {"bias": updates["attention"]["bias"]}}
    assert_equal(rest, {**clean, "attention": {"bias": clean["attention"]["bias"]}})


STATIC = "rank", "update_interval", "density", "window", "block_size"  # shape a state


@each_entry
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inject_hyperparams(entry: Entry, dtype: str) -> None:
    """Numbers become traced arrays; in float32, because bfloat16 rounds 0.999 to 1."""
    params = parameters(dtype)
    parameters_of = inspect.signature(entry.factory).parameters
    inject = optax.inject_hyperparams(
        entry.factory,
        static_args=[name for name in STATIC if name in parameters_of],
        hyperparam_dtype=jnp.float32,
    )
    updates, state = run(inject(**entry.arguments), params)
    expected, _ = run(entry.make(), params)
    rounding, atol = (1e-5, 1e-6) if dtype == "float32" else (1e-2, 1e-6)
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        if entry.shares:
            # CAME's traced 0.9999 has rounded to float32, where 1 - 0.9999 is off by 2e-5; a decay
            # after the update is the difference of two roundings.
            rounding = max(rounding, 1e-4)
            atol = rounding * np.abs(other).max(initial=0)
        if entry.coarse:
            moved = ~np.isclose(one, other, rtol=rounding, atol=atol)
            assert moved.sum() <= 0.001 * moved.size
        else:
            np.testing.assert_allclose(one, other, rtol=rounding, atol=atol)
    assert avals(state) == avals(inject(**entry.arguments).init(params))


@each_entry
def test_a_schedule_of_a_constant_is_the_constant(entry: Entry) -> None:
    if "learning_rate" not in entry.arguments:
        pytest.skip("takes no learning rate")
    params = parameters()
    schedule = optax.constant_schedule(entry.arguments["learning_rate"])
    scheduled = entry.factory(**{**entry.arguments, "learning_rate": schedule})
    assert_close(run(scheduled, params)[0], run(entry.make(), params)[0])


@each_entry
def test_scan_and_cond_carry_the_state(entry: Entry) -> None:
    tx, params = entry.make(), parameters()

    def body(state: Any, step: jax.Array) -> tuple[Any, Any]:
        def take() -> tuple[Any, Any]:
            return tx.update(gradients(params), state, params)

        def skip() -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, params), state

        updates, state_after = jax.lax.cond(step % 2 == 0, take, skip)
        return state_after, updates

    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, jnp.arange(4)))(tx.init(params))
    expected = tx.init(params)
    for _ in range(2):
        _, expected = jax.jit(tx.update)(gradients(params), expected, params)
    assert avals(state) == avals(expected)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        # The compiler may contract the loop body otherwise, which moves a code by one level.
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (np.abs(one - other) > 1e-5 * np.abs(other)).sum() <= 0.01 * one.size


@each_entry
def test_a_donated_step_right_after_init(entry: Entry) -> None:
    """Fails if two state leaves share one buffer, or one is a parameter itself."""
    tx, params = entry.make(), parameters()
    step = jax.jit(lambda p, s, g: tx.update(g, s, p), donate_argnums=(0, 1))
    updates, state = step(params, tx.init(params), gradients(params))
    jax.block_until_ready((updates, state))


@each_entry
def test_eager_is_jitted(entry: Entry) -> None:
    tx, params = entry.make(), {"w": jnp.full((4, 64), 0.5)}
    eager, _ = tx.update(gradients(params), tx.init(params), params)
    jitted, _ = run(tx, params, steps=1)
    assert_close(eager, jitted)


@each_entry
def test_parameters_may_be_left_out_unless_they_decay(entry: Entry) -> None:
    tx, params = entry.make(), parameters()
    state = tx.init(params)
    if entry.decays:
        with pytest.raises(ValueError, match="param"):
            jax.eval_shape(tx.update, gradients(params), state)
    else:
        assert avals(jax.eval_shape(tx.update, gradients(params), state)[0]) == avals(params)


@each_entry
def test_a_gradient_tree_of_another_structure_is_an_error(entry: Entry) -> None:
    tx, params = entry.make(), parameters()
    grads = {**gradients(params), "scalar": None}
    with pytest.raises(ValueError, match="None"):
        tx.update(grads, tx.init(params), params)


def test_specs_cover_the_parameters() -> None:
    is_leaf = lambda leaf: isinstance(leaf, P)  # noqa: E731
    assert jax.tree.structure(SPECS, is_leaf=is_leaf) == jax.tree.structure(parameters())
