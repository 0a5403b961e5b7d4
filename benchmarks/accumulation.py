"""What does MicroAdam lose when micro-batches are added up in its residual?

Every run sees the same micro-batches, 4 in a step, from the same initial weights.

python -m benchmarks.accumulation
"""

import argparse
import dataclasses

import optax

from examples.llama.config import Config
from examples.llama.data import load_corpus
from examples.llama.training import train
from microadam_jax import (
    MicroAdamLayout,
    Window,
    accumulate_into_residual,
    affine4,
    microadam,
    top_k,
)

MICRO_BATCHES = 4
SETTINGS = {
    "float32 accumulator (`optax.MultiSteps`), 4-bit residual": (optax.MultiSteps, affine4()),
    "4-bit residual": (accumulate_into_residual, affine4()),
    "bfloat16 residual": (accumulate_into_residual, "bfloat16"),
    "4-bit residual, stochastic rounding": (
        accumulate_into_residual,
        affine4(rounding="stochastic"),
    ),
}


def main() -> None:
    """Trains with each setting and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
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
        layout = MicroAdamLayout(top_k(density=30 / 256), residual, Window(1))
        accumulating = accumulate(microadam(rate, layout=layout), MICRO_BATCHES)
        # Each micro-batch is clipped, whatever adds them up.
        tx = optax.chain(optax.clip_by_global_norm(1.0), accumulating)
        result = train(config, tx, corpus)
        size = result.state_bytes / result.parameters
        print(f"| {name} | {size:.2f} | {result.held_out_loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
