"""Layers updated inside the backward pass, against the ordinary step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
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
    # Optax computes in the parameters' dtype, and of bfloat16 newer XLA drops roundings in fusions.
    exact = name != "adamw" or jax.__version_info__ < (0, 12)
    dtype = jnp.float32 if name == "sgd" or not exact else jnp.bfloat16
    tx = OPTIMIZERS[name]()
    params, state, losses = in_backward(tx, params=params_of(dtype))
    expected, expected_state, expected_losses = ordinary(tx, params=params_of(dtype))
    if not exact:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        assert distance(params, expected) < 1e-6
        return
    assert losses == expected_losses
    # Compiled in other company, a product and a sum may be rounded together: the last bit of a
    # number, and of a code, may differ. Rounded to nearest, it may take a parameter with it.
    if name == "adamw, compensated":
        state, expected_state = (params, state), (expected, expected_state)
    else:
        assert_equal(params, expected)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for one, other in zip(*map(jax.tree.leaves, (state, expected_state)), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (np.abs(one - other) > 1e-6 * np.abs(other)).sum() <= 0.01 * one.size + 1


SLOW = {"fira", "snsm"}
SUMMED_UP = {
    "came": lambda: m.came(1e-3),
    "galore": lambda: m.galore(1e-3, rank=8, update_interval=2),
    "fira": lambda: m.fira(1e-3, rank=8, update_interval=2),
    "ldadam": lambda: m.ldadam(1e-3, rank=8),
    "dct_adamw": lambda: m.dct_adamw(1e-3, rank=8, update_interval=2),
    "snsm": lambda: m.snsm(1e-3, rank=8, update_interval=2),
    "grass": lambda: m.grass(1e-3, rank=8, update_interval=2),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SUMMED_UP],
)
def test_states_with_arrays_that_no_layer_needs(name: str) -> None:
    """Means and products of stacked matrices sum up in another order. Subspaces are found twice."""
    tx = SUMMED_UP[name]()
    params, _, losses = in_backward(tx)
    expected, _, expected_losses = ordinary(tx)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert distance(params, expected) < 1e-6


def test_what_a_layer_is_in_the_whole_tells_one_of_its_parameters() -> None:
    """A bias says that its kernel is stored (out, in), and that ``conv_stack`` stacks layers."""
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.standard_normal((LAYERS, 8, 6)), jnp.float32)
    stack = {"a": {"kernel": kernel, "bias": jnp.zeros((LAYERS, 8))}}
    params = {"conv_stack": stack, "head": jnp.ones((8, 1))}
    target = jnp.asarray(random.standard_normal(6), jnp.float32)

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        a = weights["a"]
        return x + (a["kernel"] @ x + a["bias"])[:6]

    def loss(params: Any) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), jnp.ones(6), params["conv_stack"])
        return after(params, x, target)

    def after(rest: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean((x - target * rest["head"].sum()) ** 2)

    tx = m.adam_mini(1e-2)
    training = update_in_backward(
        tx, lambda rest, target: jnp.ones(6), layer, after, layers="conv_stack"
    )
    new, state, _ = training.step(params, tx.init(params), target)
    updates, expected_state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    assert state[0].nu["conv_stack"]["a"]["kernel"].shape == (LAYERS, 8, 1)
    assert distance(new, optax.apply_updates(params, updates)) < 1e-6
    assert distance(state, expected_state) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "adam_mini4bit"])
def test_a_step_keeps_less_than_the_gradients_of_two_layers(name: str) -> None:
    """By a CPU's compiler; the activations of eight tokens are next to nothing."""
    width = 256

    def shape(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, jnp.float32)

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        for own in weights.values():
            x = x + jnp.tanh(x @ own["kernel"] + own["bias"])
        return x

    # All biases together are not too small for a codec, and one layer's are.
    linear = {"kernel": shape(16, width, width), "bias": shape(16, width)}
    stack = {f"linear_{letter}": linear for letter in "abcdef"}
    params = {
        "embed": {"embedding": shape(8, width)},
        "layers": stack,
        "lm_head": {"kernel": shape(width, 8)},
    }
    training = update_in_backward(
        {"adamw": optax.adamw, "adam_mini4bit": m.adam_mini4bit}[name](1e-2), before, layer, after
    )
    state = jax.eval_shape(training.init, params)
    jitted = jax.jit(training.step, donate_argnums=(0, 1))
    program = jitted.lower(params, state, jax.ShapeDtypeStruct((1, 9), jnp.int32)).compile()
    memory: Any = program.memory_analysis()
    of_layer = sum(leaf.size * 4 for leaf in jax.tree.leaves(stack)) / 16
    # 1.3 and 1.6 without biases; 1.9 if all parameters of a layer are updated together.
    assert memory.temp_size_in_bytes < 1.75 * of_layer


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


