"""How well do states in few bits pre-train, beside AdamW in float32?

python -m benchmarks.low_bit_states --out runs/low_bit_states.csv --seeds 0 1 2
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks.sweep import Setting, Trial, sweep
from microadam_jax import (
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    lion4bit,
    muon8bit,
)
from microadam_jax.blocks import merge, split
from microadam_jax.codecs import dynamic4, linear4
from microadam_jax.codecs.scaled import Scaled, ScaledCodes

RATES = (1e-3, 2e-3)


@dataclasses.dataclass(frozen=True)
class Diffused(Scaled):
    """Rounds to nearest after adding the rounding error of the element before it in the block.

    Errors cancel between neighbours, without random numbers. The largest element keeps its code,
    which needs a symmetric map.
    """

    def encode(self, x: jax.Array, key: object = None) -> ScaledCodes:
        """Encodes the float32 tensor ``x``."""
        del key
        layout, values = self.blocks.layout_of(x), jnp.asarray(self.map.values, jnp.float32)
        block = split(x, layout)
        largest = jnp.max(jnp.abs(block), axis=-1, keepdims=True)
        y = jnp.moveaxis(block / jnp.where(largest > 0, largest, 1), -1, 0)

        def round_next(error: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            owed = jnp.where(jnp.abs(y) < 1, y + error, y)
            rounded = values[jnp.abs(owed[..., None] - values).argmin(-1)]
            return owed - rounded, rounded

        _, rounded = jax.lax.scan(round_next, jnp.zeros(y.shape[1:]), y)
        return super().encode(merge(jnp.moveaxis(rounded, 0, -1) * largest, layout, x.shape))


def plainly(factory: Callable[..., optax.GradientTransformation], **options: object) -> Setting:
    """The optimizer without weight decay, as all of them are compared here."""
    return lambda rate: factory(rate, weight_decay=0.0, **options)


def mini4(codec: object) -> Setting:
    return plainly(adam_mini4bit, mu_codec=codec)


DIFFUSED = Diffused(dynamic4(symmetric=True).map, dynamic4().blocks)

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
    "Lion, 4 bits": plainly(lion4bit),
    "Muon, 8 bits": plainly(muon8bit),
    "Adam-mini, 4 bits to nearest": mini4("dynamic4"),
    "Adam-mini, 4 bits symmetric": mini4(dynamic4(rounding="stochastic", symmetric=True)),
    "Adam-mini, 4 bits linear": mini4(linear4(signed=True, rounding="stochastic")),
    "Adam-mini, 4 bits, error diffused": mini4(DIFFUSED),
    "Adam-mini, 4 bits, blocks of 64": mini4(dynamic4(64, rounding="stochastic")),
    "Adam-mini, 4 bits linear, blocks of 64": mini4(
        linear4(64, signed=True, rounding="stochastic")
    ),
}

LION_RATES = (1e-4, 2e-4, 4e-4)  # every element moves by the whole rate

if __name__ == "__main__":
    rates = dict.fromkeys(SETTINGS, RATES) | {"Lion, 4 bits": LION_RATES}
    sweep(__doc__.splitlines()[0], {name: Trial(SETTINGS[name], rates[name]) for name in SETTINGS})
