"""Layers updated inside the backward pass, against the ordinary step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import microadam_jax as m
from microadam_jax.layers import update_in_backward
from microadam_jax.methods import METHODS
from tests.contracts.meshes import collectives, mesh_of

WIDTH, INNER, LAYERS, VOCAB = 64, 192, 3, 50


def params_of(dtype: Any = jnp.float32, tied: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(0.1 * random.standard_normal(shape), dtype)

    layers = {
        "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
        "mlp": {
            "up": {"kernel": draw(LAYERS, WIDTH, INNER), "bias": draw(LAYERS, INNER)},
            "down": {"kernel": draw(LAYERS, INNER, WIDTH)},
        },
    }
    head = {} if tied else {"lm_head": {"kernel": draw(WIDTH, VOCAB)}}
    return {"embed": {"embedding": draw(VOCAB, WIDTH)}, "layers": layers, **head}


def before(rest: Any, tokens: jax.Array) -> jax.Array:
    return rest["embed"]["embedding"][tokens[:, :-1]]


def layer(weights: Any, x: jax.Array) -> jax.Array:
    h = x * weights["norm"]["scale"]
    h = jnp.tanh(h @ weights["mlp"]["up"]["kernel"] + weights["mlp"]["up"]["bias"])
    return x + h @ weights["mlp"]["down"]["kernel"]


def after(rest: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    head = rest["lm_head"]["kernel"] if "lm_head" in rest else rest["embed"]["embedding"].T
    logits = (x @ head).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
    x = before(params, tokens)
    x, _ = jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), x, params["layers"])
    return after(params, x, tokens)


def batch(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).integers(0, VOCAB, (4, 17)))


def ordinary(tx: Any, steps: int = 3, params: Any = None) -> Any:
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    params = params_of() if params is None else params
    state, losses = jax.jit(tx.init)(params), []
    for i in range(steps):
        params, state, loss = step(params, state, batch(i))
        losses.append(float(loss))
    return params, state, losses


def in_backward(tx: Any, steps: int = 3, params: Any = None, **options: Any) -> Any:
    training = update_in_backward(tx, before, layer, after, **options)
    step = jax.jit(training.step, donate_argnums=(0, 1))
    params = params_of() if params is None else params
    state, losses = jax.jit(training.init)(params), []
    for i in range(steps):
        params, state, loss = step(params, state, batch(i))
        losses.append(float(loss))
    return params, state, losses


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def distance(one: Any, other: Any) -> float:
    """The largest difference of two trees of parameters."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adamw", "float32"),
        ("adamw", "bfloat16"),
        ("adam_mini4bit", "float32"),
        ("microadam", "float32"),
    ],
)
def test_the_same_bits_as_the_ordinary_step(name: str, dtype: str) -> None:
    tx = optax.adamw(1e-2) if name == "adamw" else METHODS[name].factory(1e-2)
    start = params_of(dtype)
    params, state, losses = in_backward(tx, params=start)
    expected, expected_state, expected_losses = ordinary(tx, params=params_of(dtype))
    assert losses == expected_losses
    assert_equal(params, expected)
    assert_equal(state, expected_state)
