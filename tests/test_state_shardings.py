"""A sharding for every state array, from shapes alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import (
    adam_mini,
    adamw8bit,
    came,
    memory_report,
    microadam,
    run_with,
    state_shardings,
)
from microadam_jax.methods import METHODS
from tests.contracts.catalogue import (
    ENTRIES,
    SPECS,
    VARIANTS,
    Entry,
    gradients,
    marks_of,
    parameters,
)

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
ALL = ENTRIES | VARIANTS
SHAPES = {
    "w": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
    "b": jax.ShapeDtypeStruct((1024,), jnp.float32),
}


def mesh_of(data: int = 2, fsdp: int = 2, tp: int = 2) -> Mesh:
    return jax.make_mesh(
        (data, fsdp, tp),
        ("data", "fsdp", "tp"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp * tp],
    )


def on(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("zero_axis", [None, "data"])
def test_every_array_has_a_sharding_that_divides_it(name: str, zero_axis: str | None) -> None:
    tx, params = ALL[name].make(), jax.eval_shape(parameters)
    shardings = state_shardings(tx, params, on(mesh_of(), SPECS), zero_axis=zero_axis)
    shapes = jax.eval_shape(lambda p: tx.init(p), params)
    # shard_shape refuses what does not divide, and tree.map another structure.
    jax.tree.map(lambda shape, sharding: sharding.shard_shape(shape.shape), shapes, shardings)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition(
            {"ours": tx, "frozen": optax.set_to_zero()}, {"w": "ours", "b": "frozen"}
        ),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    ],
    ids=["masked", "partition", "MultiSteps", "apply_if_finite", "chain"],
)
def test_wrappers_are_looked_through(wrap: Any) -> None:
    tx = wrap(microadam(1e-3))
    shardings = state_shardings(tx, SHAPES, on(mesh_of(), {"w": P("fsdp", "tp"), "b": P()}))
    residual = optax.tree_utils.tree_get(shardings, "residual")
    assert residual.codes["w"].spec == P("fsdp", "tp")
    assert optax.tree_utils.tree_get_all_with_path(shardings, "count")[0][1].spec == P()
    jax.tree.map(lambda *_: None, jax.eval_shape(tx.init, SHAPES), shardings)


def test_states_of_other_libraries_get_a_valid_sharding() -> None:
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    shardings = state_shardings(tx, SHAPES, on(mesh_of(), {"w": P("fsdp", "tp"), "b": P("tp")}))
    shapes = jax.eval_shape(tx.init, SHAPES)
    jax.tree.map(lambda shape, sharding: sharding.shard_shape(shape.shape), shapes, shardings)


def test_axes_of_size_one_are_whole_and_no_axis_is_cut_unevenly() -> None:
    shardings = state_shardings(came(1e-3), SHAPES, on(mesh_of(), {"w": P("fsdp", "tp"), "b": P()}))
    shapes = jax.eval_shape(came(1e-3).init, SHAPES)
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        assert all(
            size > 1 or not names for size, names in zip(leaf.shape, sharding.spec, strict=False)
        )


def test_one_sharding_may_stand_for_all_and_boxes_may_stay_or_go() -> None:
    sharding = NamedSharding(mesh_of(), P("fsdp"))
    boxed = {k: nn.LogicallyPartitioned(v, ("in", "out")[: v.ndim]) for k, v in SHAPES.items()}
    expected = jax.tree.leaves(state_shardings(microadam(1e-3), SHAPES, sharding))
    for given in (sharding, {"w": sharding, "b": sharding}):
        found = state_shardings(microadam(1e-3), boxed, given)
        assert jax.tree.leaves(found) == expected
    target = jax.eval_shape(microadam(1e-3).init, boxed)
    jax.tree.map(lambda *_: None, target, found)


def test_nnx_variables() -> None:
    with jax.set_mesh(mesh_of()):
        model = nnx.eval_shape(lambda: nnx.Linear(512, 1024, rngs=nnx.Rngs(0)))
        params = nnx.state(model, nnx.Param)
        mesh = mesh_of()
        given = jax.tree.map(lambda leaf: NamedSharding(mesh, P("fsdp")), params)
        found = state_shardings(adamw8bit(1e-3), params, given)
    assert {leaf.spec[0] for leaf in jax.tree.leaves(found) if len(leaf.spec)} == {"fsdp"}


class TestZero:
    """States cut over the data axis, along which parameters are replicated."""

    def test_the_first_axis_that_divides_in_all_arrays_of_a_parameter(self) -> None:
        specs = {"w": P("fsdp", "tp"), "b": P()}
        tx = adam_mini(1e-3)
        found = state_shardings(tx, SHAPES, on(mesh_of(), specs), zero_axis="data")
        mu = optax.tree_utils.tree_get(found, "mu")
        assert mu["w"].spec == P(("fsdp", "data"), "tp")
        assert mu["b"].spec == P("data")

    def test_what_cannot_divide_stays_as_the_parameter(self) -> None:
        odd = {"w": jax.ShapeDtypeStruct((511, 7), jnp.float32)}
        found = state_shardings(adam_mini(1e-3), odd, on(mesh_of(), P()), zero_axis="data")
        assert optax.tree_utils.tree_get(found, "mu")["w"].spec == P()

    def test_a_parameter_that_is_cut_along_it_already_stays(self) -> None:
        mesh = mesh_of()
        found = state_shardings(adam_mini(1e-3), SHAPES, on(mesh, P("data")), zero_axis="data")
        assert optax.tree_utils.tree_get(found, "mu")["w"].spec == P("data")

    @pytest.mark.parametrize("name", ["microadam, all compressed", "adamw8bit"])
    def test_the_numbers_are_those_of_one_device(self, name: str) -> None:
        entry: Entry = ENTRIES[name]
        tx, params, mesh = entry.make(), parameters(), mesh_of()
        placed = on(mesh, jax.tree.map(lambda _: P(), params))
        sharded = jax.device_put(params, placed)
        where = state_shardings(tx, params, placed, zero_axis="data")
        state = jax.jit(tx.init, out_shardings=where)(sharded)
        update = jax.jit(tx.update, out_shardings=(placed, where))
        expected = tx.init(params)
        for step in range(3):
            grads = gradients(params, step)
            _, state = update(jax.device_put(grads, placed), state, sharded)
            _, expected = jax.jit(tx.update)(grads, expected, params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
        # Scales may be rounded otherwise in another program; codes are the same.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, expected)


AS_MARKED = [pytest.param(name, marks=marks_of(name)) for name in ALL]


@pytest.mark.parametrize("name", AS_MARKED)
def test_zero_on_explicit_axes(name: str) -> None:
    """A gradient is whole in its type there, and the state is cut."""
    tx, params = ALL[name].make(), parameters()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    placed = on(mesh, jax.tree.map(lambda _: P(), params))
    where = state_shardings(tx, params, placed, zero_axis="data")
    grads = gradients(params)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.set_mesh(mesh):
        given = jax.device_put(params, placed)
        state = jax.jit(tx.init, out_shardings=where)(given)
        step = jax.jit(tx.update, out_shardings=(placed, where))
        updates, after = step(jax.device_put(grads, placed), state, given)
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == where
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updates, expected
    )


@pytest.mark.parametrize("name", AS_MARKED)
@pytest.mark.parametrize("manual", [False, True], ids=["auto", "manual"])
def test_an_auto_or_manual_axis_beside_an_explicit_one(name: str, manual: bool) -> None:
    """Many of JAX's functions know shardings of types only if all axes are Explicit."""
    tx, params = ALL[name].make(), parameters()
    axes = (AxisType.Explicit if manual else AxisType.Auto, AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=axes, devices=jax.devices()[:4])
    specs = jax.tree.map(lambda x: P(*[None] * (x.ndim - 1), "tp") if x.size > 256 else P(), params)
    grads = gradients(params)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.set_mesh(mesh):
        given, g = (jax.device_put(tree, on(mesh, specs)) for tree in (params, grads))
        state = jax.jit(tx.init)(given)
        update = lambda g, state, params: tx.update(g, state, params)[0]  # noqa: E731
        if manual:
            update = jax.shard_map(update, in_specs=P(), out_specs=P(), axis_names={"data"})
        updates = jax.jit(update)(g, state, given)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updates, expected
    )


