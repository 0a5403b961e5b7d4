"""Adam and AdaGrad with subset norms in float64 NumPy, from the formulas alone.

Subsets are an integer for each element. The published rules for them are functions from a shape
to such integers; they speak of torch's matrices ``(out, in)``.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats, Indices, LearningRate, rate_at


def larger_side(rows: int, columns: int) -> Indices:
    """The rule "heuristics" for a matrix: a subset for each row, or for each of more columns."""
    row, column = np.indices((rows, columns))
    return row if rows >= columns else column


def run_size(elements: int, size: int) -> int:
    r"""The largest divisor of ``elements`` up to ``size``, or up to :math:`\sqrt d / |size|`.

    The released code divides by zero where that is less than one; here it is one.
    """
    limit = size if size > 0 else int(math.sqrt(elements) / -size)
    candidates = range(1, max(1, min(limit, elements)) + 1)
    return max(divisor for divisor in candidates if elements % divisor == 0)


def runs(shape: tuple[int, ...], size: int) -> Indices:
    """The rules of an integer: consecutive elements in row-major order."""
    elements = math.prod(shape)
    return (np.arange(elements) // run_size(elements, size)).reshape(shape)


@dataclass
class SubsetNormOracle:
    r"""The released optimizer without a subspace: weight decay comes after the update.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        V_c &\leftarrow \beta_2 V_c + (1 - \beta_2) \sum_{i \in c} g_i^2
            \quad \text{or} \quad V_c + \sum_{i \in c} g_i^2 \\
        \theta_i &\leftarrow \theta_i - \eta_t \frac{m_i}{\sqrt{V_{c(i)}} + \epsilon}, \quad
            \eta_t = \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \text{ or } \eta \\
        \theta &\leftarrow \theta - \eta \lambda \theta

    Attributes:
        theta: the parameter, which starts as ``params`` and is moved by every step.
        subsets: the subset of each element, counted from 0.
        learning_rate: a number, or a function of the 0-based step.
        b2: None for AdaGrad, which corrects no bias.
        reduction: the published ``"sum"`` of squares, or their ``"mean"``.
        mu: the first moment of each element.
        nu: the squared norm of each subset.
    """

    params: InitVar[npt.ArrayLike]
    subsets: Indices
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float | None = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.mu: Floats = np.zeros_like(self.theta)
        self.nu: Floats = np.zeros(self.subsets.max(initial=-1) + 1)
        self.count = 0

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        gradient, before = np.asarray(grads, np.float64), self.theta
        rate = rate_at(self.learning_rate, self.count + 1)
        self.count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * gradient
        for subset in range(len(self.nu)):
            squares = gradient[self.subsets == subset] ** 2
            norm = squares.sum() if self.reduction == "sum" else squares.mean()
            if self.b2 is None:
                self.nu[subset] += norm
            else:
                self.nu[subset] = self.b2 * self.nu[subset] + (1 - self.b2) * norm
        corrected = rate
        if self.b2 is not None:
            corrected *= math.sqrt(1 - self.b2**self.count) / (1 - self.b1**self.count)
        self.theta = self.theta - corrected * self.mu / (np.sqrt(self.nu)[self.subsets] + self.eps)
        self.theta = self.theta - rate * self.weight_decay * self.theta
        return self.theta - before
