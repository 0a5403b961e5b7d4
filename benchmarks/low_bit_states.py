"""How well do states in few bits pre-train, beside AdamW in float32?

python -m benchmarks.low_bit_states --out runs/low_bit_states.csv --seeds 0 1 2
"""

from collections.abc import Callable

import optax

from benchmarks.sweep import Setting, sweep
from microadam_jax import (
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    dynamic4,
    linear4,
)

RATES = (1e-3, 2e-3)


def plainly(factory: Callable[..., optax.GradientTransformation], **options: object) -> Setting:
    """The optimizer without weight decay, as all of them are compared here."""
    return lambda rate: factory(rate, weight_decay=0.0, **options)


def mini4(codec: object) -> Setting:
    return plainly(adam_mini4bit, mu_codec=codec)


SETTINGS: dict[str, Setting] = {
    "AdamW": plainly(optax.adamw),
    "AdamW, 8 bits": plainly(adamw8bit),
    "AdamW, FP8 expanded": plainly(adamw_fp8),
    "AdamW, FP8": plainly(adamw_fp8, mu_codec="e4m3", nu_codec="e4m3"),
    "AdamW, 4 bits, rank-1": plainly(adamw4bit),
    "AdamW, 4 bits, blocks": plainly(adamw4bit, nu_codec="linear4_unsigned"),
    "AdamW, 4 bits, factored": plainly(adamw4bit_factored),
    "Adam-mini": plainly(adam_mini),
    "Adam-mini, 8 bits": plainly(adam_mini8bit),
    "Adam-mini, 4 bits": plainly(adam_mini4bit),
    "Adam-mini, 4 bits to nearest": mini4("dynamic4"),
    "Adam-mini, 4 bits symmetric": mini4(dynamic4(rounding="stochastic", symmetric=True)),
    "Adam-mini, 4 bits linear": mini4(linear4(signed=True, rounding="stochastic")),
    "Adam-mini, 4 bits, blocks of 64": mini4(dynamic4(64, rounding="stochastic")),
    "Adam-mini, 4 bits linear, blocks of 64": mini4(
        linear4(64, signed=True, rounding="stochastic")
    ),
}

if __name__ == "__main__":
    sweep(__doc__.splitlines()[0], SETTINGS, dict.fromkeys(SETTINGS, RATES))
