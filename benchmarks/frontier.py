"""Trains with every optimizer, beside a tuned AdamW on paired seeds: the loss for a byte of state.

python -m benchmarks.frontier --out benchmarks/results/frontier.csv --seeds 0 1 2

All have the same learning rate for embeddings and norms, the best for AdamW, and each the best of
a few for its matrices: most of what is published as a gain over AdamW is the ratio of the two.
"""

import functools
from collections.abc import Callable, Sequence

import optax

from benchmarks.sweep import Trial, sweep
from microadam_jax import (
    adagrad_sn,
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adam_sn,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    apollo,
    apollo_mini,
    came,
    dct_adamw,
    fira,
    galore,
    grass,
    ldadam,
    lion4bit,
    lowrank_mfac,
    microadam,
    muon2bit,
    muon4bit,
    muon8bit,
    sinkhorn2bit,
    sinkhorn4bit,
    snsm,
    sparse_ggt,
    sparse_mfac,
)

OTHERS = 2e-2  # ten times the best rate of AdamW's matrices
RANK, EVERY = 32, 50


def evenly(
    factory: Callable[..., optax.GradientTransformation],
    rates: Sequence[float],
    others: float = OTHERS,
    **options: object,
) -> Trial:
    """An optimizer without weight decay whose embeddings and norms have AdamW's best rate."""
    setting = functools.partial(factory, weight_decay=0.0, **options)
    return Trial(setting, rates, others=others)


def adafactor(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Optax's, with rates that do not depend on the size of parameters."""
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        clipping_threshold=None,
        weight_decay_rate=weight_decay or None,
    )


ADAM, MUON = (1e-3, 2e-3, 4e-3), (4e-3, 8e-3, 1.6e-2)
NORMS, LION = (5e-3, 1e-2, 2e-2), (2e-4, 4e-4, 8e-4)
# With the learning rates of their matrices.
TRIALS: dict[str, Trial] = {
    "AdamW": evenly(optax.adamw, ADAM),
    "Adafactor": evenly(adafactor, (5e-4, 1e-3, 2e-3)),
    "Lion": evenly(optax.lion, LION, OTHERS / 5, b2=0.99),
    "Muon": evenly(muon8bit, MUON, mu_codec="float32"),
    "microadam": evenly(microadam, ADAM, layout="pretrain"),
    "adam_mini": evenly(adam_mini, ADAM),
    "adam_sn": evenly(adam_sn, NORMS),
    # Its updates have a root mean square of 1, where Adam's soon have one of a fifth.
    "came": evenly(came, (1e-4, 2e-4, 4e-4), OTHERS / 5),
    "adamw8bit": evenly(adamw8bit, ADAM),
    "adamw_fp8": evenly(adamw_fp8, ADAM),
    "adamw4bit": evenly(adamw4bit, ADAM),
    "adamw4bit_factored": evenly(adamw4bit_factored, ADAM),
    "adam_mini8bit": evenly(adam_mini8bit, ADAM),
    "adam_mini4bit": evenly(adam_mini4bit, ADAM),
    "lion4bit": evenly(lion4bit, (8e-4, 1.6e-3, 3.2e-3)),
    "muon8bit": evenly(muon8bit, MUON),
    "muon4bit": evenly(muon4bit, MUON),
    "muon2bit": evenly(muon2bit, MUON),
    "sinkhorn4bit": evenly(sinkhorn4bit, ADAM),
    "sinkhorn2bit": evenly(sinkhorn2bit, ADAM),
    "galore": evenly(galore, NORMS, rank=RANK, update_interval=EVERY),
    "grass": evenly(grass, ADAM, rank=RANK, update_interval=EVERY),
    "ldadam": evenly(ldadam, ADAM, rank=RANK),
    "snsm": evenly(snsm, NORMS, rank=RANK, update_interval=EVERY),
    "fira": evenly(fira, NORMS, rank=RANK, update_interval=EVERY),
    "apollo": evenly(apollo, NORMS, rank=RANK, update_interval=EVERY),
    "apollo_mini": evenly(apollo_mini, NORMS, update_interval=EVERY),
    "dct_adamw": evenly(dct_adamw, ADAM, rank=RANK),
    # Its updates have a scale of their own: one rate for all parameters.
    "adagrad_sn": Trial(adagrad_sn, (1e-2, 3e-2, 1e-1)),
    "sparse_mfac": Trial(sparse_mfac, (1e-2, 3e-2, 1e-1)),
    "lowrank_mfac": Trial(lowrank_mfac, (3e-3, 1e-2, 3e-2)),
    "sparse_ggt": Trial(sparse_ggt, (0.3, 1.0, 3.0)),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], TRIALS)
