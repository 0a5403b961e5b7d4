"""Every transformation in the modes and loops that its users run it in."""

from typing import Any

import jax
import optax
import pytest

from microadam_jax import microadam, quantize_state
from tests.contracts.catalogue import ENTRIES, VARIANTS, Entry, gradients, marks_of, parameters

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
EVERYTHING = {
    **ENTRIES,
    **VARIANTS,
    "microadam, paper": Entry(microadam, {"learning_rate": 1e-2, "layout": "paper"}),
    "microadam, pretrain": Entry(microadam, {"learning_rate": 1e-2, "layout": "pretrain"}),
    "quantize_state of lion": Entry(
        lambda learning_rate: quantize_state(optax.lion(learning_rate), {"mu": "dynamic8"}),
        {"learning_rate": 1e-3},
    ),
}
# Around optax.scale_by_adam, which raises a Python number to the power of a traced integer.
PROMOTES = (
    *("adamw4bit", "adamw_fp8", "adamw8bit, as published", "adamw8bit", "quantize_state"),
    *("ldadam", "grass", "dct_adamw"),
)
each_name = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks_of(name)) for name in EVERYTHING]
)


def trace(tx: optax.GradientTransformation, params: Any) -> Any:
    """The types of the updates and of the state of a step."""
    state = jax.eval_shape(lambda p: tx.init(p), params)
    return jax.eval_shape(tx.update, gradients(params), state, params)


@each_name
def test_ranks_are_not_promoted(name: str) -> None:
    with jax.numpy_rank_promotion("raise"):
        trace(EVERYTHING[name].make(), parameters())


@each_name
def test_dtypes_are_not_promoted(name: str) -> None:
    if name in PROMOTES:
        pytest.skip("Optax promotes them")
    with jax.numpy_dtype_promotion("strict"):
        trace(EVERYTHING[name].make(), parameters())


@each_name
@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_any_random_generator(name: str, generator: str) -> None:
    with jax.default_prng_impl(generator):
        trace(EVERYTHING[name].make(), parameters())
