"""Adam-mini in float64 NumPy, one parameter at a time, from its Algorithm 1 alone.

Blocks are whatever the caller says they are: an integer for each element. So there is no axis
arithmetic here to repeat the library's mistakes.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats, Indices, LearningRate, rate_at


@dataclass
class AdamMiniOracle:
    r"""Adam-mini with decoupled weight decay, in the order of the paper.

    .. math::

        v_b &\leftarrow \beta_2 v_b + (1 - \beta_2) \operatorname{mean}_{i \in b} g_i^2 \\
        \theta &\leftarrow (1 - \eta \lambda) \theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        \theta_i &\leftarrow \theta_i - \eta
            \frac{m_i / (1 - \beta_1^t)}{\sqrt{v_{b(i)} / (1 - \beta_2^t)} + \epsilon}

    Attributes:
        theta: the parameter, which starts as ``params`` and is moved by every step.
        blocks: the block of each element, counted from 0.
        learning_rate: a number, or a function of the 0-based step.
        mu: the first moment of each element.
        nu: the second moment of each block.
    """

    params: InitVar[npt.ArrayLike]
    blocks: Indices
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.mu: Floats = np.zeros_like(self.theta)
        self.nu: Floats = np.zeros(self.blocks.max(initial=-1) + 1)
        self.count = 0

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        gradient, before = np.asarray(grads, np.float64), self.theta
        rate = rate_at(self.learning_rate, self.count + 1)
        for block in range(len(self.nu)):
            mean = np.mean(gradient[self.blocks == block] ** 2)
            self.nu[block] = self.b2 * self.nu[block] + (1 - self.b2) * mean
        self.count += 1
        self.theta = self.theta * (1 - rate * self.weight_decay)
        self.mu = self.b1 * self.mu + (1 - self.b1) * gradient
        mean = self.mu / (1 - self.b1**self.count)
        variance = self.nu / (1 - self.b2**self.count)
        self.theta = self.theta - rate * mean / (np.sqrt(variance)[self.blocks] + self.eps)
        return self.theta - before
