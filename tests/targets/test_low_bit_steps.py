"""A step of a low-bit optimizer writes no float32 moment, on accelerators either."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from microadam_jax import adam_mini4bit, adamw8bit
from tests.transforms.test_quantize import llama_100m


def temporaries(make: Callable[..., optax.GradientTransformation], mesh: Mesh, on: str) -> float:
    """Those of a step with gradient and state donated, of the state's size."""
    here = SingleDeviceSharding(mesh.devices.flat[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    tx, params = make(1e-3, weight_decay=0.1), placed(llama_100m())
    state = placed(jax.eval_shape(lambda p: tx.init(p), params))
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    program = step.trace(params, state, params).lower(lowering_platforms=(on,)).compile()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return program.memory_analysis().temp_size_in_bytes / kept


def test_adamw8bit_on_a_tpu(v5e: Mesh) -> None:
    assert temporaries(adamw8bit, v5e, "tpu") < 0.1


@pytest.mark.parametrize("make", [adamw8bit, adam_mini4bit])
def test_on_a_gpu(make: Callable[..., optax.GradientTransformation], h200: Mesh) -> None:
    assert temporaries(make, h200, "cuda") < 0.1
