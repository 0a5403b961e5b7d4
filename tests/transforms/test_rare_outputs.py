"""Outputs whose gradients are far below their neighbours' move as far as those, in any bits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    adam_mini4bit,
    adam_mini8bit,
    adamw4bit_factored,
    muon2bit,
    muon4bit,
    muon8bit,
    sinkhorn2bit,
    sinkhorn4bit,
)
from microadam_jax.codecs import linear2

VOCABULARY = 1000  # blocks of 125, and 250 in two bits
TWO_BITS = linear2(rounding="stochastic")
METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam_mini4bit": adam_mini4bit,
    "adam_mini8bit": adam_mini8bit,
    "adam_mini, 2 bits": functools.partial(adam_mini4bit, mu_codec=TWO_BITS),
    "adamw4bit_factored": functools.partial(adamw4bit_factored, weight_decay=0.0),
    "muon2bit": functools.partial(muon2bit, weight_decay=0.0),
    "muon4bit": functools.partial(muon4bit, weight_decay=0.0),
    "muon8bit": functools.partial(muon8bit, weight_decay=0.0),
    "sinkhorn2bit": functools.partial(sinkhorn2bit, weight_decay=0.0),
    "sinkhorn4bit": functools.partial(sinkhorn4bit, weight_decay=0.0),
}


@pytest.mark.parametrize("rare", [1e-2, 1e-5])
@pytest.mark.parametrize("name", list(METHODS))
def test_rare_tokens_of_a_head_move_as_far_as_others(name: str, rare: float) -> None:
    tx = METHODS[name](1e-3)
    sizes = jnp.where(jnp.arange(VOCABULARY) % 7 == 0, rare, 1.0)
    params = {"lm_head": {"kernel": jnp.zeros((64, VOCABULARY))}}

    def step(carry: tuple, key: jax.Array) -> tuple:
        params, state = carry
        grads = {"lm_head": {"kernel": jax.random.normal(key, (64, VOCABULARY)) * sizes}}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), ()

    keys = jax.random.split(jax.random.key(0), 40)
    (params, _), _ = jax.jit(functools.partial(jax.lax.scan, step))((params, tx.init(params)), keys)
    moved = np.sqrt(np.mean(np.square(params["lm_head"]["kernel"]), 0))
    assert moved[::7].mean() == pytest.approx(moved[1::7].mean(), rel=0.2)


@pytest.mark.parametrize("name", list(METHODS))
def test_outputs_without_gradients_stay(name: str) -> None:
    tx = METHODS[name](1e-3)
    params = {"lm_head": {"kernel": jnp.zeros((64, VOCABULARY))}}
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(0), 4):
        grads = jax.random.normal(key, (64, VOCABULARY)).at[:, ::7].set(0)
        updates, state = tx.update({"lm_head": {"kernel": grads}}, state, params)
        assert not np.any(updates["lm_head"]["kernel"][:, ::7])


@pytest.mark.parametrize("name", list(METHODS))
def test_a_non_finite_gradient_spoils_the_whole_block(name: str) -> None:
    tx = METHODS[name](1e-3)
    params = {"lm_head": {"kernel": jnp.zeros((64, VOCABULARY))}}
    grads = {"lm_head": {"kernel": jnp.ones((64, VOCABULARY)).at[3, 5].set(jnp.nan)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.isnan(updates["lm_head"]["kernel"][:, 5]).all()
