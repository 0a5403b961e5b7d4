"""M-FAC on handwritten digits, whole and compressed: the same loss from a fraction of the memory.

A small convolutional network in Flax NNX learns scikit-learn's 8 x 8 digits with SGD, AdamW, M-FAC,
Sparse M-FAC and Low-rank M-FAC. Every optimizer gets the same batches and as many learning rates,
which fall linearly to zero; the one with the lowest training loss at the end is shown. M-FAC's
windows hold 32 gradients.

Run it from the root of the repository; it takes about a minute on a CPU::

    python examples/digits.py --figure digits.png
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from microadam_jax import lowrank_mfac, memory_report, mfac, sparse_mfac

STEPS, BATCH, HELD_OUT = 400, 64, 360
DAMPING = 1e-2

Images, Labels = jax.Array, jax.Array
Rates = tuple[float, ...]

OPTIMIZERS: dict[str, tuple[Callable[[optax.Schedule], optax.GradientTransformation], Rates]] = {
    "SGD": (optax.sgd, (0.1, 0.3, 1.0, 3.0)),
    "AdamW": (lambda rate: optax.adamw(rate, weight_decay=0.0), (3e-3, 1e-2, 3e-2, 1e-1)),
    "M-FAC": (lambda rate: mfac(rate, DAMPING), (0.01, 0.03, 0.1, 0.3)),
    "Sparse M-FAC": (lambda rate: sparse_mfac(rate, DAMPING), (0.01, 0.03, 0.1, 0.3)),
    "Low-rank M-FAC": (lambda rate: lowrank_mfac(rate, DAMPING), (0.01, 0.03, 0.1, 0.3)),
}
# Okabe and Ito's palette, which stays distinct under the common colour blindnesses.
COLORS = dict(zip(OPTIMIZERS, ("#999999", "#56B4E9", "#000000", "#D55E00", "#009E73"), strict=True))


class Network(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(128, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: Images) -> jax.Array:
        """Logits ``(batch, 10)`` of images ``(batch, 8, 8, 1)``."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


@dataclasses.dataclass(frozen=True)
class Run:
    """What training with one optimizer gave.

    Attributes:
        rate: the learning rate that gave the lowest loss in the end.
        losses: ``(steps,)``, on each batch.
        accuracy: on the images held out.
        bytes_per_parameter: of the optimizer's state.
    """

    rate: float
    losses: np.ndarray
    accuracy: float
    bytes_per_parameter: float

    @property
    def final_loss(self) -> float:
        """The mean over the last 50 batches."""
        return float(self.losses[-50:].mean())


def digits() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Images in [0, 1] and labels: those to train with, and those held out."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = jnp.asarray(data.images[order, :, :, None] / 16, jnp.float32)
    labels = jnp.asarray(data.target[order])
    return (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])


def train(name: str, steps: int = STEPS) -> Run:
    """Trains with each learning rate of the optimizer ``name``; the best run."""
    factory, rates = OPTIMIZERS[name]
    (images, labels), (unseen, answers) = digits()
    network, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    batches = jax.random.randint(jax.random.key(0), (steps, BATCH), 0, len(labels))

    def loss(params: nnx.State, images: Images, labels: Labels) -> jax.Array:
        logits = nnx.merge(network, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def learn(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        # To zero at the end, since M-FAC's steps grow while gradients shrink.
        tx = factory(lambda count: rate * (1 - count / steps))

        def step(
            carry: tuple[nnx.State, optax.OptState], batch: jax.Array
        ) -> tuple[tuple[nnx.State, optax.OptState], jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, images[batch], labels[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (learned, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        right = nnx.merge(network, learned)(unseen).argmax(-1) == answers
        return losses, right.mean()

    losses, accuracy = jax.jit(lambda rates: jax.lax.map(learn, rates))(jnp.array(rates))
    best = int(np.argmin(np.nan_to_num(losses[:, -50:].mean(-1), nan=np.inf)))
    return Run(
        rates[best],
        np.asarray(losses[best]),
        float(accuracy[best]),
        memory_report(factory(optax.constant_schedule(1.0)), params).bytes_per_parameter,
    )


def table(runs: dict[str, Run]) -> str:
    """One line for each optimizer."""
    lines = [f"{'':16}{'bytes/param':>12}{'rate':>8}{'last loss':>11}{'held-out accuracy':>19}"]
    for name, run in runs.items():
        lines.append(
            f"{name:16}{run.bytes_per_parameter:>12.2f}{run.rate:>8g}{run.final_loss:>11.4f}"
            f"{run.accuracy:>19.3f}"
        )
    return "\n".join(lines)


def draw(runs: dict[str, Run], path: Path, window: int = 20) -> None:
    """Writes the losses to ``path``, each a moving average over ``window`` batches."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, run in runs.items():
            smooth = np.convolve(run.losses, np.full(window, 1 / window), mode="valid")
            label = f"{name}: {run.bytes_per_parameter:.1f} bytes per parameter"
            steps = np.arange(len(smooth)) + window
            axes.semilogy(steps, smooth, color=COLORS[name], label=label)
        axes.set(xlabel="step", ylabel=f"training loss, mean of {window} batches")
        axes.set_title("Handwritten digits, 8 x 8")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=Path("digits.png"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()

    runs = {}
    for name in OPTIMIZERS:
        runs[name] = train(name, arguments.steps)
        print(f"{name}: {runs[name].final_loss:.4f}", flush=True)
    print(table(runs))
    draw(runs, arguments.figure)
    print(f"Wrote {arguments.figure}.")


if __name__ == "__main__":
    main()
