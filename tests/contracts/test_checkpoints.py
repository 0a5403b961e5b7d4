"""Orbax saves every state, and what is restored goes on bit for bit, on any mesh."""

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from microadam_jax import microadam
from tests.contracts.catalogue import ENTRIES, SPECS, VARIANTS, gradients, parameters
from tests.contracts.test_sharding import mesh_of, place, state_shardings

pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::UserWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]

RESUMED = ENTRIES | VARIANTS


def saveable() -> tuple[Any, Any]:
    """The contract's parameters without the zero-size leaf, which Orbax refuses, and specs."""
    params, specs = parameters(), dict(SPECS)
    del params["empty"], specs["empty"]
    return params, specs


def run(tx: optax.GradientTransformation, params: Any, state: Any, steps: range) -> Any:
    update = jax.jit(tx.update)
    for step in steps:
        _, state = update(gradients(params, step), state, params)
    return state


@pytest.mark.parametrize("name", [name for name in RESUMED if name != "microadam"])
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    tx, (params, _) = RESUMED[name].make(), saveable()
    halfway = run(tx, params, tx.init(params), range(5))  # the window of 3 has wrapped
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(lambda p: tx.init(p), params)
        )
    jax.tree.map(np.testing.assert_array_equal, restored, halfway)
    straight = run(tx, params, halfway, range(5, 8))
    jax.tree.map(np.testing.assert_array_equal, run(tx, params, restored, range(5, 8)), straight)


@pytest.mark.parametrize("devices", [(1, 2), (4, 2)], ids=str)
def test_restores_on_another_mesh(devices: tuple[int, int], tmp_path: Path) -> None:
    tx, (params, specs) = ENTRIES["microadam, all compressed"].make(), saveable()
    halfway = run(tx, params, tx.init(params), range(4))
    mesh = mesh_of("auto", devices)
    sharded = place(params, specs, mesh)
    target = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        jax.eval_shape(lambda p: tx.init(p), params),
        state_shardings(tx, params, specs, mesh),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    assert restored[0].residual.codes["stacked"].sharding.spec == P(None, ("fsdp", "tp"))
    expected = run(tx, params, halfway, range(4, 7))
    update = jax.jit(tx.update)
    for step in range(4, 7):
        _, restored = update(place(gradients(params, step), specs, mesh), restored, sharded)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_another_block_size_is_refused(tmp_path: Path) -> None:
    params, _ = saveable()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", microadam(1e-3, layout="paper").init(params))
        checkpointer.wait_until_finished()
        other = jax.eval_shape(lambda p: microadam(1e-3).init(p), params)
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(tmp_path / "state", other)
    gc.collect()  # Orbax leaves reads behind; their warnings belong to this test
