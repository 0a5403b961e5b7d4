"""The whole update of a Llama-like tree on TPU meshes: in place, and each chip by itself."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Blocks, MicroAdamLayout, affine4, microadam, top_k

COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")
# Blocks that a mesh of 16 x 16 shards; rows of 4096 have 16 blocks of 256.
TREE = {
    "embed": ((32000, 4096), P("fsdp", "tp")),
    "attention": ((4096, 4096), P("fsdp", "tp")),
    "up": ((4096, 8192), P("fsdp", "tp")),
    "down": ((8192, 4096), P("tp", "fsdp")),
    "norm": ((4096,), P()),
}


def test_the_step_of_microadam_is_local_and_in_place(tpu_mesh: Mesh) -> None:
    blocks = Blocks(256, shards=16)
    tx = microadam(1e-3, layout=MicroAdamLayout(top_k(blocks=blocks), affine4(blocks)))

    def placed(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu_mesh, spec))

    params = {name: placed(shape, jnp.float32, spec) for name, (shape, spec) in TREE.items()}
    specs = {name: spec for name, (_, spec) in TREE.items()}
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, (shape, _) in TREE.items()}
    state = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, spec: placed(leaf.shape, leaf.dtype, spec),
        jax.eval_shape(tx.init, shapes),
        specs,
        transform_non_params=lambda leaf: placed(leaf.shape, leaf.dtype, P()),
    )
    jitted = jax.jit(tx.update, donate_argnums=(0, 1))
    with jax.sharding.use_abstract_mesh(tpu_mesh.abstract_mesh):
        program = jitted.trace(params, state, params).lower(lowering_platforms=("tpu",)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert "topk_compress" in text
    assert "window_update" in text
    assert COLLECTIVE.findall(text) == []
    chips = tpu_mesh.size
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / chips
    assert memory.alias_size_in_bytes >= kept
    print(f"temporaries {memory.temp_size_in_bytes / kept:.3f} of the state on {chips} chips")
    assert memory.temp_size_in_bytes <= 0.05 * kept
