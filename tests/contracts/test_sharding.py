"""States shard like their parameters, and the step talks to no other device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Partition, microadam, scale_by_adam_mini
from microadam_jax.compressors import PowerSGD
from microadam_jax.layout.axes import Axes, Fused
from tests.contracts.catalogue import (
    ENTRIES,
    SPECS,
    VARIANTS,
    Entry,
    gradients,
    marks_of,
    parameters,
)
from tests.contracts.meshes import AXES, collectives, mesh_of, place

LAYOUTS = {
    "fsdp and tensor": SPECS,
    "fsdp": {**SPECS, "attention": {"kernel": P(("fsdp", "tp")), "bias": P()}},
    "tensor": {**SPECS, "attention": {"kernel": P(None, "tp"), "bias": P("tp")}, "stacked": P()},
}
SHARDED = {
    **ENTRIES,
    **VARIANTS,
    "microadam, paper": Entry(microadam, {"learning_rate": 1e-2, "layout": "paper"}),
}
# Blocks as long as the row cannot be cut: the paper's layout shards leading axes only.
WHOLE_ROWS = {
    **SPECS,
    "attention": {"kernel": P(("fsdp", "tp")), "bias": P()},
    "stacked": P(None, ("tp", "fsdp")),
}


def specs_for(name: str, layout: str) -> Any:
    return WHOLE_ROWS if "paper" in name else LAYOUTS[layout]


def whole_where_one(leaf: Any, spec: P) -> P:
    """The spec, verbatim where no axis that it shards has size 1."""
    axes = list(zip(leaf.shape, spec, strict=False))
    if not any(n == 1 and names for n, names in axes):
        return spec
    return P(*(None if n == 1 else names for n, names in axes))


def state_shardings(
    tx: optax.GradientTransformation, params: Any, specs: Any, mesh: jax.sharding.Mesh
) -> Any:
    """The parameter's spec, verbatim, on each of its state leaves but those that are shared."""
    shapes = jax.eval_shape(lambda p: tx.init(p), params)
    return optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, spec: NamedSharding(mesh, whole_where_one(leaf, spec)),
        shapes,
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )


# Every layout for one of them; for the others the one that shards every axis. What is explicit in
# types is compiled as on Auto axes, where the sample has to do.
CASES = [
    *(
        pytest.param(
            *(name, "fsdp and tensor", mode),
            marks=pytest.mark.matrix if marks_of(name) and mode == "auto" else marks_of(name),
        )
        for name in SHARDED
        for mode in AXES
    ),
    *(
        ("microadam, all compressed", layout, mode)
        for layout in ("fsdp", "tensor")
        for mode in AXES
    ),
]


@pytest.mark.parametrize(("name", "layout", "mode"), CASES)
def test_no_collective_and_the_same_bits_as_one_device(name: str, layout: str, mode: str) -> None:
    entry = SHARDED[name]
    tx = entry.make()
    params = parameters()
    expected_state = tx.init(params)
    alone = jax.jit(tx.update)
    for step in range(4):
        expected, expected_state = alone(gradients(params, step), expected_state, params)

    specs, mesh = specs_for(name, layout), mesh_of(mode)
    with jax.set_mesh(mesh):
        sharded = place(params, specs, mesh)
        if entry.projects:  # with the rank in place of an axis, as init places it
            shardings = jax.tree.map(lambda leaf: leaf.sharding, tx.init(sharded))
        else:
            shardings = state_shardings(tx, sharded, specs, mesh)
        state = jax.jit(tx.init, out_shardings=shardings)(sharded)
        grads = [place(gradients(params, step), specs, mesh) for step in range(4)]
        # Explicit axes carry the placement themselves.
        placements = jax.tree.map(lambda leaf: leaf.sharding, (sharded, state))
        jitted = jax.jit(tx.update, out_shardings=placements if mode == "auto" else None)
        update = jitted.lower(grads[0], state, sharded).compile()
        found = collectives(update.as_text())
        types = jax.tree.map(jax.typeof, (sharded, state))
        for gradient in grads:
            updates, state = update(gradient, state, sharded)
        assert jax.tree.map(jax.typeof, (updates, state)) == types
    if entry.projects:
        # Which of them gather a gradient, and when, is tested with the subspaces.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, (updates, state), (expected, expected_state))
        return
    if entry.shares:
        # Sums over the devices of one number for each output, or row: here 512 at most. A power
        # iteration of rank 2 sums two for each column, of two layers.
        low_rank = isinstance(entry.arguments.get("compressor"), PowerSGD)
        assert {kind for kind, _ in found} <= {"all-reduce"}
        assert all(size <= (1024 if low_rank else 512) for _, size in found)
        if entry.couples and not low_rank:
            # The inner products of the newest row with the three of the window, and nothing else.
            assert found
            assert all(size == 3 for _, size in found)

        def close(one: jax.Array, other: jax.Array) -> None:
            # Inner products of a model, and factors, have the rounding error of their sums.
            scale = np.abs(other).max(initial=1) if entry.couples else 0.01
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)

        jax.tree.map(close, (updates, state), (expected, expected_state))
        return
    assert found == []
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    # XLA contracts a * b + c in the vectorized part of a loop and not in its remainder, so the
    # last bit of an update can depend on how many elements a device has.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-7), updates, expected)


