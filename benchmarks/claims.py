"""Four claims of papers, each on the smallest problem that can show it: handwritten digits.

python -m benchmarks.claims
python -m benchmarks.claims --only zero --steps 600

zero: 4-bit second moments with a code for zero are unstable (Li et al., 2023, Table 1).
expansion: FP8 states are nearer to Adam's step with COAT's expansion (Xi et al., 2024, Table 1).
feedback: GaLore's residual outgrows the gradient if it is merely fed back (Modoranu et al., 2024,
Figure 8).
ggt: GGT's window of gradients can be compressed a hundredfold if what is not sent is fed back
(Modoranu et al., EFCP, 2023).

The network has three layers, 64-128-128-10, and 26,122 parameters; scikit-learn's 1,797 images of
8 x 8, batches of 64.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.unbiased_roots import WITH_ZERO
from microadam_jax import (
    Window,
    compress,
    galore,
    ldadam,
    memory_report,
    quantize_state,
    sparse_ggt,
    top_k,
)
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import as_codec
from microadam_jax.codecs.scaled import Scaled
from microadam_jax.subspace import FeedBack
from microadam_jax.transforms import scale_by_ggt

WIDTHS, BATCH, SEEDS = (64, 128, 128, 10), 64, (0, 1, 2)
NAMES = ("input", "hidden", "head")
RANK, INTERVAL = 4, 50
Factory = Callable[[Any], optax.GradientTransformation]  # of a learning rate, which may be traced


@functools.cache
def digits() -> tuple[jax.Array, jax.Array]:
    """Images ``(n, 64)`` in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)


def initial(seed: jax.Array) -> dict[str, Any]:
    """Weights of variance 2 / inputs, and no biases."""
    keys = jax.random.split(jax.random.key(seed), len(NAMES))
    return {
        name: {
            "kernel": jax.random.normal(key, (rows, columns)) * jnp.sqrt(2 / rows),
            "bias": jnp.zeros(columns),
        }
        for name, key, rows, columns in zip(NAMES, keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    }


def loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
    """Cross-entropy in nats, of the images with these indices."""
    images, labels = digits()
    x = images[batch]
    for name in NAMES:
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == NAMES[-1] else jax.nn.relu(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels[batch]).mean()


def train(
    factory: Factory, rates: Sequence[float], steps: int, watch: Callable[..., Any] | None = None
) -> Any:
    """Trains with each rate, which falls linearly to zero, and each seed.

    Args:
        factory: makes the optimizer from a schedule.
        rates: the learning rates.
        steps: how many.
        watch: of state and gradients after a step, an array that is to be returned.

    Returns:
        Losses ``(rates, seeds, steps)``, what ``watch`` saw, and the last optimizer states.
    """
    count = len(digits()[1])

    def run(rate: jax.Array, seed: jax.Array) -> Any:
        tx = factory(lambda step: rate * (1 - step / steps))
        params = initial(seed)
        batches = jax.random.randint(jax.random.key(100 + seed), (steps, BATCH), 0, count)

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            seen = value if watch is None else watch(state, grads)
            return (optax.apply_updates(params, updates), state), (value, seen)

        (_, state), (losses, seen) = jax.lax.scan(step, (params, tx.init(params)), batches)
        return losses, seen, state

    pairs = [(rate, seed) for rate in rates for seed in SEEDS]
    run_all = jax.jit(lambda pairs: jax.lax.map(lambda pair: run(*pair), pairs))
    result = run_all((jnp.array([r for r, _ in pairs]), jnp.array([s for _, s in pairs])))
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(len(rates), len(SEEDS), *x.shape[1:]), result
    )


def last(losses: np.ndarray) -> np.ndarray:
    """The mean over the last 50 batches."""
    return losses[..., -50:].mean(-1)


def print_losses(name: str, rates: Sequence[float], losses: np.ndarray) -> None:
    """One row: each seed's last loss, by learning rate."""
    cells = [
        f"{rate:g}: " + " ".join(f"{value:.3g}" for value in last(row))
        for rate, row in zip(rates, losses, strict=True)
    ]
    print(f"| {name} | {', '.join(cells)} |", flush=True)


def zero(steps: int) -> None:
    """AdamW whose second moment is in 4 bits, its first in float32."""
    with_zero = Scaled(WITH_ZERO, Blocks(128))
    second = {
        "float32": "float32",
        "dynamic, with a code for zero": with_zero,
        "dynamic, without (`dynamic4_unsigned`)": "dynamic4_unsigned",
        "linear, without (`linear4_unsigned`)": "linear4_unsigned",
        "linear of rows and columns, without (`rank1_linear4`)": "rank1_linear4",
    }
    rates = (1e-3, 3e-3)
    print("\n| second moment | learning rate: last loss of each seed |\n|---|---|")
    for name, codec in second.items():

        def factory(rate: Any, codec: Any = codec) -> optax.GradientTransformation:
            adam = quantize_state(optax.scale_by_adam(), {"nu": codec})
            return optax.chain(adam, optax.scale_by_learning_rate(rate))

        print_losses(name, rates, train(factory, rates, steps)[0])


