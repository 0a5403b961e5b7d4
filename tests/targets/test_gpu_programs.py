"""XLA's programs for GPUs move few bytes, in few launches, and write no moments."""

import jax
import pytest
from jax.sharding import Mesh

from benchmarks.gpu_programs import minimum, step_for
from benchmarks.launches import Program
from benchmarks.scale import build

# Of the fewest bytes, and launches of one leaf with all that is done once for a tree.
MOST = {
    "optax.adamw": (1.001, 4),
    "adam_mini": (1.01, 6),
    "microadam": (1.55, 20),
    "adamw8bit": (1.4, 12),
    "adam_mini4bit": (1.65, 20),
    "adamw_fp8": (2.5, 22),
}


@pytest.mark.parametrize("name", MOST)
def test_a_step_moves_few_bytes(name: str, h200: Mesh) -> None:
    shapes = {"up_proj": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}}
    tx = build(name)
    compiled = step_for(tx, shapes, h200)
    totals = Program(compiled.as_text()).totals()
    ratio = totals.moved / minimum(name, shapes, jax.eval_shape(tx.init, shapes))
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 4096**2
    print(f"{ratio:.2f} of the least, {totals.launches} launches, temporaries {temporaries:.2f}")
    share, launches = MOST[name]
    assert 0.99 <= ratio <= share
    assert totals.launches <= launches
    if name != "adamw_fp8":  # XLA writes its moments
        assert temporaries < 1
