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


def layout(residual: object) -> MicroAdamLayout:
    """The preset for pre-training, with another residual."""
    return MicroAdamLayout(top_k(density=30 / 256), residual, Window(1))


RESIDUALS = {
    "4 bits, to nearest": affine4(),
    "4 bits, stochastic": affine4(rounding="stochastic"),
    "bfloat16": "bfloat16",
}


def main() -> None:
    """Trains with each residual, with and without an accumulator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
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
    print("| residual | accumulator | bytes/param | held-out loss |")
    print("|---|---|---|---|")
    for name, residual in RESIDUALS.items():
        inner = microadam(rate, layout=layout(residual))
        accumulated = {
            "float32, `optax.MultiSteps`": optax.MultiSteps(inner, MICRO_BATCHES),
            "none": accumulate_into_residual(inner, MICRO_BATCHES),
        }
        for accumulator, tx in accumulated.items():
            # Each micro-batch is clipped, whatever adds them up.
            clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
            result = train(config, clipped, corpus)
            size = result.state_bytes / result.parameters
            print(
                f"| {name} | {accumulator} | {size:.2f} | {result.held_out_loss:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
