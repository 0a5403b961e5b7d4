"""A step of a low-bit optimizer writes no float32 moment, on accelerators either."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from microadam_jax import (
    adam_mini4bit,
    adamw4bit,
    adamw8bit,
    adamw_fp8,
    fused_apply,
    run_with,
    sinkhorn4bit,
    state_shardings,
)
from microadam_jax.methods import METHODS
from microadam_jax.models import model_shapes
from tests.contracts.meshes import collectives
from tests.llama_100m import llama_100m
from tests.targets.main_memory import bytes_moved

# The others write the momentum of a layer, which they read again as a matrix.
ELEMENTWISE = {
    name: method.factory
    for name, method in METHODS.items()
    if method.kind == "low bits" and "matrices" not in method.parameters
}


def compiled(
    step: Callable[..., Any], tx: Any, params: Any, mesh: Mesh, on: str, donate: tuple[int, ...]
) -> tuple[Any, int]:
    """A compiled step, and the bytes of the state."""
    here = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params = placed(params)
    state = placed(jax.eval_shape(lambda p: tx.init(p), params))
    jitted = jax.jit(step, donate_argnums=donate)
    # The tests have eight devices; a step for one is cut into other chunks.
    with jax.set_mesh(mesh):
        program = jitted.trace(params, state, params).lower(lowering_platforms=(on,)).compile()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return program, kept


def temporaries(
    make: Callable[..., optax.GradientTransformation], mesh: Mesh, on: str, params: Any = None
) -> float:
    """Those of a step with gradient and state donated, of the state's size."""
    tx, params = make(1e-3, weight_decay=0.1), params or llama_100m()
    program, kept = compiled(tx.update, tx, params, mesh, on, (0, 1))
    share = program.memory_analysis().temp_size_in_bytes / kept
    print(f"temporaries of {100 * share:.1f} % of the state")
    return share


def of_one_layer(name: str) -> Any:
    """A model with its embeddings and one of its layers."""
    shapes = model_shapes(name)
    (layers,) = shapes.keys() & {"layers", "h"}
    return {**shapes, layers: {"0": shapes[layers]["0"]}}


@pytest.mark.parametrize("tpu", ["v5e", "v6e"], indirect=True)
@pytest.mark.parametrize("model", ["llama2-7b", "gpt2"])
def test_on_layers_of_real_models(model: str, tpu: Mesh) -> None:
    """Rows of 11008, 32000 and 768 have blocks that fill no registers."""
    assert temporaries(adamw8bit, tpu, "tpu", of_one_layer(model)) < 0.02


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_on_a_tpu(make: Callable[..., optax.GradientTransformation], v5e: Mesh) -> None:
    assert temporaries(make, v5e, "tpu") < 0.11


def test_matrices_of_a_stack_are_turned_in_place(v5e: Mesh) -> None:
    assert temporaries(sinkhorn4bit, v5e, "tpu") < 0.25


@pytest.mark.parametrize("make", [adamw8bit, adamw4bit, adamw_fp8])
def test_on_a_gpu(make: Callable[..., optax.GradientTransformation], h200: Mesh) -> None:
    assert temporaries(make, h200, "cuda") < 0.1


def test_codes_of_4_bits_on_a_gpu_take_a_byte_of_one_leaf(h200: Mesh) -> None:
    """Not of all of them, which the compiler would join in one kernel."""
    tx, params = adam_mini4bit(1e-3, weight_decay=0.1), llama_100m()
    program, _ = compiled(tx.update, tx, params, h200, "cuda", (0, 1))
    largest = max(x.size for x in jax.tree.leaves(params))
    assert program.memory_analysis().temp_size_in_bytes < 1.25 * largest


@pytest.mark.parametrize("make", [adamw8bit, adam_mini4bit, adamw_fp8])
def test_on_two_gpus_no_one_waits(make: Callable[..., Any], h200_mesh: Mesh) -> None:
    mesh = Mesh(h200_mesh.devices.reshape(-1), ("x",))
    tx, spec = make(1e-3), PartitionSpec(None, "x")
    place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, spec))
    params = {"up_proj": {"kernel": place((4096, 11008), "float32")}}
    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(tx, params, jax.tree.map(lambda x: x.sharding, params)),
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(tx.update, donate_argnums=1).trace(params, state, params)
        program = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    assert collectives(program) == []


def test_the_gpu_kernel_is_in_place(h200: Mesh) -> None:
    tx, params = run_with(adamw8bit(1e-3, weight_decay=0.1), implementation="triton"), llama_100m()
    program, kept = compiled(tx.update, tx, params, h200, "cuda", (0, 1))
    assert "blockwise_codec" in program.as_text()
    memory = program.memory_analysis()
    print(f"temporaries of {memory.temp_size_in_bytes / kept:.4f} of the state")
    assert memory.temp_size_in_bytes < 0.02 * kept
    assert memory.alias_size_in_bytes >= kept


# Gradient, parameter twice and state twice; Adam-mini averages the squares of the gradient first.
MINIMUM = {
    adamw8bit: 12 + 2 * 2 * (1 + 4 / 256),
    adamw_fp8: 12 + 2 * 2 * (1 + 5 / 128),
    adam_mini4bit: 4 + 12 + 2 * (0.5 + 4 / 128),
}


@pytest.mark.parametrize("make", MINIMUM)
def test_a_step_moves_what_it_must(make: Callable[..., Any], v5e: Mesh) -> None:
    tx, shapes = make(1e-3, weight_decay=0.1), {"up_proj": {"kernel": (4096, 2048)}}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, "float32"), shapes, is_leaf=is_shape)
    program, kept = compiled(fused_apply(tx), tx, params, v5e, "tpu", (1, 2))
    assert program.memory_analysis().temp_size_in_bytes < 0.01 * kept
    size = sum(x.size for x in jax.tree.leaves(params))
    moved = bytes_moved(program.as_text()) / size
    print(f"{moved:.2f} bytes of main memory for each parameter")
    assert 0.95 * MINIMUM[make] <= moved <= 1.02 * MINIMUM[make]


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)
