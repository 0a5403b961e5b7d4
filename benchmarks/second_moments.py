"""How well does a second moment that many parameters share pre-train, beside AdamW?

python -m benchmarks.second_moments --out runs/second_moments.csv
"""

import optax

from benchmarks.sweep import Setting, Trial, sweep
from examples.llama.config import Config
from examples.llama.optimizers import with_faster_embeddings
from microadam_jax import Partition, adam_mini, adam_sn, came
from microadam_jax.layout.axes import Axes
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.subsets import Subsets

RULES = transformer_rules(heads=Config().heads)
EACH = "... -> ..."


def mini(*own: tuple[str, str | Axes], b2: float = 0.999) -> Setting:
    """Adam-mini with rules before the published ones."""
    return lambda rate: adam_mini(rate, b2=b2, partition=Partition((*own, *RULES)))


def tenfold(rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with AdamSN's learning rates: ten times as much for what is no linear map."""
    return with_faster_embeddings(optax.adamw(rate, weight_decay=0.0), 10)


ADAM, TENFOLD = (1e-3, 2e-3, 4e-3), (5e-3, 1e-2, 2e-2, 4e-2)
TRIALS: dict[str, Trial] = {
    "AdamW": Trial(lambda rate: optax.adamw(rate, weight_decay=0.0), ADAM),
    "AdamW, embeddings and norms tenfold": Trial(tenfold, ADAM),
    "AdamW, b2 = 0.95": Trial(lambda rate: optax.adamw(rate, b2=0.95, weight_decay=0.0), ADAM),
    "Adam-mini": Trial(mini(), ADAM),
    "Adam-mini, b2 = 0.95": Trial(mini(b2=0.95), ADAM),
    "Adam-mini, query and key by output": Trial(
        mini(("(query|key)/kernel", "in | out -> out")), ADAM
    ),
    "Adam-mini, value by head": Trial(
        mini(("value/kernel", Axes("in | (heads head_dim) -> heads", heads=Config().heads))),
        ADAM,
    ),
    "Adam-mini, whole value": Trial(mini(("value/kernel", "in out ->")), ADAM),
    "Adam-mini, down by input": Trial(mini(("down/kernel", "in | out -> in")), ADAM),
    "Adam-mini, down and attention output by input": Trial(
        mini(("(down|out)/kernel", "in | out -> in")),
        ADAM,
    ),
    "Adam-mini, attention elementwise": Trial(mini((r"attention/\w+/kernel", EACH)), ADAM),
    "Adam-mini, feed-forward elementwise": Trial(mini((r"mlp/\w+/kernel", EACH)), ADAM),
    "Adam-mini, embedding elementwise": Trial(mini(("embedding", EACH)), ADAM),
    "Adam-mini, head elementwise": Trial(mini(("head/kernel", EACH)), ADAM),
    "Adam-mini, embedding, head and norms elementwise": Trial(
        mini(("embedding|head/kernel|scale", EACH)),
        ADAM,
    ),
    "AdamSN": Trial(adam_sn, TENFOLD),
    "AdamSN, mean": Trial(lambda rate: adam_sn(rate, subsets=Subsets(reduction="mean")), ADAM),
    "AdamSN, runs": Trial(lambda rate: adam_sn(rate, subsets=Subsets("runs")), TENFOLD),
    "CAME, b3 = 0.99": Trial(lambda rate: came(rate, b3=0.99), (5e-4, 1e-3, 2e-3)),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], TRIALS)
