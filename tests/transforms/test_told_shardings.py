"""On Auto axes the kernels of MicroAdam run where the user says that parameters lie."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Blocks, MicroAdamLayout, Window, fused_apply, microadam, run_with, top_k
from microadam_jax.codecs import affine4
from tests.contracts.meshes import collectives

BLOCKS = Blocks(256, shards=4)
SPECS = {"kernel": P("a", "b"), "stacked": P(None, None, "b"), "norm": P()}
SHAPES = {"kernel": (16, 1024), "stacked": (2, 8, 1024), "norm": (32,)}


def optimizer(implementation: str | None, shardings: Any = None) -> Any:
    layout = MicroAdamLayout(top_k(blocks=BLOCKS), affine4(BLOCKS), Window(2))
    tx = microadam(1e-2, weight_decay=0.1, layout=layout)
    return run_with(tx, implementation=implementation, shardings=shardings)


def steps(tx: Any, params: Any, *, fused: bool) -> tuple[Any, Any]:
    """Parameters and state after two steps, and the program."""

    def in_two(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    step = jax.jit(fused_apply(tx) if fused else in_two).lower(params, state, params).compile()
    grads = params
    for _ in range(2):
        params, state = step(grads, state, params)
    return (params, state), step.as_text()


def placed(params: Any) -> tuple[Any, Any]:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return jax.device_put(params, shardings), shardings


@pytest.fixture
def params() -> Any:
    keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0), len(SHAPES)), strict=True))
    return {name: jax.random.normal(keys[name], shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("fused", [False, True], ids=["updates", "fused"])
def test_kernels_on_auto_axes_give_the_bits_of_one_device_without_collectives(
    fused: bool, params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl, "pallas_call", interpreted(pl.pallas_call))
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, _: x)
    expected, _ = steps(optimizer("mosaic_tpu"), params, fused=fused)
    sharded, shardings = placed(params)
    found, program = steps(optimizer("mosaic_tpu", shardings), sharded, fused=fused)
    assert collectives(program) == []
    same(found, expected)
    for name in SPECS:
        assert found[0][name].sharding.is_equivalent_to(shardings[name], len(SHAPES[name]))


def same(found: Any, expected: Any) -> None:
    """The same bits; XLA alone computes the leaf kept dense, and may contract other sums."""

    def compare(path: Any, one: jax.Array, other: jax.Array) -> None:
        dense = "norm" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, other, rtol=1e-6 if dense else 0)

    jax.tree.map_with_path(compare, found, expected)


def interpreted(pallas_call: Any) -> Any:
    return lambda *arguments, interpret, **options: pallas_call(
        *arguments, interpret=True, **options
    )


def test_where_no_kernel_runs_they_change_nothing(params: Any) -> None:
    expected, _ = steps(optimizer(None), params, fused=True)
    sharded, shardings = placed(params)
    found, program = steps(optimizer(None, shardings), sharded, fused=True)
    assert collectives(program) == []
    same(found, expected)


def test_without_them_a_named_kernel_says_what_to_do(params: Any) -> None:
    sharded, shardings = placed(params)
    tx = optimizer("mosaic_tpu")
    with (
        jax.set_mesh(shardings["kernel"].mesh),
        pytest.raises(NotImplementedError, match=r"Auto axes.*give run_with\(tx, shardings="),
    ):
        jax.eval_shape(tx.update, sharded, tx.init(sharded), sharded)


def test_a_prefix_will_do_and_masked_leaves_need_none(params: Any) -> None:
    _, shardings = placed(params)
    nested = {"layer": params, "head": {"kernel": params["kernel"]}, "frozen": None}
    prefix = {"layer": shardings, "head": shardings["kernel"], "frozen": None}
    tx = optax.masked(optimizer(None, prefix), {"layer": True, "head": False, "frozen": True})
    jax.eval_shape(tx.update, nested, tx.init(nested), nested)


def test_anything_but_a_named_sharding_is_refused() -> None:
    with pytest.raises(TypeError, match=r"at \['kernel'\] it has .*Give NamedSharding"):
        run_with(microadam(1e-2), shardings={"kernel": "fsdp"})
