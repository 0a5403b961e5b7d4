"""Muon and Sinkhorn in float64 NumPy, one matrix at a time, with Nesterov's momentum.

Muon is from arXiv 2502.16982 and its authors' code, Sinkhorn's iteration from arXiv 2502.06742. The
first adds up gradients where this takes their average, and corrects no bias. A matrix's update
does not depend on its scale, so they differ only in how Nesterov's step weights gradient and
momentum. That is Optax's here: both are corrected for the steps that they have seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats, LearningRate, rate_at


def orthogonalized(x: Floats) -> Floats:
    """Five steps of Newton and Schulz on the singular values of a matrix."""
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / (np.sqrt(np.sum(values**2)) + 1e-8)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def muon(x: Floats) -> Floats:
    """An orthogonalized matrix whose root mean square is near 1."""
    return np.sqrt(max(x.shape)) * orthogonalized(x)


def sinkhorn(x: Floats) -> Floats:
    """Brings rows, then columns, to a root mean square of 1, five times."""
    x = np.array(x)
    for _ in range(5):
        for axis in (1, 0):
            size = np.sqrt(np.mean(x**2, axis, keepdims=True))
            x = x / np.where(size > 0, size, 1)
    return x


def as_it_is(momentum: Floats) -> Floats:
    """A momentum that is not rounded."""
    return momentum


@dataclass
class MatrixMomentumOracle:
    r"""Muon or Sinkhorn on one matrix, with decoupled weight decay.

    .. math::

        m &\leftarrow \beta m + (1 - \beta) g \\
        n &= \beta m / (1 - \beta^{t+1}) + (1 - \beta) g / (1 - \beta^t) \\
        \theta &\leftarrow \theta - \eta (0.2 D(n) + \lambda \theta)

    Attributes:
        theta: the matrix, which starts as ``params`` and is moved by every step.
        direction: :math:`D`.
        learning_rate: a number, or a function of the 0-based step.
        store: what becomes of the momentum after a step.
        mu: the momentum.
    """

    params: InitVar[npt.ArrayLike]
    direction: Callable[[Floats], Floats]
    learning_rate: LearningRate = 1e-3
    beta: float = 0.95
    weight_decay: float = 0.0
    store: Callable[[Floats], Floats] = as_it_is

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.mu: Floats = np.zeros_like(self.theta)
        self.count = 0

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        gradient, before = np.asarray(grads, np.float64), self.theta
        self.count += 1
        rate = rate_at(self.learning_rate, self.count)
        self.mu = self.beta * self.mu + (1 - self.beta) * gradient
        ahead = self.beta * self.mu / (1 - self.beta ** (self.count + 1))
        ahead = ahead + (1 - self.beta) * gradient / (1 - self.beta**self.count)
        self.theta = before - rate * (0.2 * self.direction(ahead) + self.weight_decay * before)
        self.mu = self.store(self.mu)
        return self.theta - before
