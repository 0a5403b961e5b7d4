"""CAME in float64 NumPy, one parameter at a time, from the formulas alone."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats, LearningRate, rate_at


@dataclass
class CameOracle:
    r"""CAME as released: factored over the last two axes, earlier axes a batch of matrices.

    .. math::

        a &= g^2 + \epsilon_1, \quad
            r \leftarrow \beta_2 r + (1 - \beta_2) \langle a \rangle_{-1}, \quad
            c \leftarrow \beta_2 c + (1 - \beta_2) \langle a \rangle_{-2} \\
        u &= g / \sqrt{r c / \langle r \rangle}, \quad u \leftarrow u / \max(1, RMS(u) / d) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u, \quad d = (u - m)^2 + \epsilon_2 \\
        R &\leftarrow \beta_3 R + (1 - \beta_3) \langle d \rangle_{-1}, \quad
            C \leftarrow \beta_3 C + (1 - \beta_3) \langle d \rangle_{-2} \\
        \theta &\leftarrow (1 - \eta \lambda) \theta - \eta\, m / \sqrt{R C / \langle R \rangle}

    Vectors and scalars keep :math:`v` for each element, and :math:`m` is what they are moved by.

    Attributes:
        theta: the parameter, which starts as ``params`` and is moved by every step.
        learning_rate: a number, or a function of the 0-based step.
        mu: the momentum.
        nu_row: :math:`r`, of matrices.
        nu_col: :math:`c`, of matrices.
        instability_row: :math:`R`, of matrices.
        instability_col: :math:`C`, of matrices.
        nu: :math:`v`, of vectors and scalars.
    """

    params: InitVar[npt.ArrayLike]
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999
    eps: float = 1e-30
    instability_eps: float = 1e-16
    clip_threshold: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.mu: Floats = np.zeros_like(self.theta)
        self.nu: Floats = np.zeros_like(self.theta)
        self.factored = self.theta.ndim >= 2
        if self.factored:
            *batch, rows, columns = self.theta.shape
            self.nu_row, self.instability_row = np.zeros((2, *batch, rows))
            self.nu_col, self.instability_col = np.zeros((2, *batch, columns))
        self.count = 0

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        gradient, before = np.asarray(grads, np.float64), self.theta
        rate = rate_at(self.learning_rate, self.count + 1)
        self.count += 1
        a = gradient**2 + self.eps
        if self.factored:
            self.nu_row = self.b2 * self.nu_row + (1 - self.b2) * a.mean(-1)
            self.nu_col = self.b2 * self.nu_col + (1 - self.b2) * a.mean(-2)
            u = gradient / np.sqrt(_product(self.nu_row, self.nu_col))
        else:
            self.nu = self.b2 * self.nu + (1 - self.b2) * a
            u = gradient / np.sqrt(self.nu)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / self.clip_threshold)
        self.mu = self.b1 * self.mu + (1 - self.b1) * u
        out = self.mu
        if self.factored:
            d = (u - self.mu) ** 2 + self.instability_eps
            self.instability_row = self.b3 * self.instability_row + (1 - self.b3) * d.mean(-1)
            self.instability_col = self.b3 * self.instability_col + (1 - self.b3) * d.mean(-2)
            out = self.mu / np.sqrt(_product(self.instability_row, self.instability_col))
        self.theta = self.theta - rate * self.weight_decay * self.theta
        self.theta = self.theta - rate * out
        return self.theta - before


def _product(row: Floats, column: Floats) -> Floats:
    """The matrices whose factors these are."""
    return row[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]
