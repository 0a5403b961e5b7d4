"""XLA's programs for GPUs move no more bytes, in no more launches, than the page says."""

import jax
import pytest
from jax.sharding import Mesh

from benchmarks.gpu_programs import TREES, minimum, step_for
from benchmarks.launches import Program
from benchmarks.scale import build


@pytest.mark.parametrize(
    ("name", "share", "launches"),
    [
        # Of the fewest bytes; launches of one leaf with all that is done once for a tree.
        ("optax.adamw", 1.001, 4),
        ("adam_mini", 1.01, 6),
        ("microadam", 1.65, 22),
        # Gradient and state are read twice: once for the scales, once for the codes.
        ("adamw8bit", 1.42, 14),
        ("adam_mini4bit", 1.43, 19),
        ("adamw_fp8", 1.48, 20),
        # With the products of five rounds; a loop over chunks would have 600 launches.
        ("muon4bit", 23.1, 49),
        ("muon2bit", 23.7, 50),
    ],
)
def test_a_step_moves_no_more_than_it_did(
    name: str, share: float, launches: int, h200: Mesh
) -> None:
    shapes = TREES["one matrix"](1)
    tx = build(name)
    totals = Program(step_for(tx, shapes, h200).as_text()).totals()
    ratio = totals.moved / minimum(name, shapes, jax.eval_shape(tx.init, shapes))
    assert 0.99 <= ratio <= share
    assert totals.launches <= launches
