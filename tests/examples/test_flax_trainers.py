"""Each optimizer trains under Flax Linen's TrainState and NNX's Optimizer."""

from collections.abc import Callable

import jax
import pytest
from flax import nnx

from examples.flax_trainers import (
    OPTIMIZERS,
    LinenModel,
    NNXModel,
    batch,
    table,
    with_linen,
    with_nnx,
)
from microadam_jax import explain_partition

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("train", [with_linen, with_nnx])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.endswith("_sn") else ())
        for name in OPTIMIZERS
    ],
)
def test_the_loss_goes_down(name: str, train: Callable[..., list[float]]) -> None:
    losses = train(OPTIMIZERS[name](), steps=25)
    assert len(losses) == 25
    assert losses[-1] < 0.9 * losses[0]


def test_the_rules_name_every_parameter_and_see_the_same_blocks_on_both_paths() -> None:
    linen = jax.eval_shape(LinenModel().init, jax.random.key(0), batch(0))["params"]
    reports = [explain_partition(linen), explain_partition(nnx.state(NNXModel(nnx.Rngs(0))))]
    assert not any(report.unnamed for report in reports)
    assert str(reports[0]) == str(reports[1])


def test_the_table_has_a_line_for_each_optimizer() -> None:
    lines = table({name: ([3.0, 2.0], [3.0, 1.0]) for name in OPTIMIZERS}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        [name, "3.000", "2.000", "3.000", "1.000"] for name in OPTIMIZERS
    ]