def test_states_in_host_memory_are_fetched_for_the_step() -> None:
    tx, params, mesh = adamw8bit(1e-3), jax.tree.map(lambda s: jnp.ones(s.shape), SHAPES), mesh_of()
    placed = on(mesh, {"w": P("fsdp", "tp"), "b": P()})
    sharded = jax.device_put(params, placed)
    on_host = state_shardings(tx, params, placed, memory_kind="pinned_host")
    on_device = state_shardings(tx, params, placed)
    mu = optax.tree_utils.tree_get(on_host, "mu")
    assert {leaf.memory_kind for leaf in jax.tree.leaves(mu)} == {"pinned_host"}

    def step(grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, jax.device_put(state, on_device), sharded)
        return updates, state

    state = jax.device_put(jax.jit(tx.init, out_shardings=on_device)(sharded), on_host)
    updates, state = jax.jit(step, out_shardings=(placed, on_host))(sharded, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == on_host
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_arrays_that_stay_whole_are_named_with_what_they_cost() -> None:
    # 16 blocks in a row of 4096: they divide over 8 devices, and not over 3.
    params = {"w": jax.ShapeDtypeStruct((6144, 4096), jnp.float32)}

    def place(size: int, spec: P, **options: Any) -> Any:
        mesh = jax.make_mesh((size,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:size])
        return state_shardings(microadam(1e-3), params, on(mesh, {"w": spec}), **options)

    place(8, P(None, "fsdp"))
    place(3, P("fsdp"))
    place(8, P(), zero_axis="fsdp")
    report = memory_report(microadam(1e-3), params)
    extra = report.total * 2 / 3 / 2**20
    with pytest.warns(UserWarning, match=rf"^5 arrays .* {extra:.1f} MiB more of each device") as w:
        place(3, P(None, "fsdp"))
    assert "0/residual/codes/w (8.0 MiB), 1/window_values/w (" in str(w[0].message)
    assert w[0].filename == __file__
    odd = {"w": jax.ShapeDtypeStruct((1021, 1021), jnp.float32)}
    with pytest.warns(UserWarning, match="mu/w"):
        state_shardings(adam_mini(1e-3), odd, on(mesh_of(), P()), zero_axis="data")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"zero_axis": "rows"}, "no axis of the mesh, which has data, fsdp, tp"),
        ({"memory_kind": "attic"}, "'attic' is none of these devices.*pinned_host"),
    ],
)
def test_mistakes(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        state_shardings(microadam(1e-3), SHAPES, on(mesh_of(), P()), **arguments)


def test_other_shardings_and_trees_without_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of NamedSharding.*got a P"):
        state_shardings(microadam(1e-3), SHAPES, P())
    with pytest.raises(ValueError, match="no parameters"):
        state_shardings(microadam(1e-3), {}, {})


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ({"w": P()}, "have none for 'b'"),
        ({"w": P(), "b": P(), "c": {"d": P()}}, "have one for no parameter at 'c/d'"),
        ({"w": P(), "bias": P()}, "have none for 'b' and have one for no parameter at 'bias'"),
        ([P(), P()], "have none for 'b', 'w' and have one for no parameter at '0', '1'"),
        (P(None, "fsdp"), r"cut 'b' of shape \(1024,\) as .*, which has more axes"),
    ],
    ids=str,
)
def test_shardings_of_another_tree_are_refused(specs: Any, sentence: str) -> None:
    shardings, tx = on(mesh_of(), specs), microadam(1e-3)
    with pytest.raises(ValueError, match=f"param_shardings .*{sentence}"):
        state_shardings(tx, SHAPES, shardings)
    with pytest.raises(ValueError, match=f"shardings .*{sentence}"):
        jax.eval_shape(run_with(tx, shardings=shardings).init, SHAPES)


