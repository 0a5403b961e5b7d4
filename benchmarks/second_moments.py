"""How well does a second moment that many parameters share pre-train, beside AdamW?

python -m benchmarks.second_moments --out runs/second_moments.csv
"""

import optax

from benchmarks.sweep import sweep
from examples.llama.config import Config
from microadam_jax import Partition, Subsets, adam_mini, adam_sn, came, transformer_rules

PARTITION = Partition(transformer_rules(heads=Config().heads))

SETTINGS = {
    "AdamW": lambda rate: optax.adamw(rate, weight_decay=0.0),
    "Adam-mini": lambda rate: adam_mini(rate, partition=PARTITION),
    "Adam-mini, query and key by output": adam_mini,
    "AdamSN": adam_sn,
    "AdamSN, mean": lambda rate: adam_sn(rate, subsets=Subsets(reduction="mean")),
    "AdamSN, runs": lambda rate: adam_sn(rate, subsets=Subsets("runs")),
    "CAME, b3 = 0.99": lambda rate: came(rate, b3=0.99),
}
ADAM = (1e-3, 2e-3, 4e-3)
TENFOLD = (1e-2, 2e-2, 4e-2)
RATES = {name: TENFOLD if name in ("AdamSN", "AdamSN, runs") else ADAM for name in SETTINGS} | {
    "CAME, b3 = 0.99": (5e-4, 1e-3, 2e-3)
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], SETTINGS, RATES)
