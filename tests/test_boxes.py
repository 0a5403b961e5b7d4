"""Flax's boxes: their axis names reach the optimizer's state, where they fit it."""

from typing import Any

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

from microadam_jax import adam_mini, adam_sn, came
from microadam_jax.methods import METHODS

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

OPTIMIZERS = {
    "adam_mini": adam_mini(1e-2, weight_decay=0.1),
    "adam_sn": adam_sn(1e-2),
    "came": came(1e-3),
}
AXES = ("layers", "embed", "mlp")
each_optimizer = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)


def mesh_of(mode: AxisType) -> Mesh:
    """Two devices along every axis; their names are those of the layers' axes."""
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(mode,) * 3, devices=jax.devices()[:8])


class LinenStack(nn.Module):
    """Two layers behind one another, in one scan, with boxes that name their axes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            LinenLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(name="trunk")(x, None)[0]


class LinenLayer(nn.Module):
    """A feed-forward layer and its norm."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        ones = nn.with_partitioning(nn.initializers.ones, ("embed",))
        normal = nn.initializers.lecun_normal()
        up = nn.Dense(32, kernel_init=nn.with_partitioning(normal, ("embed", "mlp")), name="up")
        down = nn.Dense(16, kernel_init=nn.with_partitioning(normal, ("mlp", "embed")), name="down")
        return x + down(jax.nn.gelu(up(nn.RMSNorm(scale_init=ones, name="norm")(x)))), None


@each_optimizer
def test_linen_names_place_the_state_of_a_train_state(tx: optax.GradientTransformation) -> None:
    model, x = LinenStack(), jax.random.normal(jax.random.key(1), (4, 16))

    def make() -> TrainState:
        params = model.init(jax.random.key(0), x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        loss = lambda p: jnp.square(state.apply_fn({"params": p}, x)).mean()  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    expected = step(step(make()))
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        specs = nn.get_partition_spec(jax.eval_shape(make))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
        )
        state = jax.jit(make, out_shardings=shardings)()
        state = step(step(state))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        jax.tree.leaves(nn.unbox(state)),
        jax.tree.leaves(nn.unbox(expected)),
    )


@pytest.mark.parametrize("names", [("embed", "mlp"), (None, "mlp"), ("embed", None)], ids=str)
@pytest.mark.parametrize("method", ["apollo", "grass", "ldadam", "snsm"])
def test_a_rank_in_the_place_of_a_named_axis(method: str, names: tuple[str | None, ...]) -> None:
    tx = METHODS[method].factory(1e-2, **METHODS[method].at_rank(4))
    plain = {"kernel": jax.random.normal(jax.random.key(0), (16, 32))}
    boxed = {"kernel": nn.LogicallyPartitioned(plain["kernel"], names=names)}
    results = []
    for params in (plain, boxed):
        state = tx.init(params)
        kinds = jax.tree.structure(state)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
        assert jax.tree.structure(state) == kinds
        results.append(nn.unbox((updates, state)))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, results))


def test_linen_names_are_kept_on_axes_that_are_not_averaged() -> None:
    params = LinenStack().init(jax.random.key(0), jnp.ones((4, 16)))["params"]
    state = adam_mini(1e-2).init(params)[0]
    up = state.nu["trunk"]["up"]["kernel"]
    assert up.value.shape == (2, 1, 32)
    assert up.names == ("layers", None, "mlp")
    assert state.mu["trunk"]["up"]["kernel"].names == ("layers", "embed", "mlp")
    assert state.nu["trunk"]["norm"]["scale"].names == ("layers", None)


class NnxLayer(nnx.Module):
    """A feed-forward layer whose variables name their axes."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        def kernel(*names: str) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.up = nnx.Linear(16, 32, kernel_init=kernel("embed", "mlp"), rngs=rngs)
        self.down = nnx.Linear(32, 16, kernel_init=kernel("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("name", "container"), [*((name, "layers") for name in OPTIMIZERS), ("came", "trunk")]
)
def test_an_nnx_optimizer_on_a_mesh(name: str, container: str) -> None:
    """The optimizer shows axis names to `init` alone, so its steps must not depend on them."""

    class Model(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            stack = nnx.split_rngs(splits=2)(
                nnx.vmap(
                    lambda rngs: NnxLayer(rngs=rngs),
                    transform_metadata={nnx.PARTITION_NAME: "layers"},
                )
            )
            setattr(self, container, stack(rngs))

        def __call__(self, x: jax.Array) -> jax.Array:
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, getattr(self, container))

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        model = Model(rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
            loss, grads = nnx.value_and_grad(lambda model: jnp.square(model(x)).mean())(model)
            optimizer.update(model, grads)
            return loss

        x = jax.random.normal(jax.random.key(1), (4, 16))
        losses = [step(model, optimizer, x) for _ in range(3)]
    assert losses[2] < losses[0]
