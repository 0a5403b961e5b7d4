"""Trains with every optimizer, beside a tuned AdamW on paired seeds: the loss for a byte of state.

python -m benchmarks.frontier --out benchmarks/results/frontier.csv --seeds 0 1 2

All have the same learning rate for embeddings and norms, the best for AdamW, and each the best of
a few for its matrices: most of what is published as a gain over AdamW is the ratio of the two.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks.sweep import Setting, Trial, sweep
from examples.llama.optimizers import with_faster_embeddings
from microadam_jax import (
    Refresh,
    Storage,
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adam_sn,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    came,
    galore,
    grass,
    ldadam,
    lion4bit,
    microadam,
    muon8bit,
    sinkhorn2bit,
    sinkhorn4bit,
    snsm,
)
from microadam_jax.codecs import dynamic4, linear2

OTHERS = 2e-2  # ten times the best rate of AdamW's matrices
RANK, EVERY = 32, 50
TWO, FOUR = linear2(rounding="stochastic"), dynamic4(rounding="stochastic")


def evenly(
    factory: Callable[..., optax.GradientTransformation], others: float = OTHERS, **options: object
) -> Setting:
    """An optimizer without weight decay whose embeddings and norms have AdamW's best rate."""

    def setting(rate: optax.Schedule) -> optax.GradientTransformation:
        peak = float(jax.vmap(rate)(jnp.arange(10_000)).max())
        tx = factory(rate, weight_decay=0.0, **options)
        return with_faster_embeddings(tx, others / peak)

    return setting


def adafactor(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Optax's, with rates that do not depend on the size of parameters."""
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        clipping_threshold=None,
        weight_decay_rate=weight_decay or None,
    )


ADAM, NORMS, LION = (1e-3, 2e-3, 4e-3), (5e-3, 1e-2, 2e-2), (2e-4, 4e-4)
# With the learning rates of their matrices.
TRIALS: dict[str, Trial] = {
    "AdamW": Trial(evenly(optax.adamw), ADAM),
    "Adafactor": Trial(evenly(adafactor), ADAM),
    "Muon": Trial(evenly(muon8bit, mu_codec="float32"), ADAM),
    "microadam": Trial(evenly(microadam, layout="pretrain"), ADAM),
    "adam_mini": Trial(evenly(adam_mini), ADAM),
    "adam_sn": Trial(evenly(adam_sn), NORMS),
    # Its updates have a root mean square of 1, where Adam's soon have one of a fifth.
    "came": Trial(evenly(came, OTHERS / 5), (2e-4, 4e-4, 8e-4)),
    "adamw8bit": Trial(evenly(adamw8bit), ADAM),
    "adamw_fp8": Trial(evenly(adamw_fp8), ADAM),
    "adamw4bit": Trial(evenly(adamw4bit), ADAM),
    "adamw4bit_factored": Trial(evenly(adamw4bit_factored), ADAM),
    "adam_mini8bit": Trial(evenly(adam_mini8bit), ADAM),
    "adam_mini4bit": Trial(evenly(adam_mini4bit), ADAM),
    "lion4bit": Trial(evenly(lion4bit), LION),
    "muon8bit": Trial(evenly(muon8bit), ADAM),
    "sinkhorn4bit": Trial(evenly(sinkhorn4bit), ADAM),
    "sinkhorn2bit": Trial(evenly(sinkhorn2bit), ADAM),
    "galore": Trial(evenly(galore, rank=RANK, update_interval=EVERY), NORMS),
    "grass": Trial(evenly(grass, rank=RANK, update_interval=EVERY), ADAM),
    "ldadam": Trial(evenly(ldadam, rank=RANK), ADAM),
    "snsm": Trial(evenly(snsm, rank=RANK, update_interval=Refresh(EVERY)), NORMS),
    # The search: what was tried and is no optimizer of the library.
    "Sinkhorn, float32": Trial(evenly(sinkhorn4bit, mu_codec="float32"), ADAM),
    "Sinkhorn, float32, beta = 0.8": Trial(
        evenly(sinkhorn4bit, beta=0.8, mu_codec="float32"), ADAM
    ),
    "Sinkhorn, 4 bits to nearest": Trial(evenly(sinkhorn4bit, mu_codec="dynamic4"), ADAM),
    "Sinkhorn, 2 bits, beta = 0.8": Trial(evenly(sinkhorn2bit, beta=0.8), ADAM),
    "Sinkhorn, 2 bits, 4 for embeddings and head": Trial(
        evenly(sinkhorn2bit, mu_codec=Storage(TWO, rules=[(".*(embedding|head).*", FOUR)])), ADAM
    ),
    "Muon, 4 bits": Trial(evenly(muon8bit, mu_codec=FOUR), ADAM),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], TRIALS)