@pytest.mark.parametrize("mode", AXES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in SHARDED])
def test_state_made_eagerly_lies_where_its_parameter_lies(name: str, mode: str) -> None:
    tx, specs, mesh = SHARDED[name].make(), specs_for(name, "fsdp and tensor"), mesh_of(mode)
    with jax.set_mesh(mesh):
        params = place(parameters(), specs, mesh)
        pairs: list[tuple[jax.Array, jax.Array]] = []
        optax.tree_utils.tree_map_params(
            tx, lambda leaf, param: pairs.append((leaf, param)), tx.init(params), params
        )
    for leaf, parameter in pairs:
        if SHARDED[name].projects:
            for n, size, names in zip(
                leaf.shape, parameter.shape, parameter.sharding.spec, strict=False
            ):
                assert n != size or n in (1, 4) or names in leaf.sharding.spec
        elif SHARDED[name].shares:
            shared = NamedSharding(mesh, whole_where_one(leaf, parameter.sharding.spec))
            assert leaf.sharding.is_equivalent_to(shared, leaf.ndim)
        else:
            assert leaf.sharding.spec == parameter.sharding.spec


# Operation by operation, which takes long; types are those of tracing, and so of the steps above.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["microadam, all compressed", "adam_mini", "adamw8bit"])
def test_explicit_types_of_an_eager_step_do_not_change(name: str) -> None:
    tx, specs, mesh = SHARDED[name].make(), specs_for(name, "fsdp and tensor"), mesh_of("explicit")
    with jax.set_mesh(mesh):
        params = place(parameters(), specs, mesh)
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        updates, eager = tx.update(place(gradients(params), specs, mesh), state, params)
        assert jax.tree.map(jax.typeof, eager) == types
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types


def test_a_spec_that_does_not_divide_the_blocks_is_refused_with_the_remedy() -> None:
    mesh = mesh_of("auto")
    tx = microadam(1e-3)
    params = jax.device_put(jnp.zeros((64, 512)), NamedSharding(mesh, P(None, ("fsdp", "tp"))))
    with pytest.raises(ValueError, match=r"\(64, 512\) is sharded.*Blocks\(shards=\.\.\.\)"):
        tx.init(params)


def test_entries_use_blocks_that_divide_over_the_mesh() -> None:
    entry: Entry = ENTRIES["microadam, all compressed"]
    layout = entry.arguments["layout"].compressor.blocks.layout(512)
    assert layout.count % 8 == 0


HEADS = {
    "whole heads": (Axes("in | (heads head_dim) -> heads", heads=8), (16, 96)),
    "split heads": (Axes("in | (heads head_dim) -> heads", heads=3), (16, 96)),
    "three axes": ("in | heads head_dim -> heads", (16, 8, 12)),
    "fused": (
        Fused(
            (Axes("in | (heads head_dim) -> heads", heads=2), Axes("in | out -> out")),
            shares=(1, 1),
        ),
        (16, 96),
    ),
}


@pytest.mark.parametrize("mode", AXES)
@pytest.mark.parametrize(
    "spec", [P("fsdp", "tp"), P(None, ("fsdp", "tp")), P(("fsdp", "tp"))], ids=str
)
@pytest.mark.parametrize("axes", HEADS)
def test_a_block_may_lie_on_any_devices(axes: str, spec: P, mode: str) -> None:
    """The mean is the global one; nothing of the gradient's size moves."""
    rule, shape = HEADS[axes]
    tx, mesh = scale_by_adam_mini(partition=Partition((("", rule),))), mesh_of(mode)
    gradient = gradients(jnp.zeros(shape))
    expected, expected_state = jax.jit(tx.update)(gradient, tx.init(gradient))
    with jax.set_mesh(mesh):
        gradient = jax.device_put(gradient, NamedSharding(mesh, spec))
        state = tx.init(gradient)
        update = jax.jit(tx.update).lower(gradient, state).compile()
        updates, after = update(gradient, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    found = collectives(update.as_text())
    outputs = math.prod(shape[1:])
    blocks = after.nu.size
    if axes in ("whole heads", "three axes") and spec == P(None, ("fsdp", "tp")):
        assert found == []
    if axes == "three axes":
        assert {kind for kind, _ in found} <= {"all-reduce"}
        assert all(size <= blocks for _, size in found)
    assert all(size <= outputs for _, size in found)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, (updates, after), (expected, expected_state))
