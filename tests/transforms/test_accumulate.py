"""Micro-batches added up in the residual: the step of their mean, and no accumulator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Blocks,
    MicroAdamLayout,
    Window,
    accumulate_into_residual,
    adam_mini,
    error_feedback,
    ldadam,
    lowrank_mfac,
    memory_report,
    microadam,
    project_gradients,
    top_k,
)
from microadam_jax.codecs import affine4
from microadam_jax.compressors import power_sgd
from microadam_jax.subspace import power_iteration

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
COMPRESSOR = top_k(count=3, blocks=Blocks(64), min_row=0)
EXACT = MicroAdamLayout(COMPRESSOR, "float32", Window(3))
PARAMS = {"w": jnp.ones((16, 512)), "half": jnp.ones((8, 512), jnp.bfloat16), "bias": jnp.ones(7)}


def gradients(steps: int) -> list[Any]:
    random = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape), p.dtype), PARAMS)
        for _ in range(steps)
    ]


def run(
    tx: optax.GradientTransformation, grads: list[Any], params: Any = PARAMS
) -> tuple[list[Any], Any]:
    update, state, updates = jax.jit(tx.update), jax.jit(tx.init)(params), []
    for g in grads:
        moved, state = update(g, state, params)
        updates.append(moved)
    return updates, state


@pytest.mark.parametrize(
    "inner",
    [
        microadam(1e-2, layout=EXACT),
        lowrank_mfac(
            1e-2, compressor=power_sgd(2), residual="float32", window=Window(3, "float32")
        ),
        ldadam(1e-2, rank=4),
    ],
    ids=["microadam", "lowrank_mfac", "ldadam"],
)
def test_an_exact_residual_gives_the_step_of_the_mean(inner: Any) -> None:
    grads = gradients(6)
    ours, _ = run(accumulate_into_residual(inner, 2), grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(ours[::2]))
    means = [
        jax.tree.map(lambda a, b: (a.astype(jnp.float32) + b) / 2, *grads[i : i + 2])
        for i in (0, 2, 4)
    ]
    expected, _ = run(inner, means)
    for one, other in zip(jax.tree.leaves(ours[1::2]), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        scale = float(jnp.abs(other).max())
        rounding = 1e-2 if one.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(one, other, rtol=rounding, atol=rounding * scale)


def test_state_is_that_of_the_method_but_for_what_is_dense() -> None:
    def size(tx: optax.GradientTransformation) -> int:
        return memory_report(tx, PARAMS).total

    inner = microadam(1e-2)
    assert size(accumulate_into_residual(inner, 8)) == size(inner) + 4 + 3 * PARAMS["bias"].size


def test_only_steps_reach_the_schedule_and_the_window() -> None:
    tx = accumulate_into_residual(microadam(optax.linear_schedule(1.0, 0.0, 4), layout=EXACT), 3)
    _, state = run(tx, gradients(7))
    counts = [int(x) for _, x in optax.tree_utils.tree_get_all_with_path(state, "count")]
    assert set(counts) == {2}
    assert int(state.micro_step) == 1
    _, before = run(tx, gradients(6))
    for field in ("window_values", "window_indices"):
        get = optax.tree_utils.tree_get
        jax.tree.map(np.testing.assert_array_equal, get(state, field), get(before, field))


def test_every_micro_batch_is_rounded_with_bits_of_its_own() -> None:
    layout = MicroAdamLayout(COMPRESSOR, affine4(64, rounding="stochastic"), Window(3))
    inner = microadam(1e-2, layout=layout)
    tx = accumulate_into_residual(inner, 1000)
    g = jnp.asarray(np.linspace(-1, 1, 16 * 512).reshape(16, 512), jnp.float32)
    _, state = run(tx, [g] * 200, g)
    residual = optax.tree_utils.tree_get(state, "residual")
    found = layout.residual.decode(residual, g.shape)
    level = float((residual.high - residual.low).max()) / 15
    # Independent roundings of a level each, of which 200 add up; alike ones would to 200 levels.
    assert float(jnp.abs(found - 0.2 * g).max()) < 5 * np.sqrt(200) / 2 * level


def test_a_bad_micro_batch_is_skipped_and_scan_carries_on() -> None:
    tx = optax.apply_if_finite(accumulate_into_residual(microadam(1e-2), 2), 5)
    grads = [g["w"] for g in gradients(4)]
    _, expected = run(tx, grads, PARAMS["w"])
    stacked = jnp.stack([grads[0], jnp.full_like(grads[0], jnp.nan), *grads[1:]])

    def body(state: Any, g: jax.Array) -> tuple[Any, None]:
        return tx.update(g, state, PARAMS["w"])[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, stacked))(tx.init(PARAMS["w"]))
    for one, other in zip(
        jax.tree.leaves(state.inner_state), jax.tree.leaves(expected.inner_state), strict=True
    ):
        # The compiler may contract the loop body otherwise, which moves a code by one level.
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (np.abs(one - other) > 1e-5 * np.abs(other)).sum() <= 0.01 * one.size


def test_clipping_before_it_is_of_each_micro_batch() -> None:
    inner = microadam(1e-2, layout=EXACT)
    clip = optax.clip_by_global_norm(1.0)
    grads, params = [g["w"] for g in gradients(2)], PARAMS["w"]
    within, _ = run(accumulate_into_residual(optax.chain(clip, inner), 2), grads, params)
    before, _ = run(optax.chain(clip, accumulate_into_residual(inner, 2)), grads, params)
    jax.tree.map(np.testing.assert_array_equal, within, before)


def refused(tx: optax.GradientTransformation) -> str:
    with pytest.raises(ValueError, match="finds no error feedback") as error:
        jax.eval_shape(tx.init, PARAMS)
    return str(error.value)


def test_methods_without_a_residual_are_refused() -> None:
    labels = {"w": "ours", "half": "ours", "bias": "adam"}
    parts = optax.partition({"ours": microadam(1e-3), "adam": optax.adam(1e-3)}, labels)
    assert "3 of 3 parameters" in refused(accumulate_into_residual(adam_mini(1e-3), 2))
    assert "1 of 3 parameters (bias)" in refused(accumulate_into_residual(parts, 2))
    inside = optax.partition(
        {"ours": accumulate_into_residual(microadam(1e-3), 2), "adam": optax.adam(1e-3)}, labels
    )
    jax.eval_shape(lambda: inside.update(PARAMS, inside.init(PARAMS), PARAMS))
    # In the subspace there is a residual, and it is of another basis when that changes.
    within = project_gradients(error_feedback(COMPRESSOR), power_iteration(4))
    assert "3 of 3" in refused(accumulate_into_residual(within, 2))


def test_a_link_before_it_that_remembers_is_refused() -> None:
    """Of micro-batches 1, 0, 1, 0 it would keep the zeros alone."""
    momentum = optax.trace(0.9)
    for inner in (
        optax.chain(momentum, microadam(1e-3)),
        optax.masked(optax.chain(optax.clip_by_global_norm(1.0), momentum, microadam(1e-3)), True),
    ):
        with pytest.raises(ValueError, match="TraceState before the error feedback keeps arrays"):
            jax.eval_shape(accumulate_into_residual(inner, 2).init, PARAMS)
    counting = optax.scale_by_schedule(lambda count: 1.0)
    for inner in (optax.chain(counting, microadam(1e-3)), optax.chain(microadam(1e-3), momentum)):
        jax.eval_shape(accumulate_into_residual(inner, 2).init, PARAMS)


def test_a_jitted_update_inside_is_refused_and_not_taken_from_its_cache() -> None:
    inner = microadam(1e-3)
    jitted = optax.GradientTransformationExtraArgs(inner.init, jax.jit(inner.update))
    tx = accumulate_into_residual(jitted, 2)
    with pytest.raises(ValueError, match="before it is jitted"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("every_k", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_numbers_that_are_no_count_of_micro_batches(every_k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every_k must be"):
        accumulate_into_residual(microadam(1e-3), every_k)
