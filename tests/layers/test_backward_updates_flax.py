"""Layers of Flax updated inside the backward pass, and the checkpoint of their state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

from microadam_jax.layers import chunked_cross_entropy, update_in_backward

pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
WIDTH, LAYERS, VOCAB = 16, 3, 30
Layer = Callable[[Any, jax.Array], jax.Array]


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + linen.Dense(WIDTH)(jnp.tanh(linen.RMSNorm()(x)))


class NnxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.linear(jnp.tanh(self.norm(x)))


def of_linen() -> tuple[Any, Layer]:
    module, keys = LinenLayer(), jax.random.split(jax.random.key(0), LAYERS)
    stack = jax.vmap(lambda key: module.init(key, jnp.zeros((1, WIDTH)))["params"])(keys)
    return stack, lambda weights, x: module.apply({"params": weights}, x)  # pyrefly: ignore


def of_nnx() -> tuple[Any, Layer]:
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> NnxLayer:
        return NnxLayer(rngs)

    graph, stack = nnx.split(make(nnx.Rngs(0)), nnx.Param)
    return nnx.to_pure_dict(stack), lambda weights, x: nnx.merge(graph, weights)(x)


def before(rest: Any, tokens: jax.Array) -> jax.Array:
    return rest["embed"][tokens[:, :-1]]


def after(rest: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    return chunked_cross_entropy(x, rest["head"], tokens[:, 1:], chunk=8).mean()


@pytest.mark.parametrize("make", [of_linen, of_nnx])
def test_a_layer_of_flax_resumes_bit_for_bit(
    make: Callable[[], tuple[Any, Layer]], tmp_path: Path
) -> None:
    stack, layer = make()
    random = np.random.default_rng(0)
    embed, head = (jnp.asarray(random.normal(size=s)) for s in ((VOCAB, WIDTH), (WIDTH, VOCAB)))
    params = {"embed": embed, "layers": stack, "head": head}
    tokens = [jnp.asarray(random.integers(0, VOCAB, (2, 6))) for _ in range(3)]
    training = update_in_backward(
        optax.adam(0.01), before, layer, after, clip="last_global", max_norm=0.5
    )
    step = jax.jit(training.step)

    def run(params: Any, state: Any, batches: Any) -> Any:
        for batch in batches:
            params, state, _ = step(params, state, batch)
        return params, state

    expected = run(params, training.init(params), tokens)
    halfway = run(params, training.init(params), tokens[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", halfway)
    jax.tree.map(np.testing.assert_array_equal, run(*restored, tokens[2:]), expected)

    def loss(params: Any) -> jax.Array:
        x, _ = jax.lax.scan(
            lambda x, weights: (layer(weights, x), None),
            before(params, tokens[0]),
            params["layers"],
        )
        return after(params, x, tokens[0])

    tx = optax.adam(0.01)
    updates, _ = tx.update(jax.jit(jax.grad(loss))(params), tx.init(params), params)
    ordinary = optax.apply_updates(params, updates)
    first, _, _ = step(params, training.init(params), tokens[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, ordinary)
