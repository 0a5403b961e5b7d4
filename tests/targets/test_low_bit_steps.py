"""A step of a low-bit optimizer writes no float32 moment, on accelerators either."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from microadam_jax import (
    adam_mini4bit,
    adam_mini8bit,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
)
from tests.transforms.test_quantize import llama_100m


def temporaries(make: Callable[..., optax.GradientTransformation], mesh: Mesh, on: str) -> float:
    """Those of a step with gradient and state donated, of the state's size."""
    here = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    tx, params = make(1e-3, weight_decay=0.1), placed(llama_100m())
    state = placed(jax.eval_shape(lambda p: tx.init(p), params))
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    # The tests have eight devices; a step for one is cut into other chunks.
    with jax.set_mesh(mesh):
        program = step.trace(params, state, params).lower(lowering_platforms=(on,)).compile()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return program.memory_analysis().temp_size_in_bytes / kept


@pytest.mark.parametrize(
    "make", [adamw8bit, adamw_fp8, adamw4bit, adamw4bit_factored, adam_mini8bit, adam_mini4bit]
)
def test_on_a_tpu(make: Callable[..., optax.GradientTransformation], v5e: Mesh) -> None:
    assert temporaries(make, v5e, "tpu") < 0.1


@pytest.mark.parametrize("make", [adamw8bit, adamw4bit, adam_mini4bit])
def test_on_a_gpu(make: Callable[..., optax.GradientTransformation], h200: Mesh) -> None:
    assert temporaries(make, h200, "cuda") < 0.1
