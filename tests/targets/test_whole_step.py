"""The whole update of a Llama-like tree: in place, and on TPU meshes each chip by itself."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Blocks, MicroAdamLayout, Window, affine4, microadam, top_k

COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")
BLOCKS = Blocks(256, shards=16)  # a row of 4096 has 16 blocks of 256, one for each chip
MICROADAM = microadam(1e-3, layout=MicroAdamLayout(top_k(blocks=BLOCKS), affine4(BLOCKS)))
TREE = {
    "embed": ((32000, 4096), P("fsdp", "tp")),
    "attention": ((4096, 4096), P("fsdp", "tp")),
    "up": ((4096, 8192), P("fsdp", "tp")),
    "down": ((8192, 4096), P("tp", "fsdp")),
    "norm": ((4096,), P()),
}
MINIMUM = 21.5  # bytes moved for each float32 parameter, where the update is applied by XLA


def placed(mesh: Mesh, leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def arguments(mesh: Mesh) -> tuple[Any, Any]:
    """Parameters and state, which carry the parameters' specs verbatim."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in TREE.items()}
    specs = {name: spec for name, (_, spec) in TREE.items()}
    state = optax.tree_utils.tree_map_params(
        MICROADAM,
        lambda leaf, spec: placed(mesh, leaf, spec),
        jax.eval_shape(MICROADAM.init, shapes),
        specs,
        transform_non_params=lambda leaf: placed(mesh, leaf, P()),
    )
    return {name: placed(mesh, shapes[name], specs[name]) for name in TREE}, state


def compiled(function: Callable[..., Any], mesh: Mesh, donate: tuple[int, ...]) -> Any:
    params, state = arguments(mesh)
    jitted = jax.jit(function, donate_argnums=donate)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(params, state, params).lower(lowering_platforms=("tpu",)).compile()


def test_the_update_of_microadam_is_local_and_in_place(tpu_mesh: Mesh) -> None:
    program = compiled(MICROADAM.update, tpu_mesh, donate=(0, 1))
    text, memory = program.as_text(), program.memory_analysis()
    assert "topk_compress" in text
    assert "window_update" in text
    assert COLLECTIVE.findall(text) == []
    _, state = arguments(tpu_mesh)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / tpu_mesh.size
    print(f"temporaries {memory.temp_size_in_bytes / kept:.4f} of the state")
    assert memory.alias_size_in_bytes >= kept
    assert memory.temp_size_in_bytes <= 0.05 * kept


@pytest.mark.xfail(
    reason="the count includes prefetches into VMEM and reads of it: 39 and 86 bytes"
)
def test_the_step_of_microadam_moves_few_bytes(tpu_mesh: Mesh) -> None:
    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = MICROADAM.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    program = compiled(step, tpu_mesh, donate=(1, 2))
    params, _ = arguments(tpu_mesh)
    # What kernels move is their own statement: each operand and each result, once.
    moved = program.cost_analysis()["bytes accessed"] * tpu_mesh.size
    per_parameter = moved / sum(x.size for x in jax.tree.leaves(params))
    print(f"{per_parameter:.2f} bytes per parameter and step")
    assert per_parameter <= 1.1 * MINIMUM


def test_the_update_of_microadam_is_in_place_on_an_h200(h200: Mesh) -> None:
    blocks = Blocks(256)
    optimizer = microadam(
        1e-3,
        layout=MicroAdamLayout(
            top_k(blocks=blocks, implementation="triton"),
            affine4(blocks),
            Window(implementation="triton"),
        ),
    )
    place = NamedSharding(h200, P())
    placed = functools.partial(jax.tree.map, lambda x: x.update(sharding=place))
    params = placed({name: jax.ShapeDtypeStruct(x, jnp.float32) for name, (x, _) in TREE.items()})
    state = placed(jax.eval_shape(optimizer.init, params))
    jitted = jax.jit(optimizer.update, donate_argnums=(0, 1), out_shardings=place)
    with jax.sharding.use_abstract_mesh(h200.abstract_mesh):
        traced = jitted.trace(params, state, params)
        program = traced.lower(lowering_platforms=("cuda",)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert "topk_compress" in text
    assert "window_update" in text
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    print(f"temporaries {memory.temp_size_in_bytes / kept:.4f} of the state")
    assert memory.alias_size_in_bytes >= kept
    assert memory.temp_size_in_bytes <= 0.05 * kept
