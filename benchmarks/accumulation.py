"""What does MicroAdam lose when micro-batches are added up in its residual?

Every run sees the same micro-batches, 4 in a step, from the same initial weights. Before that, how
much of a step's gradient rounding loses, by the number of micro-batches.

python -m benchmarks.accumulation
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train
from microadam_jax import (
    MicroAdamLayout,
    Window,
    accumulate_into_residual,
    error_feedback,
    microadam,
    to_dense,
    top_k,
)
from microadam_jax.codecs import Codec, affine4, as_codec

MICRO_BATCHES = 4
COMPRESSOR = top_k(density=30 / 256)
SETTINGS = {
    "float32 accumulator (`optax.MultiSteps`), 4-bit residual": (optax.MultiSteps, affine4()),
    "4-bit residual": (accumulate_into_residual, affine4()),
    "bfloat16 residual": (accumulate_into_residual, "bfloat16"),
    "4-bit residual, stochastic rounding": (
        accumulate_into_residual,
        affine4(rounding="stochastic"),
    ),
}


def lost_share(residual: Codec | str, micro_batches: int, steps: int = 40) -> float:
    """The norm of what rounding loses in a step, over that of its gradient, a normal variable."""
    codec, shape = as_codec(residual), (64, 512)
    link = optax.chain(error_feedback(COMPRESSOR, residual), to_dense())
    tx = accumulate_into_residual(link, micro_batches)
    update = jax.jit(tx.update)
    decode = jax.jit(lambda state: codec.decode(state.inner_state[0].residual, shape))
    random, state, shares = np.random.default_rng(0), tx.init(jnp.zeros(shape)), []
    mean = 0.3 * random.standard_normal(shape)
    for _ in range(steps):
        total = np.asarray(decode(state), np.float64)
        noise = random.standard_normal((micro_batches, *shape)) * micro_batches**0.5
        gradients = (mean + noise).astype(np.float32)
        for gradient in gradients:
            sent, state = update(jnp.asarray(gradient), state)
        gradient = gradients.mean(axis=0, dtype=np.float64)
        lost = total + gradient - np.asarray(sent) - np.asarray(decode(state))
        shares.append(np.linalg.norm(lost) / np.linalg.norm(gradient))
    return float(np.mean(shares[steps // 4 :]))


def print_lost_shares() -> None:
    """One row for each residual, as Markdown."""
    counts = (1, 4, 16)
    print(f"| residual | {' | '.join(map(str, counts))} |")
    print("|---|---|---|---|")
    for name, (accumulate, residual) in SETTINGS.items():
        if accumulate is accumulate_into_residual:
            cells = [f"{lost_share(residual, count):.3f}" for count in counts]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints what is lost, then trains with each setting and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    print_lost_shares()
    rows = Config().batch // MICRO_BATCHES
    count = args.steps * MICRO_BATCHES
    config = dataclasses.replace(
        Config(), batch=rows, steps=count, eval_every=count, eval_batches=64, log_every=count
    )
    corpus = load_corpus(config)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, args.steps // 20, args.steps, 0.1 * args.rate
    )
    print("| added up in | bytes/param | held-out loss |")
    print("|---|---|---|")
    for name in args.settings:
        accumulate, residual = SETTINGS[name]
        # The preset for pre-training, with that residual.
        layout = MicroAdamLayout(COMPRESSOR, residual, Window(1))
        accumulating = accumulate(microadam(rate, layout=layout), MICRO_BATCHES)
        # Each micro-batch is clipped, whatever adds them up.
        tx = optax.chain(optax.clip_by_global_norm(1.0), accumulating)
        result = train(config, tx, corpus)
        size = result.state_bytes / result.parameters
        print(f"| {name} | {size:.2f} | {result.held_out_loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
