"""The planner's step through the compiler of a GPU that need not be there."""

import importlib.util
from typing import Any

import jax
import pytest

from microadam_jax.memory import GIB
from microadam_jax.models import llama
from microadam_jax.optimizer_names import optimizer
from microadam_jax.planner import CompiledPlan, Model, compiled_plan, parse_mesh


def planned(
    topology: str, mesh: str, *, layers: int = 1, remat: bool = True, **sizes: Any
) -> CompiledPlan:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the GPU compiler (jax_cuda13_plugin) is not installed: make test-targets")
    params = llama(layers=1, **sizes)
    stack = jax.tree.map(
        lambda leaf: leaf.update(shape=(layers, *leaf.shape)), params["layers"]["0"]
    )
    model = Model("a few layers", params | {"layers": stack}, llama=True)
    make = optimizer("adamw")
    return compiled_plan(model, make, parse_mesh(mesh), topology, batch=8, seq=128, remat=remat)


def test_a_step_on_the_gpus_of_two_hosts() -> None:
    plan = planned("h200:16", "data=2,fsdp=4,tp=2", hidden=256, intermediate=512, vocab=512)
    assert plan.limit is None
    assert plan.temporaries is not None
    assert plan.plan.parameters + plan.plan.state < plan.total < GIB
    assert {"all-gather", "all-reduce"} <= plan.collectives.keys()


def test_a_step_that_exceeds_the_memory_of_a_gpu() -> None:
    """Its compiler refuses nothing."""
    plan = planned("h200", "", hidden=2**16, intermediate=2**17, vocab=512)
    assert plan.limit == 141 * GIB < plan.total


def test_without_remat_activations_of_all_layers_are_kept() -> None:
    sizes = {"layers": 4, "hidden": 256, "intermediate": 512, "vocab": 512}
    with_remat, without = (planned("h200", "", remat=remat, **sizes) for remat in (True, False))
    assert with_remat.temporaries is not None
    assert without.temporaries is not None
    # In bfloat16 at least query, key, value, what attention mixes, and three arrays of the MLP;
    # of one layer they are there in either case.
    of_layer = 2 * 8 * 128 * (4 * 256 + 3 * 512)
    assert without.temporaries - with_remat.temporaries > 3 * of_layer
