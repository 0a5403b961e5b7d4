"""Pre-trains with parameters in bfloat16, rounded in each way, beside parameters in float32.

python -m benchmarks.rounding --out benchmarks/results/rounding.csv --seeds 0 1 2

Activations are computed in float32, so that the parameters' format is all that differs.
"""

import functools
from typing import get_args

import optax

from benchmarks.frontier import evenly
from benchmarks.sweep import sweep
from microadam_jax import round_updates
from microadam_jax.transforms.round_updates import Rounding

ADAMW = evenly(optax.adamw, (2e-3,))
BFLOAT16 = ADAMW._replace(config={"param_dtype": "bfloat16"})
TRIALS = {
    "float32": ADAMW,
    "bfloat16, nearest": BFLOAT16,
    **{
        f"bfloat16, {rounding}": BFLOAT16._replace(
            around=functools.partial(round_updates, rounding=rounding)
        )
        for rounding in get_args(Rounding)
    },
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], TRIALS)