def test_what_is_clipped_is_not_rounded_where_the_optimizer_computes_in_float32() -> None:
    sgd, params = optax.sgd(1.0, momentum=0.9), params_of(jnp.bfloat16)
    tx = m.round_updates(sgd, "compensated", error="int16")
    _, state, _ = in_backward(tx, 1, params, clip="global", max_norm=0.1)
    clipped = optax.chain(optax.clip_by_global_norm(0.1), sgd)
    params = params_of(jnp.bfloat16)
    _, expected, _ = ordinary(m.round_updates(clipped, "compensated", error="int16"), 1, params)
    traces = (optax.tree.get(s, "trace") for s in (state, expected))
    for one, other in zip(*map(jax.tree.leaves, traces), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_paths_that_read_alike_are_apart() -> None:
    params = {
        "layers": {"w": jnp.ones((3, 8, 8))},
        "a/b": jnp.ones(8),
        "a": {"b": jnp.full(8, 2.0)},
    }
    training = update_in_backward(
        optax.sgd(0.0),
        lambda rest, x: x,
        lambda weights, x: x + jnp.tanh(x @ weights["w"]),
        lambda rest, x, _: jnp.mean((x @ (rest["a/b"] * rest["a"]["b"])) ** 2),
    )
    new, *_ = jax.jit(training.step)(params, training.init(params), jnp.eye(8))
    assert_equal(new, params)


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
    "noise": (lambda: optax.chain(optax.add_noise(1.0, 0.0, 0), optax.sgd(1.0)), "rng_key"),
    "kernels": (
        lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0)),
        "for an axis of a kernel.*clip='layer'",
    ),
    "shared": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2), "Layers share"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        update_in_backward(make(), before, layer, after).init(params_of())


def test_masks_that_are_functions_are_refused_with_a_remedy() -> None:
    def mask(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[0].key != "embed", params)

    training = update_in_backward(optax.masked(optax.adam(1e-2), mask), before, layer, after)
    params = params_of()
    with pytest.raises(ValueError, match=r"give optax\.masked.* trees"):
        jax.eval_shape(training.step, params, training.init(params), jnp.zeros((2, 5), jnp.int32))


def test_a_frozen_dict_stays_one() -> None:
    training = update_in_backward(optax.adam(1e-2), before, layer, after)
    params = freeze(params_of())
    tokens = jnp.zeros((2, 5), jnp.int32)
    new, *_ = jax.eval_shape(training.step, params, training.init(params), tokens)
    assert new == jax.eval_shape(lambda: params)


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="'last_global'; got 'norm'"):
        update_in_backward(optax.sgd(1.0), before, layer, after, clip="norm")  # pyrefly: ignore
    training = update_in_backward(optax.sgd(1.0), before, layer, after, layers="blocks")
    with pytest.raises(TypeError, match="a dict with the stack 'layers'; got tuple"):
        update_in_backward(optax.sgd(1.0), before, layer, after).init((params_of(),))
    with pytest.raises(ValueError, match="no stack 'blocks'; they have embed, layers, lm_head"):
        training.init(params_of())
    params = {**params_of(), "blocks": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}
    with pytest.raises(ValueError, match="one size along their first"):
        training.init(params)
    for norm in (0, -1.0, "1"):
        with pytest.raises(ValueError, match="max_norm must be a positive number"):
            update_in_backward(optax.sgd(1.0), before, layer, after, clip="global", max_norm=norm)
    training = update_in_backward(optax.sgd(1.0), before, layer, after)
    with pytest.raises(TypeError, match="'steps' has dtype int32"):
        training.init({**params_of(), "steps": jnp.array(3)})
    for loss in (lambda rest, x, _: x.sum(0), lambda rest, x, _: (x.sum(), x)):
        training = update_in_backward(optax.sgd(1.0), before, layer, loss)
        with pytest.raises(TypeError, match="a loss that is a scalar"):
            jax.eval_shape(training.step, params_of(), training.init(params_of()), batch(0))
    params = {"trunk": {"w": jnp.ones((3, 40, 112))}}
    training = update_in_backward(m.adamw4bit(1e-3), before, layer, after, layers="trunk")
    with pytest.raises(ValueError, match="Name the stack in the stacked="):
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
