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
from tests.contracts.meshes import collectives, mesh_of

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
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


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adam_mini4bit, rounded": lambda: m.round_updates(m.adam_mini4bit(1e-2)),
    "adamw, compensated": lambda: m.round_updates(optax.adamw(1e-2), "compensated"),
    "sgd": lambda: optax.sgd(0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_the_ordinary_step(name: str) -> None:
    """Random numbers of stochastic rounding included, which follow the place in the stack."""
    dtype = jnp.float32 if name == "sgd" else jnp.bfloat16
    tx = OPTIMIZERS[name]()
    params, state, losses = in_backward(tx, params=params_of(dtype))
    expected, expected_state, expected_losses = ordinary(tx, params=params_of(dtype))
    assert losses == expected_losses
    assert_equal(params, expected)
    # Compiled in other company, a product and a sum may be rounded together: the last bit of a
    # number, and of a code, may differ.
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for one, other in zip(*map(jax.tree.leaves, (state, expected_state)), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (np.abs(one - other) > 1e-6 * np.abs(other)).sum() <= 0.01 * one.size + 1


@pytest.mark.parametrize("tx", [m.came(1e-3), m.galore(1e-3, rank=8)], ids=["came", "galore"])
def test_states_with_arrays_that_no_layer_needs(tx: Any) -> None:
    """Means and products of stacked matrices sum up in another order."""
    params, _, losses = in_backward(tx, 2)
    expected, _, expected_losses = ordinary(tx, 2)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert distance(params, expected) < 1e-6


def test_tied_embeddings() -> None:
    params, _, losses = in_backward(optax.adam(1e-2), params=params_of(tied=True))
    expected, _, expected_losses = ordinary(optax.adam(1e-2), params=params_of(tied=True))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert distance(params, expected) < 1e-5


@pytest.mark.parametrize("clip", ["value", "global"])
def test_clips_that_are_those_of_optax(clip: Any) -> None:
    limit, transformation = {
        "value": (1e-3, optax.clip(1e-3)),
        "global": (0.3, optax.clip_by_global_norm(0.3)),
    }[clip]
    params, _, _ = in_backward(optax.sgd(0.1), clip=clip, max_norm=limit)
    expected, _, _ = ordinary(optax.chain(transformation, optax.sgd(0.1)))
    free, _, _ = ordinary(optax.sgd(0.1))
    assert distance(params, expected) < 1e-6
    assert distance(params, free) > 1e-4


def test_clip_by_the_norm_of_the_last_step() -> None:
    """Gradients of one batch and no learning rate: each step has the norm of the last."""

    def moved(clip: Any, steps: int) -> Any:
        rates = optax.piecewise_constant_schedule(0.0, {})
        tx = optax.sgd(lambda count: jnp.where(count == steps - 1, 0.1, rates(count)))
        training = update_in_backward(tx, before, layer, after, clip=clip, max_norm=0.3)
        params = params_of()
        state, step = training.init(params), jax.jit(training.step)
        for _ in range(steps):
            params, state, _ = step(params, state, batch(0))
        return params, state

    last, state = moved("last_global", 2)
    exact, _ = moved("global", 2)
    assert distance(last, exact) < 1e-6
    gradients = jax.grad(loss_of)(params_of(), batch(0))
    np.testing.assert_allclose(state.norm, optax.tree.norm(gradients), rtol=1e-5)
    first, _ = moved("last_global", 1)
    free, _, _ = ordinary(optax.sgd(0.1), 1)
    assert distance(first, free) < 1e-6


def test_clip_by_layer() -> None:
    params, _, _ = in_backward(optax.sgd(1.0), 1, clip="layer", max_norm=0.01)
    for i in range(LAYERS):
        start = jax.tree.map(lambda x, i=i: x[i], params_of()["layers"])
        way = jax.tree.map(lambda x, y, i=i: x[i] - y, params["layers"], start)
        np.testing.assert_allclose(optax.tree.norm(way), 0.01, rtol=1e-4)


REFUSED = {
    "clip": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), "clip='global'"),
    "mfac": (lambda: m.mfac(1e-3), "M-FAC"),
    "lowrank_mfac": (lambda: m.lowrank_mfac(1e-3), "M-FAC"),
    "apollo": (lambda: m.apollo(1e-3, rank=8), "drawn at random"),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.sgd(1.0), 3), "apply_if_finite"),
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
        "keeps a gradient of every parameter",
    ),
    "shared": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2), "Layers share"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        update_in_backward(make(), before, layer, after).init(params_of())


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="'last_global'; got 'norm'"):
        update_in_backward(optax.sgd(1.0), before, layer, after, clip="norm")  # pyrefly: ignore
    training = update_in_backward(optax.sgd(1.0), before, layer, after, layers="blocks")
    with pytest.raises(ValueError, match="no stack 'blocks'; they have embed, layers, lm_head"):
        training.init(params_of())
    params = {**params_of(), "blocks": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match="one size along their first"):
        training.init(params)


def test_a_run_goes_on_with_the_ordinary_step_and_back() -> None:
    tx = optax.adamw(1e-2)
    training = update_in_backward(tx, before, layer, after)
    state = training.init(params_of())
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params_of()))
    params, state, _ = jax.jit(training.step)(params_of(), state, batch(0))
    gradients = jax.grad(loss_of)(params, batch(1))
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    expected, _, _ = ordinary(tx, 2)
    assert distance(params, expected) < 1e-5


SPECS = {
    "embed": {"embedding": P("fsdp")},
    "layers": {
        "norm": {"scale": P()},
        "mlp": {
            "up": {"kernel": P(None, "fsdp"), "bias": P()},
            "down": {"kernel": P(None, None, "fsdp")},
        },
    },
    "lm_head": {"kernel": P("fsdp")},
}


def test_sharded_layers_are_gathered_in_the_loop() -> None:
    mesh = mesh_of("auto", (2, 1))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    tx = m.round_updates(optax.adam(1e-2))
    training = update_in_backward(tx, before, layer, after, shardings=shardings)
    params = jax.device_put(params_of(jnp.bfloat16), shardings)
    where = m.state_shardings(tx, params, shardings)
    state = jax.jit(training.init, out_shardings=where)(params)
    whole = NamedSharding(mesh, P())
    step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=(shardings, where, whole))
    tokens = jax.device_put(batch(0), NamedSharding(mesh, P("fsdp")))
    program = step.lower(params, state, tokens).compile()
    kinds = {kind for kind, _ in collectives(program.as_text())}
    assert "all-gather" in kinds
    new, _, loss = program(params, state, tokens)
    expected, _, expected_loss = in_backward(tx, 1, params=params_of(jnp.bfloat16))
    np.testing.assert_allclose(float(loss), expected_loss[0], rtol=1e-3)
    assert distance(new, expected) < 0.05
