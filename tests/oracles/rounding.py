"""Parameters in bfloat16 that keep their rounding error, in float64 NumPy, one leaf at a time.

The feedback into the momentum is written as ECO's authors do (arXiv 2601.22101), with the learning
rate and the moments of AdamW; the library finds the same numbers without knowing any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats


def spacing(x: Floats, digits: int = 8) -> Floats:
    """The distance between floats of ``digits`` binary digits, the first one counted, at ``x``."""
    _, exponent = np.frexp(np.abs(x))
    return np.exp2(np.maximum(exponent, -125).astype(np.float64) - digits)


def to_nearest(x: Floats, even: bool, digits: int = 8) -> Floats:
    """Floats of so many digits; halves go to the even one, or away from zero."""
    step = spacing(x, digits)
    if even:
        return np.round(x / step) * step
    return np.sign(x) * np.floor(np.abs(x) / step + 0.5) * step


def stochastic(x: Floats, draws: Floats, digits: int = 8) -> Floats:
    """One of the two neighbours: what is left of a magnitude after a draw from [0, 1) is added."""
    step = spacing(x, digits)
    return np.sign(x) * np.floor(np.abs(x) / step + draws) * step


@dataclass
class StochasticOracle:
    """Parameters rounded stochastically; no error is kept."""

    parameter: Floats

    def apply(self, update: Floats, draws: Floats) -> Floats:
        self.parameter = stochastic(self.parameter + update, draws)
        return self.parameter


@dataclass
class CompensatedOracle:
    """Parameters to nearest, whose error is added to the next update.

    Attributes:
        parameter: as the model sees it.
        digits: of parameter and error together; 24 keep a float32.
        even: where halves go. Those of a split cannot go to the even one: what is left of a half
            would need a bit more.
    """

    parameter: Floats
    digits: int
    even: bool
    error: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.error = np.zeros_like(self.parameter)

    @property
    def whole(self) -> Floats:
        return self.parameter + self.error

    def apply(self, update: Floats, draws: Floats) -> Floats:
        # Sums are float32, as those of a float32 parameter would be.
        new = (self.whole.astype(np.float32) + update.astype(np.float32)).astype(np.float64)
        new = stochastic(new, draws, self.digits) if self.digits < 24 else new
        self.parameter = to_nearest(new, self.even)
        self.error = new - self.parameter
        return self.parameter


@dataclass
class MomentumOracle:
    r"""AdamW whose first moment takes up the rounding error :math:`e`.

    .. math::

        m \leftarrow m + \frac{1 - \beta_1^t}{\eta} \left(1 - \frac{1}{\beta_1}\right)
            \left(\sqrt{v / (1 - \beta_2^t)} + \epsilon\right) e
    """

    parameter: Floats
    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    m: Floats = field(init=False)
    v: Floats = field(init=False)
    t: int = 0

    def __post_init__(self) -> None:
        self.m = np.zeros_like(self.parameter)
        self.v = np.zeros_like(self.parameter)

    def step(self, gradient: npt.NDArray[np.float64], draws: Floats) -> Floats:
        self.t += 1
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        self.m = self.b1 * self.m + (1 - self.b1) * gradient
        self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
        divisor = np.sqrt(self.v / c2) + self.eps
        direction = self.m / c1 / divisor + self.weight_decay * self.parameter
        new = self.parameter - self.learning_rate * direction
        self.parameter = stochastic(new, draws)
        error = new - self.parameter
        self.m = self.m + c1 / self.learning_rate * (1 - 1 / self.b1) * divisor * error
        return self.parameter
