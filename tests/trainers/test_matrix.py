"""Every optimizer in every kind of trainer: it takes two steps, and the parameters move.

By default each trainer has one optimizer; ``make matrix`` runs all of them.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import state_shardings
from microadam_jax.methods import METHODS
from microadam_jax.planner.llama import loss as llama_loss
from microadam_jax.planner.meshes import parameter_shardings

pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    # Of Flax and Equinox themselves, in one version or another.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
WIDTH, OUT = 64, 512  # more elements than what stays dense, and rows of several blocks
X = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)


def mesh_of(kind: AxisType = AxisType.Auto, names: tuple[str, ...] = ("fsdp", "tp")) -> Mesh:
    shape = (1,) * (len(names) - 2) + (2, 2)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices()[:4])


def square(y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(y - 1))


def steps(tx: optax.GradientTransformation, params: Any, loss: Callable[[Any], jax.Array]) -> Any:
    """The parameters after two steps of a plain jitted loop."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(2):
        params, state = step(params, state)
    return params


def kernel(*shape: int) -> jax.Array:
    random = np.random.default_rng(1)
    return jnp.asarray(0.1 * random.standard_normal(shape), jnp.float32)


def plain(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = {"layers": [(kernel(WIDTH, OUT), jnp.zeros(OUT)), None]}

    def loss(params: Any) -> jax.Array:
        (w, b), _ = params["layers"]
        return square(X @ w + b)

    return params, steps(tx, params, loss)


def partitioned(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = {"w": kernel(WIDTH, OUT), "b": jnp.zeros(OUT)}
    split = optax.partition({"ours": tx, "theirs": optax.adam(1e-2)}, {"w": "ours", "b": "theirs"})
    return params, steps(split, params, lambda p: square(X @ p["w"] + p["b"]))


def masked(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = {"w": kernel(WIDTH, OUT), "b": jnp.zeros(OUT)}
    tx = optax.masked(tx, lambda tree: {"w": True, "b": False})
    return params, steps(tx, params, lambda p: square(X @ p["w"] + p["b"]))


def multi_steps(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    params = {"w": kernel(WIDTH, OUT), "b": jnp.zeros(OUT)}
    return params, steps(
        optax.MultiSteps(tx, 2).gradient_transformation(),
        params,
        lambda p: square(X @ p["w"] + p["b"]),
    )


def accumulated(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Micro-batches are summed inside the step, in the parameters' dtype: nothing outlives it."""
    params = {"w": kernel(WIDTH, OUT).astype(jnp.bfloat16), "b": jnp.zeros(OUT, jnp.bfloat16)}

    @jax.jit
    def step(params: Any, state: Any, micro_batches: jax.Array) -> Any:
        def add(total: Any, x: jax.Array) -> tuple[Any, None]:
            grads = jax.grad(lambda p: square(x @ p["w"] + p["b"]))(params)
            share = jax.tree.map(lambda g: g / len(micro_batches), grads)
            return jax.tree.map(jnp.add, total, share), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), micro_batches)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, state = params, jax.jit(tx.init)(params)
    for _ in range(2):
        after, state = step(after, state, jnp.asarray(X.reshape(4, 2, WIDTH), jnp.bfloat16))
    return params, after


def equinox(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(WIDTH, OUT, key=jax.random.key(0)), eqx.nn.Lambda(jax.nn.gelu)]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)  # what is no array is None

    def loss(params: Any) -> jax.Array:
        return square(jax.vmap(eqx.combine(params, static))(X))

    return params, steps(tx, params, loss)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(OUT, kernel_init=init, name="up")(x)


def linen(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Boxes with logical names; Flax's own rules give every state array a sharding."""
    model, mesh = Linen(), mesh_of()

    def create() -> TrainState:
        params = model.init(jax.random.key(0), X)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    specs = nn.get_partition_spec(jax.eval_shape(create))
    rules = (("embed", "fsdp"), ("mlp", "tp"))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    with jax.set_mesh(mesh):
        before = jax.jit(create, out_shardings=shardings)()

        @jax.jit
        def step(state: TrainState) -> TrainState:
            def loss(params: Any) -> jax.Array:
                return square(state.apply_fn({"params": params}, X))

            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        after = step(step(before))
    assert jax.tree.leaves(after.params)[-1].sharding.spec == P("fsdp", "tp")
    return before.params, after.params


def with_nnx(kind: AxisType) -> Callable[[optax.GradientTransformation], tuple[Any, Any]]:
    def train(tx: optax.GradientTransformation) -> tuple[Any, Any]:
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tp"))
            model = nnx.Linear(WIDTH, OUT, kernel_init=init, rngs=nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))

            @nnx.jit
            def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
                grads = nnx.grad(lambda model: square(model(X)))(model)
                optimizer.update(model, grads)

            for _ in range(2):
                step(model, optimizer)
        return before, jax.tree.map(np.asarray, nnx.state(model, nnx.Param))

    return train


def stacked_llama(tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Layers stacked for a scan, cut over three mesh axes, with ``state_shardings``."""
    mesh = mesh_of(names=("data", "fsdp", "tp"))
    norm = {"scale": jnp.ones((2, 64))}
    square_kernel = {"kernel": kernel(2, 64, 64)}
    params = {
        "embed_tokens": {"embedding": kernel(32, 64)},
        "layers": {
            "input_layernorm": norm,
            "self_attn": {f"{name}_proj": square_kernel for name in "qkvo"},
            "post_attention_layernorm": {"scale": jnp.ones((2, 64))},
            "mlp": {
                "gate_proj": {"kernel": kernel(2, 64, 128)},
                "up_proj": {"kernel": kernel(2, 64, 128)},
                "down_proj": {"kernel": kernel(2, 128, 64)},
            },
        },
        "norm": {"scale": jnp.ones(64)},
        "lm_head": {"kernel": kernel(64, 32)},
    }
    where = parameter_shardings(params, mesh)
    where_state = state_shardings(tx, params, where)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)

    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(llama_loss)(params, tokens, mesh)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        after = jax.device_put(params, where)
        state = jax.jit(tx.init, out_shardings=where_state)(after)
        jitted = jax.jit(step, out_shardings=(where, where_state))
        for _ in range(2):
            after, state = jitted(after, state)
    assert isinstance(jax.tree.leaves(where)[0], NamedSharding)
    return params, after


ROWS = {
    "plain": plain,
    "partition": partitioned,
    "masked": masked,
    "MultiSteps": multi_steps,
    "accumulation": accumulated,
    "equinox": equinox,
    "linen": linen,
    "nnx auto": with_nnx(AxisType.Auto),
    "nnx explicit": with_nnx(AxisType.Explicit),
    "stacked llama": stacked_llama,
}


SAMPLE = dict.fromkeys(ROWS, "microadam") | dict.fromkeys(
    ("partition", "accumulation", "nnx auto"), "adam_mini4bit"
)
CASES = [
    pytest.param(name, row, marks=pytest.mark.slow if SAMPLE[row] == name else pytest.mark.matrix)
    for row in ROWS
    for name in METHODS
]


@pytest.mark.parametrize(("name", "row"), CASES)
def test_it_trains(name: str, row: str) -> None:
    before, after = ROWS[row](METHODS[name].factory(1e-2))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert one.dtype == other.dtype
        assert np.isfinite(np.asarray(other, np.float32)).all()
        assert (np.asarray(one) != np.asarray(other)).any()
