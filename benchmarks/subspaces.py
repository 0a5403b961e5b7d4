"""How well do subspace methods of one rank pre-train, beside AdamW in float32?

python -m benchmarks.subspaces --out runs/subspaces.csv --seeds 0 1 2

All keep Adam on the embedding and on norms, and SNSM alone projects the output head, as published.
"""

from collections.abc import Callable

import jax
import optax

from benchmarks.sweep import Setting, Trial, sweep
from microadam_jax import (
    Matrices,
    Refresh,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    galore,
    grass,
    ldadam,
    snsm,
)
from microadam_jax.subspace import Discard, FeedBack, sampled_rows, top_k_rows

RANK = 32  # a quarter of the model's width, as in the papers
EVERY = 50


def plainly(factory: Callable[..., optax.GradientTransformation], **options: object) -> Setting:
    """The optimizer without weight decay, as all of them are compared here."""
    return lambda rate: factory(rate, weight_decay=0.0, **options)


def quarter(rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW as GaLore's scale leaves it: its matrices at a quarter of the learning rate."""

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(
            lambda path, _: (
                "matrix" if path[-1].key == "kernel" and path[-2].key != "head" else "other"
            ),
            params,
        )

    matrix = optax.adamw(lambda count: rate(count) / 4, weight_decay=0.0)
    return optax.partition({"matrix": matrix, "other": optax.adamw(rate, weight_decay=0.0)}, labels)


SETTINGS: dict[str, Setting] = {
    "AdamW": plainly(optax.adamw),
    "AdamW, matrices at a quarter": quarter,
    "GaLore": plainly(galore, rank=RANK, update_interval=EVERY),
    "Fira": plainly(fira, rank=RANK, update_interval=EVERY),
    "APOLLO": plainly(apollo, rank=RANK, update_interval=EVERY),
    "APOLLO-Mini": plainly(apollo_mini, update_interval=EVERY),
    "SNSM": plainly(snsm, rank=RANK, update_interval=EVERY),
    "SNSM, moments rotated": plainly(
        snsm, rank=RANK, update_interval=Refresh(EVERY, first=1, moments="rotate_first")
    ),
    "SNSM, rows": plainly(
        snsm,
        update_interval=EVERY,
        subspace=top_k_rows(RANK),
        matrices=Matrices(side="larger", square="out"),
    ),
    "Grass": plainly(grass, rank=RANK, update_interval=EVERY),
    "Grass, sampled": plainly(grass, subspace=sampled_rows(RANK), update_interval=EVERY),
    "LDAdam": plainly(ldadam, rank=RANK),
    "LDAdam, bfloat16 feedback": plainly(ldadam, rank=RANK, complement=FeedBack(dtype="bfloat16")),
    "LDAdam, no feedback": plainly(ldadam, rank=RANK, complement=Discard()),
    "DCT-AdamW": plainly(dct_adamw, rank=RANK),
}
ADAM, SCALED, ROWS, NORMS = (1e-3, 2e-3), (5e-3, 1e-2, 2e-2), (2e-3, 5e-3, 1e-2), (1e-2, 2e-2, 5e-2)
GRIDS = {
    "AdamW, matrices": SCALED,
    "AdamW": ADAM,
    "LDAdam": ADAM,
    "DCT": ADAM,
    "Grass": ROWS,
    "SNSM": NORMS,
}
RATES = {
    name: next((grid for start, grid in GRIDS.items() if name.startswith(start)), SCALED)
    for name in SETTINGS
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], {name: Trial(SETTINGS[name], RATES[name]) for name in SETTINGS})
