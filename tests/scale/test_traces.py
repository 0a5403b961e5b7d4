"""Every optimizer traces on the trees of real models."""

import jax
import optax
import pytest

from microadam_jax.methods import METHODS
from microadam_jax.models import model_shapes

LOW_BIT = [name for name, method in METHODS.items() if method.kind == "low bits"]


def avals(tree: object) -> object:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# `make scale ARGS=--short` traces them all, in CI too.
@pytest.mark.parametrize(
    "name",
    [n if n == "adam_mini4bit" else pytest.param(n, marks=pytest.mark.matrix) for n in LOW_BIT],
)
def test_the_tree_of_llama2_7b(name: str) -> None:
    """Leaves that one platform takes whole stand beside chunks of another: types must agree."""
    tx: optax.GradientTransformation = METHODS[name].factory(1e-3)
    shapes = model_shapes("llama2-7b")
    state = jax.eval_shape(tx.init, shapes)
    updates, new = jax.eval_shape(tx.update, shapes, state, shapes)
    assert avals(new) == avals(state)
    assert avals(updates) == avals(shapes)
