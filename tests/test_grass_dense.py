"""A linear map that forms only a part of its weight gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from microadam_jax import Matrices, grass
from microadam_jax.selected_gradients import grass_dense
from microadam_jax.subspace import sampled_rows, top_k_rows

N_IN, N_OUT, BATCH = 6, 10, (3, 4)
INDICES = {0: jnp.array([[4], [1]]), 1: jnp.array([[7, 0, 3]])}


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    shapes = ((*BATCH, N_IN), (N_IN, N_OUT), (*BATCH, N_OUT))
    x, kernel, weights = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes)
    return x, kernel, weights


@pytest.mark.parametrize("axis", [0, 1])
def test_it_is_the_plain_map_but_for_rows_that_were_not_selected(axis: int) -> None:
    x, kernel, weights = arrays()
    np.testing.assert_array_equal(grass_dense(x, kernel, INDICES[axis], axis), x @ kernel)

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(weights * jnp.sin(grass_dense(x, kernel, INDICES[axis], axis)))

    dx, dkernel = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    plain = jax.grad(lambda x, kernel: jnp.sum(weights * jnp.sin(x @ kernel)), (0, 1))
    expected_dx, whole = plain(x, kernel)
    selected = np.isin(np.indices(kernel.shape)[axis], np.asarray(INDICES[axis]))
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5)
    np.testing.assert_allclose(dkernel, np.where(selected, whole, 0), rtol=1e-5, atol=1e-6)


def test_the_whole_gradient_is_nowhere_in_the_program() -> None:
    x, kernel, _ = jnp.ones((64, 32)), jnp.ones((32, 48)), None
    indices = jnp.arange(4)
    program = jax.jit(jax.grad(lambda k: grass_dense(x, k, indices).sum())).lower(kernel)
    assert program.compile().cost_analysis()["flops"] < 0.5 * 2 * 64 * 32 * 48


def test_another_axis_is_refused() -> None:
    x, kernel, _ = arrays()
    with pytest.raises(ValueError, match="axis 0"):
        grass_dense(x, kernel, INDICES[0], 2)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("subspace", [top_k_rows(3), sampled_rows(3)], ids=str)
def test_grass_goes_the_same_way_with_it(side: Any, subspace: Any) -> None:
    """The whole gradient in steps with new rows, and the selected ones in the others."""
    x, kernel, weights = arrays()
    axis = 0 if side == "in" else 1
    matrices = Matrices(side=side)
    tx = grass(1e-1, update_interval=3, subspace=subspace, matrices=matrices)

    def train(selected: bool) -> jax.Array:
        params = {"kernel": kernel}
        state = tx.init(params)
        for step in range(8):

            def loss(params: Any, step: int = step, state: Any = state) -> jax.Array:
                if selected and step % 3:
                    indices = state[0].basis.indices["kernel"]
                    y = grass_dense(x, params["kernel"], indices, axis)
                else:
                    y = x @ params["kernel"]
                return jnp.mean((y - weights) ** 2)

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params["kernel"]

    np.testing.assert_allclose(train(True), train(False), rtol=1e-5, atol=1e-6)


class Rows(nnx.Variable):
    """The rows that a layer is trained in."""


class GrassLinear(nnx.Linear):
    """A linear layer of NNX; ``rows`` is None in steps that need the whole gradient."""

    rows: Rows | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rows is None:
            return super().__call__(x)
        return grass_dense(x, self.kernel[...], self.rows[...]) + self.bias[...]


def test_a_layer_of_nnx() -> None:
    x, _, _ = arrays()
    layer = GrassLinear(N_IN, N_OUT, rngs=nnx.Rngs(0))
    loss = lambda layer: jnp.mean(layer(x) ** 2)  # noqa: E731
    value, whole = nnx.value_and_grad(loss)(layer)
    layer.rows = Rows(INDICES[0])
    same, part = nnx.value_and_grad(loss)(layer)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    np.testing.assert_allclose(part["bias"][...], whole["bias"][...], rtol=1e-5)
    chosen = np.asarray(INDICES[0]).ravel()
    np.testing.assert_allclose(part["kernel"][...][chosen], whole["kernel"][...][chosen], rtol=1e-4)
    assert not part["kernel"][...][0].any()


def test_a_layer_of_linen() -> None:
    """Its indices are a collection beside the parameters, given by the trainer."""

    class GrassDense(linen.Dense):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
            if not self.has_variable("rows", "kernel"):
                return x @ kernel
            return grass_dense(x, kernel, self.get_variable("rows", "kernel"))

    x, kernel, _ = arrays()
    layer, params = GrassDense(N_OUT), {"kernel": kernel}

    def loss(params: Any, **rows: Any) -> jax.Array:
        return jnp.mean(layer.apply({"params": params} | rows, x) ** 2)

    part = jax.grad(loss)(params, rows={"kernel": INDICES[0]})["kernel"]
    whole = jax.grad(loss)(params)["kernel"]
    chosen = np.asarray(INDICES[0]).ravel()
    np.testing.assert_allclose(part[chosen], whole[chosen], rtol=1e-4)
    assert not part[0].any()