def test_a_restored_state_does_not_hide_that_shardings_are_of_another_tree() -> None:
    tx = run_with(microadam(1e-3), shardings=on(mesh_of(), {"w": P()}))
    state = jax.eval_shape(microadam(1e-3).init, SHAPES)
    with pytest.raises(ValueError, match="shardings have none for 'b'"):
        jax.eval_shape(tx.update, SHAPES, state, SHAPES)


@pytest.mark.parametrize("spec", [P("fsdp", "tp"), P("fsdp"), P(None, "fsdp")], ids=str)
@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.kind == "subspace"])
def test_a_rank_is_whole_and_a_step_keeps_it_so_on_explicit_axes(name: str, spec: P) -> None:
    # Trailing Nones say nothing.
    def spec_of(leaf: Any) -> tuple[Any, ...]:
        entries = [*leaf.sharding.spec]
        while entries and entries[-1] is None:
            entries.pop()
        return tuple(entries)

    tx = METHODS[name].factory(1e-2, **METHODS[name].at_rank(16))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = {"up": {"kernel": NamedSharding(mesh, spec)}}
        for shape in (256, 512), (512, 256):
            params = {"up": {"kernel": jnp.ones(shape, device=placed["up"]["kernel"])}}
            found = state_shardings(tx, params, placed)
            state = tx.init(params)
            wanted = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), state)
            same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), found, wanted, state)
            assert jax.tree.all(same)
            _, new = jax.eval_shape(tx.update, params, state, params)
            before = jax.eval_shape(lambda x: x, state)
            assert jax.tree.map(spec_of, new) == jax.tree.map(spec_of, before)
