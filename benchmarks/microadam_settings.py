"""Which settings of MicroAdam pre-train best at 0.9 bytes of state per parameter or less?

python -m benchmarks.microadam_settings --out runs/microadam_settings.csv
"""

import dataclasses

import optax

from benchmarks.sweep import Trial, sweep
from microadam_jax import MicroAdamLayout, Window, error_feedback, microadam, to_dense, top_k
from microadam_jax.codecs import affine4


def layout(k: int, window: int | Window, **residual: str) -> MicroAdamLayout:
    """``k`` of 256 elements, a window of that many rows, 4-bit buckets of 256."""
    window = Window(window) if isinstance(window, int) else window
    return MicroAdamLayout(top_k(density=k / 256), affine4(**residual), window)


def sign_of_top_k(rate: optax.Schedule, k: int) -> optax.GradientTransformation:
    """Error feedback and the sign: what a window of one comes to, without keeping it."""
    return optax.chain(
        error_feedback(top_k(density=k / 256)),
        to_dense(),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(rate),
    )


EXACT = dataclasses.replace(layout(10, 3), residual="float32")
NORMALIZED = layout(10, Window(3, normalized=True))

SETTINGS = {
    "AdamW": lambda rate: optax.adamw(rate, weight_decay=0.0),
    "paper": lambda rate: microadam(rate, layout="paper"),
    "k = 3, window 10": lambda rate: microadam(rate, layout=layout(3, 10)),
    "k = 6, window 5": lambda rate: microadam(rate, layout=layout(6, 5)),
    "k = 10, window 3": lambda rate: microadam(rate, layout=layout(10, 3)),
    "k = 15, window 2": lambda rate: microadam(rate, layout=layout(15, 2)),
    "k = 30, window 1": lambda rate: microadam(rate, layout=layout(30, 1)),
    "sign of k = 30": lambda rate: sign_of_top_k(rate, 30),
    "sign of k = 64": lambda rate: sign_of_top_k(rate, 64),
    "k = 10, window 3, float32 residual": lambda rate: microadam(rate, layout=EXACT),
    "k = 10, window 3, stochastic rounding": lambda rate: microadam(
        rate, layout=layout(10, 3, rounding="stochastic")
    ),
    "k = 10, window 3, normalized": lambda rate: microadam(rate, layout=NORMALIZED),
    "k = 10, window 3, alpha = 0.1": lambda rate: microadam(rate, alpha=0.1, layout=layout(10, 3)),
    "k = 10, window 3, b2 = 0.99": lambda rate: microadam(rate, b2=0.99, layout=layout(10, 3)),
}


if __name__ == "__main__":
    rates = 1e-3, 2e-3, 4e-3
    sweep(__doc__.splitlines()[0], {name: Trial(SETTINGS[name], rates) for name in SETTINGS})
