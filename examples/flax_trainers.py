"""Flax Linen's TrainState and NNX's Optimizer with each optimizer of this library.

Both take an Optax transformation, so there is nothing to adapt: ``with_linen`` and ``with_nnx``
below are all that a training script needs. The model is a transformer layer; the task is to say a
sequence of random tokens backwards. The learning rates are ours, chosen for this task and no other:
the losses say that each optimizer works on both paths, not which is the best.

Run it from the root of the repository; it takes a minute or two on a CPU::

    python examples/flax_trainers.py --steps 60
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from microadam_jax import adagrad_sn, adam_mini, adam_sn, came, microadam

VOCABULARY, LENGTH, WIDTH, HEADS, BATCH = 16, 8, 32, 4, 32
STEPS = 60

# Subset norms sum their squares, so their learning rates are larger than Adam's. CAME's first
# steps are eleven times its learning rate, which it therefore warms up.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam_mini": lambda: adam_mini(3e-3),
    "adam_sn": lambda: adam_sn(3e-2),
    "adagrad_sn": lambda: adagrad_sn(0.3),
    "came": lambda: came(optax.linear_schedule(0, 1e-3, 50)),
    "microadam": lambda: microadam(3e-3),
}


class LinenModel(nn.Module):
    """One layer of a transformer, between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``(batch, length, vocabulary)`` of tokens ``(batch, length)``."""
        x = nn.Embed(VOCABULARY, WIDTH, name="token_embedding")(tokens)
        x += nn.Embed(LENGTH, WIDTH, name="position_embedding")(jnp.arange(LENGTH))
        x += nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.RMSNorm(name="norm")(x))
        x += nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(4 * WIDTH, name="up")(x)))
        return nn.Dense(VOCABULARY, name="head")(x)


class NNXModel(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.token_embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position_embedding = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``(batch, length, vocabulary)`` of tokens ``(batch, length)``."""
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(LENGTH))
        x += self.attention(self.norm(x))
        x += self.down(nnx.gelu(self.up(x)))
        return self.head(x)


def batch(step: int) -> jax.Array:
    """Random tokens, other ones for each step."""
    return jax.random.randint(jax.random.key(step), (BATCH, LENGTH), 0, VOCABULARY)


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The cross entropy of the tokens, backwards."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, ::-1]).mean()


def with_linen(tx: optax.GradientTransformation, steps: int = STEPS) -> list[float]:
    """Trains the Linen model; the loss of each step."""
    model = LinenModel()
    params = jax.jit(model.init)(jax.random.key(0), batch(0))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        def loss(params: optax.Params) -> jax.Array:
            return loss_of(state.apply_fn({"params": params}, tokens), tokens)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for i in range(steps):
        state, value = step(state, batch(i))
        losses.append(float(value))
    return losses


def with_nnx(tx: optax.GradientTransformation, steps: int = STEPS) -> list[float]:
    """Trains the NNX model; the loss of each step."""
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: NNXModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda model: loss_of(model(tokens), tokens))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer, batch(i))) for i in range(steps)]


def table(losses: dict[str, tuple[list[float], list[float]]]) -> str:
    """One line for each optimizer: the first loss and the last, on both paths."""
    lines = [f"{'':12}{'Linen: first':>14}{'last':>8}{'NNX: first':>14}{'last':>8}"]
    for name, (on_linen, on_nnx) in losses.items():
        ends = f"{on_linen[0]:>14.3f}{on_linen[-1]:>8.3f}{on_nnx[0]:>14.3f}{on_nnx[-1]:>8.3f}"
        lines.append(f"{name:12}{ends}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps

    losses = {
        name: (with_linen(make(), steps), with_nnx(make(), steps))
        for name, make in OPTIMIZERS.items()
    }
    print(table(losses))


if __name__ == "__main__":
    main()
