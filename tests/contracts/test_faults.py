"""Bad gradients and interrupted steps at every optimizer: no crash, no poisoned state."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from microadam_jax import accumulate_into_residual, microadam, with_diagnostics
from microadam_jax.diagnostics import observing
from microadam_jax.execution import scope
from microadam_jax.methods import METHODS

# The warnings have tests of their own: here parameters follow no rule, or are narrow, on purpose.
pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    pytest.mark.filterwarnings("ignore:.*no rule of the partition names:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*takes more bytes than AdamW:UserWarning"),
]
SAMPLE = ("microadam", "adam_mini4bit")

# One tree, and so one compilation for each optimizer: odd rows, large enough to be compressed, a
# stack, a vector, a scalar, nothing at all; in mixed dtypes.
SHAPES = {
    "w": ((17, 257), jnp.float32),
    "half": ((16, 512), jnp.bfloat16),
    "layers": {"kernel": ((2, 8, 600), jnp.float16)},
    "bias": ((5,), jnp.bfloat16),
    "scalar": ((), jnp.float32),
    "empty": ((0, 4), jnp.float32),
}
ORDINARY = ("normal", "zero", "denormal", "tiny", "large", "one", "alike")
FAULTS = ("nan", "inf", "-inf", "all nan", "overflow")


def gradient(kind: str, seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    random = np.random.default_rng(seed)
    g = random.standard_normal(shape)
    largest = float(jnp.finfo(dtype).max)
    if kind == "one":
        g = np.zeros(shape)
    if kind in ("nan", "inf", "-inf", "one") and g.size:
        g.flat[random.integers(g.size)] = 1.0 if kind == "one" else float(kind)
    scale = {
        "zero": 0.0,
        "denormal": float(jnp.finfo(dtype).smallest_subnormal),
        "tiny": 1e-30,
        # Squares of these are still finite in float32.
        "large": min(1e15, largest / 8),
    }
    g = g * scale.get(kind, 1.0)
    if kind == "alike":
        g = np.ones(shape)
    if kind == "all nan":
        g = np.full(shape, np.nan)
    if kind == "overflow":
        g = np.where(g > 0, np.inf, -np.inf)
    return jnp.asarray(g, dtype)


def tree_of(function: Any) -> Any:
    return jax.tree.map(
        lambda entry: function(*entry), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )


PARAMS = tree_of(lambda shape, dtype: jnp.full(shape, 0.5, dtype))


@functools.cache
def compiled(name: str) -> tuple[Any, Callable[..., Any]]:
    """The first state, and a step that is compiled once for all tests."""
    tx = optax.apply_if_finite(METHODS[name].factory(1e-3), max_consecutive_errors=100)
    return jax.jit(tx.init)(PARAMS), jax.jit(tx.update)


each_name = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.matrix) for name in METHODS],
)


@each_name
def test_any_gradients_in_any_order(name: str) -> None:
    start, update = compiled(name)
    kinds = st.lists(
        st.tuples(st.sampled_from(ORDINARY + FAULTS), st.integers(0, 3)), min_size=1, max_size=5
    )

    @hypothesis.settings(max_examples=15)
    @hypothesis.given(kinds)
    @hypothesis.example([(kind, 0) for kind in ORDINARY + FAULTS])
    def check(steps: list[tuple[str, int]]) -> None:
        state = start
        for kind, seed in steps:
            grads = tree_of(lambda shape, dtype: gradient(kind, seed, shape, dtype))  # noqa: B023
            updates, after = update(grads, state, PARAMS)
            for update_leaf, leaf in zip(
                jax.tree.leaves(updates), jax.tree.leaves(PARAMS), strict=True
            ):
                assert update_leaf.dtype == leaf.dtype
                assert np.isfinite(np.asarray(update_leaf, np.float32)).all(), kind
            if kind in FAULTS:
                jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
            for leaf in jax.tree.leaves(after.inner_state):
                assert np.isfinite(np.asarray(leaf, np.float32)).all(), kind
            state = after

    check()


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@each_name
def test_interrupted_steps_leave_no_trace(name: str) -> None:
    """What is computed from a state and never used, used twice, or used again after a restore."""
    start, update = compiled(name)
    steps = st.lists(
        st.tuples(
            st.sampled_from(ORDINARY + FAULTS),
            st.sampled_from((*FAULTS, "normal", "repeated", "restored")),
        ),
        min_size=2,
        max_size=4,
    )

    @hypothesis.settings(max_examples=5)
    @hypothesis.given(steps)
    @hypothesis.example([("normal", "all nan"), ("one", "restored"), ("large", "repeated")])
    def check(steps: list[tuple[str, str]]) -> None:
        grads = {
            kind: tree_of(lambda shape, dtype: gradient(kind, 1, shape, dtype))  # noqa: B023
            for kind in (*ORDINARY, *FAULTS)
        }
        expected = start
        for kind, _ in steps:
            _, expected = update(grads[kind], expected, PARAMS)

        state = before = start
        previous = None
        for kind, interruption in steps:
            if interruption == "repeated":
                first = update(grads[kind], state, PARAMS)
                assert_same_bits(first, update(grads[kind], state, PARAMS))
            elif interruption == "restored" and previous is not None:
                # The checkpoint is of the step before; that step is taken again.
                saved = jax.tree.map(np.asarray, before)
                _, state = update(previous, jax.tree.map(jnp.asarray, saved), PARAMS)
            elif interruption in grads:
                update(grads[interruption], state, PARAMS)  # and Ctrl-C before it is applied
            before, previous = state, grads[kind]
            _, state = update(previous, before, PARAMS)
        assert_same_bits(state, expected)

    check()


def test_an_interruption_after_donation_is_survived_by_a_copy() -> None:
    start, update = compiled("microadam")
    donating = jax.jit(update.__wrapped__, donate_argnums=1)
    grads = [
        tree_of(lambda shape, dtype: gradient("normal", seed, shape, dtype))  # noqa: B023
        for seed in range(2)
    ]
    saved = jax.tree.map(np.array, start)
    lost = jax.tree.map(jnp.array, saved)
    donating(grads[0], lost, PARAMS)  # Ctrl-C: neither the old state nor the new one is left
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(lost))
    state, expected = jax.tree.map(jnp.array, saved), start
    for g in grads:
        (_, state), (_, expected) = donating(g, state, PARAMS), update(g, expected, PARAMS)
    assert_same_bits(state, expected)


@pytest.mark.parametrize("wrap", [with_diagnostics, lambda tx: accumulate_into_residual(tx, 2)])
def test_an_interruption_while_a_step_is_traced_is_forgotten(wrap: Callable[..., Any]) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    inner = microadam(1e-3)
    tx = wrap(optax.chain(inner, optax.stateless(interrupted)))
    with pytest.raises(KeyboardInterrupt):
        jax.eval_shape(tx.update, PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS)
    assert not observing()
    assert scope().micro_batch is None


@pytest.mark.parametrize("name", METHODS)
def test_a_dropped_leaf_is_an_error(name: str) -> None:
    tx = METHODS[name].factory(1e-3)
    grads = {**PARAMS, "w": None}
    with pytest.raises(ValueError, match=r"None|structure|mismatch"):
        jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, PARAMS), PARAMS)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(256, 64), (1, 64, 256), (64, 1), (256,), ()], ids=str)
def test_a_gradient_of_another_shape_is_an_error(name: str, shape: tuple[int, ...]) -> None:
    """Broadcast, it would move its parameter along numbers that are none of its own."""
    tx, params = METHODS[name].factory(1e-3), {"w": jnp.ones((64, 256)), "b": jnp.ones(64)}
    grads = params | {"w": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"gradient of 'w' has shape .* where its parameter has"):
        jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_other_parameters_is_an_error(name: str) -> None:
    """They may have the same shapes: renamed in another order, or another layer that is frozen."""
    tx, w = METHODS[name].factory(1e-3), jnp.ones((64, 256))
    for before, after in (
        ({"wi": w, "wo": w}, {"up": w, "down": w}),
        ({"wi": w, "wo": None}, {"wi": None, "wo": w}),
    ):
        state = jax.eval_shape(tx.init, before)
        with pytest.raises(ValueError, match=r"None|structure|mismatch"):
            jax.eval_shape(tx.update, after, state, after)
