"""Pre-trains a model whose layers keep their activations in 8 bits.

python -m benchmarks.activations --out benchmarks/results/activations.csv --seeds 0 1 2
"""

import optax

from benchmarks.frontier import evenly
from benchmarks.sweep import sweep
from microadam_jax import adamw_fp8

EXACT = evenly(optax.adamw, (2e-3,))
TRIALS = {
    "exact": EXACT,
    "fp8": EXACT._replace(config={"activations": "fp8"}),
    "coat": EXACT._replace(config={"activations": "coat"}),
    "coat, adamw_fp8": evenly(adamw_fp8, (2e-3,))._replace(config={"activations": "coat"}),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], TRIALS)