def expansion(steps: int) -> None:
    """Compares Adam's step with itself, once its moments were stored."""
    _, _, (adam, _) = train(
        lambda rate: optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate)),
        (1e-3,),
        steps,
    )
    names = ("dynamic8", "e5m2", "e5m2_expanded", "e4m3", "e4m3_expanded")
    seconds = ("dynamic8_unsigned", *names[1:])
    # Kernels of all seeds, whose rows of 128 are a block each.
    mu, nu = (
        jnp.concatenate([x[name]["kernel"].reshape(-1, 128) for name in ("input", "hidden")])
        for x in adam[1:]
    )
    first = {name: stored(name, mu) for name in names}
    second = {name: stored(name, nu) for name in seconds}
    exact = stepped(mu, nu, steps)
    print(f"\n| first moment \\ second | {' | '.join(f'`{name}`' for name in seconds)} |")
    print("|---" * (len(seconds) + 1) + "|")
    for name, m in first.items():
        errors = [np.mean((stepped(m, v, steps) - exact) ** 2) for v in second.values()]
        print(f"| `{name}` | {' | '.join(f'{error:.1e}' for error in errors)} |")
    zeros = [100 * float(jnp.mean((v == 0) & (nu > 0))) for v in second.values()]
    print(f"| second moments that became zero, % | {' | '.join(f'{x:.2g}' for x in zeros)} |")
    codec = as_codec("e4m3_expanded")
    for moment, x in {"first": mu, "second": nu}.items():
        exponents = codec.encode(x).exponents / 16
        quartiles = np.quantile(np.asarray(exponents), (0.25, 0.5, 0.75))
        print(f"Exponents of the {moment} moment's blocks, quartiles: {quartiles}")


def stored(codec: str, x: jax.Array) -> jax.Array:
    """Encodes and decodes."""
    chosen = as_codec(codec)
    return chosen.decode(chosen.encode(x), x.shape)


def stepped(m: jax.Array, v: jax.Array, steps: int, eps: float = 1e-8) -> np.ndarray:
    """Adam's step, corrected for the bias."""
    m, v = m / (1 - 0.9**steps), v / (1 - 0.999**steps)
    return np.asarray(m / (jnp.sqrt(v) + eps), np.float64)


def feedback(steps: int) -> None:
    """The residual of the hidden layer over its gradient, and where training ends."""

    def ratio(state: Any, grads: Any) -> jax.Array:
        residual = state[0].complement.residual["hidden"]["kernel"]
        return jnp.linalg.norm(residual) / jnp.linalg.norm(grads["hidden"]["kernel"])

    settings: dict[str, tuple[Factory, tuple[float, ...], bool]] = {
        "GaLore": (
            lambda rate: galore(rate, rank=RANK, update_interval=INTERVAL),
            (0.01, 0.03, 0.1),
            False,
        ),
        "GaLore, its residual fed back": (
            lambda rate: galore(
                rate, rank=RANK, update_interval=INTERVAL, complement=FeedBack(momentum=False)
            ),
            (0.01, 0.03, 0.1),
            True,
        ),
        "LDAdam": (lambda rate: ldadam(rate, rank=RANK), (0.003, 0.01, 0.03), True),
    }
    shown = [step for step in (1, 10, 25, 49, 50, 51, 75, 99, 100, 150, 199) if step < steps]
    print("\n| optimizer | learning rate: last loss of each seed |\n|---|---|")
    ratios: dict[str, np.ndarray] = {}
    for name, (factory, rates, has_residual) in settings.items():
        losses, seen, _ = train(factory, rates, steps, ratio if has_residual else None)
        print_losses(name, rates, losses)
        if has_residual:
            best = int(np.nanargmin(last(losses).mean(-1)))
            ratios[f"{name}, at {rates[best]:g}"] = seen[best].mean(0)
    print(f"\n| residual / gradient after step | {' | '.join(map(str, shown))} |")
    print("|---" * (len(shown) + 1) + "|")
    for name, values in ratios.items():
        print(f"| {name} | {' | '.join(f'{values[step - 1]:.1f}' for step in shown)} |")


def ggt(steps: int) -> None:
    """GGT with a window of 100 gradients, whole and one element in a hundred of each."""
    window, hundredth = Window(100, dtype="float32"), top_k(density=0.01, min_size=0, min_row=0)

    def whole(rate: Any) -> optax.GradientTransformation:
        return optax.chain(scale_by_ggt(window), optax.scale_by_learning_rate(rate))

    def fed_back(rate: Any) -> optax.GradientTransformation:
        return sparse_ggt(rate, compressor=hundredth, window=Window(100))

    def not_fed_back(rate: Any) -> optax.GradientTransformation:
        return optax.chain(
            compress(hundredth),
            scale_by_ggt(Window(100), compressor=hundredth),
            optax.scale_by_learning_rate(rate),
        )

    settings: dict[str, tuple[Factory, tuple[float, ...]]] = {
        "SGD": (optax.sgd, (0.3, 1.0, 3.0)),
        "AdamW": (functools.partial(optax.adamw, weight_decay=0.0), (3e-3, 1e-2, 3e-2)),
        "GGT": (whole, (0.3, 1.0, 3.0)),
        "Sparse GGT": (fed_back, (0.3, 1.0, 3.0)),
        "Sparse GGT, nothing fed back": (not_fed_back, (0.3, 1.0, 3.0)),
    }
    print("\n| optimizer | bytes | learning rate: last loss of each seed |\n|---|---|---|")
    for name, (factory, rates) in settings.items():
        size = memory_report(factory(0.1), initial(jnp.int32(0))).bytes_per_parameter
        print_losses(f"{name} | {size:.1f}", rates, train(factory, rates, steps)[0])


CLAIMS = {"zero": zero, "expansion": expansion, "feedback": feedback, "ggt": ggt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(CLAIMS), choices=list(CLAIMS))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    for name in args.only:
        CLAIMS[name](args.steps)


if __name__ == "__main__":
    main()
