"""Subspace methods in float64 NumPy, one matrix at a time, from the formulas alone.

Everything is written for a projection from the left, ``P.T @ g`` with ``P`` of shape ``(n, r)``; a
matrix whose second axis is compressed is transposed on the way in and out. The bases come from
outside, because the signs of singular vectors are arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.oracles.microadam import Floats, LearningRate, rate_at

Basis = Callable[[Floats], Floats]  # from what is to be approximated to the basis of its subspace


def leading_singular_vectors(matrix: Floats, rank: int) -> Floats:
    """The top left singular vectors as columns."""
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def dct_basis(size: int) -> Floats:
    r"""The orthogonal DCT-III: :math:`Q_{ij} = \sqrt{2/n} \cos(i (2j + 1) \pi / (2n))`.

    Its row 0 is divided by :math:`\sqrt 2`.
    """
    i, j = np.indices((size, size))
    basis = np.sqrt(2 / size) * np.cos(i * (2 * j + 1) * np.pi / (2 * size))
    basis[0] /= np.sqrt(2)
    return basis


def refresh_steps(every: int, steps: int, first: Literal[0, 1]) -> list[int]:
    """The 0-based steps with a new basis: ``t0 % T == 0``, or ``t == 1 or t % T == 0``."""
    if first == 0:
        return [step for step in range(steps) if step % every == 0]
    return [step for step in range(steps) if step == 0 or (step + 1) % every == 0]


@dataclass
class _MatrixOracle:
    """What all of them share: the orientation, the refresh schedule and the moments.

    Attributes:
        theta: the parameter, which starts as ``params`` and is moved by every step.
        compressed: the axis of ``params`` that is compressed, 0 or 1.
        rank: the number of columns of a basis.
        refreshes: says of a 0-based step whether it has a new basis.
        learning_rate: a number, or a function of the 0-based step.
    """

    params: InitVar[npt.ArrayLike]
    compressed: int
    rank: int
    refreshes: Callable[[int], bool]
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        rows, columns = self.left(self.theta).shape
        self.basis: Floats = np.zeros((rows, self.rank))
        self.mu: Floats = np.zeros((self.rank, columns))
        self.nu: Floats = np.zeros((self.rank, columns))
        self.count = self.start = 0

    def left(self, matrix: npt.ArrayLike) -> Floats:
        """The matrix with its compressed axis first."""
        matrix = np.asarray(matrix, np.float64)
        return matrix if self.compressed == 0 else matrix.T

    @property
    def rate(self) -> float:
        return rate_at(self.learning_rate, self.count)

    @property
    def corrected_rate(self) -> float:
        r"""The rate with :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`."""
        return self.rate * np.sqrt(1 - self.b2**self.count) / (1 - self.b1**self.count)

    def adam(self, low: Floats) -> None:
        self.mu = self.b1 * self.mu + (1 - self.b1) * low
        self.nu = self.b2 * self.nu + (1 - self.b2) * low**2

    def move(self, step: Floats, decay: Literal["before", "after"]) -> Floats:
        """Takes ``step`` in the orientation of the basis; returns what was added."""
        before, share = self.theta, self.rate * self.weight_decay
        if decay == "before":
            self.theta = (1 - share) * self.theta + self.left(step)
        else:
            self.theta = (1 - share) * (self.theta + self.left(step))
        return self.theta - before


@dataclass
class ProjectedAdamOracle(_MatrixOracle):
    r"""GaLore, Fira, APOLLO and Grass: Adam of the projected gradient.

    .. math::

        R &= P^T G, \quad N = m / (\sqrt v + \epsilon) \\
        \theta &\leftarrow \theta - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            (\alpha P N + S)

    With the norms over the rank axis :math:`\phi = \lVert N \rVert / (\lVert R \rVert + 10^{-8})`,
    S is zero for GaLore, and :math:`\phi (G - \alpha P R)` for Fira, limited to 1.01 times its last
    limited norm. The other complements are raw ``weight * (G - P R)`` and its sign. APOLLO
    moves by :math:`\sqrt{\text{scale}}` times the limited :math:`\phi G` alone. Grass has the eps
    beside the corrected root.

    Attributes:
        alpha: the scale of the low-rank update.
        reset: whether moments start at zero with a new basis.
        complement: what is done with the rest of the gradient.
        weight: of ``raw`` and ``sign``; APOLLO's scale.
        corrected_eps: whether eps stands beside the corrected root, and the correction starts anew
            with the moments.
    """

    alpha: float = 1.0
    reset: bool = False
    complement: Literal["nothing", "raw", "sign", "fira", "channel", "tensor"] = "nothing"
    weight: float = 1.0
    corrected_eps: bool = False

    def step(self, grads: npt.ArrayLike, basis_of: Basis) -> Floats:
        """Takes one step; returns what it added to ``theta``."""
        g = self.left(grads)
        if self.refreshes(self.count):
            self.basis = basis_of(g)
            if self.reset:
                self.mu, self.nu = np.zeros_like(self.mu), np.zeros_like(self.nu)
                self.start = self.count
        self.count += 1
        low = self.basis.T @ g
        self.adam(low)
        if self.corrected_eps:
            age = self.count - self.start
            m, v = self.mu / (1 - self.b1**age), self.nu / (1 - self.b2**age)
            scaled, rate = m / (np.sqrt(v) + self.eps), self.rate
        else:
            scaled, rate = self.mu / (np.sqrt(self.nu) + self.eps), self.corrected_rate
        out = self.alpha * self.basis @ scaled
        if self.complement == "raw":
            out = out + self.weight * (g - self.basis @ low)
        elif self.complement == "sign":
            out = out + self.weight * np.sign(g - self.basis @ low)
        elif self.complement == "fira":
            phi = self.phi(scaled, low, axis=0)
            out = out + self.limited(phi * (g - self.alpha * self.basis @ low))
        elif self.complement in ("channel", "tensor"):
            phi = self.phi(scaled, low, axis=0 if self.complement == "channel" else None)
            out = np.sqrt(self.weight) * self.limited(phi * g)
        return self.move(-rate * out, "after")

    @staticmethod
    def phi(scaled: Floats, low: Floats, axis: int | None) -> Floats:
        norm = lambda x: np.sqrt((x**2).sum(axis=axis, keepdims=True))  # noqa: E731
        return norm(scaled) / (norm(low) + 1e-8)

    def limited(self, residual: Floats) -> Floats:
        norm = np.linalg.norm(residual)
        previous = getattr(self, "previous_norm", None)
        if previous is not None and norm > 1.01 * previous:
            residual = residual * (1.01 * previous / norm)
        self.previous_norm = np.linalg.norm(residual)
        return residual


@dataclass
class LDAdamOracle(_MatrixOracle):
    r"""LDAdam: a new basis in every step, moments that follow it, and error feedback.

    With k completed steps, :math:`c_i = 1 - \beta_i^k`,

    .. math::

        a &= g + E, \quad b = \rho P_{old} m / c_1 + (1 - \rho) a, \quad
            P = \mathrm{QR}(b (b^T P_{old})) \\
        g_l &= P^T a, \quad Q = P^T P_{old}, \quad \tilde m = Q m \\
        E &\leftarrow a - P g_l + \frac{\beta_1}{1 - \beta_1} (P_{old} m - P \tilde m) \\
        v &\leftarrow c_2 | (Q \circ Q)(v / c_2 - (m / c_1)^2) + (\tilde m / c_1)^2 | \\
        m &\leftarrow \beta_1 \tilde m + (1 - \beta_1) g_l, \quad
            v \leftarrow \beta_2 v + (1 - \beta_2) g_l^2

    and the step is Adam's with weight decay before it.

    Attributes:
        rho: the share of the momentum in the target.
        feedback: whether there is an error buffer.
        target: what the last basis was to approximate.
        residual: the error buffer.
    """

    b1: float = 0.908
    b2: float = 0.99
    rho: float = 0.908
    feedback: bool = True

    def __post_init__(self, params: npt.ArrayLike) -> None:
        super().__post_init__(params)
        self.residual: Floats = np.zeros_like(self.left(self.theta))
        self.target: Floats = self.residual

    def step(self, grads: npt.ArrayLike, basis_of: Basis | None = None) -> Floats:
        """Takes one step; without ``basis_of``, by the power iteration."""
        k, old = self.count, self.basis
        a = self.left(grads) + self.residual
        c1, c2 = 1 - self.b1**k, 1 - self.b2**k
        if k == 0:
            self.target = a
        else:
            self.target = self.rho * old @ self.mu / c1 + (1 - self.rho) * a
        if basis_of is not None:
            self.basis = basis_of(self.target)
        elif k == 0:
            self.basis = leading_singular_vectors(a, self.rank)
        else:
            self.basis = np.linalg.qr(self.target @ (self.target.T @ old))[0]
        low, q = self.basis.T @ a, self.basis.T @ old
        moved = q @ self.mu
        if self.feedback:
            beta = self.b1 / (1 - self.b1)
            self.residual = a - self.basis @ low + beta * (old @ self.mu - self.basis @ moved)
        if k > 0:
            variance = self.nu / c2 - (self.mu / c1) ** 2
            self.nu = c2 * np.abs(q**2 @ variance + (moved / c1) ** 2)
            self.mu = moved
        self.count += 1
        self.adam(low)
        m, v = self.mu / (1 - self.b1**self.count), self.nu / (1 - self.b2**self.count)
        direction = self.basis @ (m / (np.sqrt(v) + self.eps))
        return self.move(-self.rate * direction, "before")


@dataclass
class DctAdamOracle(_MatrixOracle):
    r"""DCT-AdamW: Adam on the r columns of a fixed orthogonal basis with the largest l1 norm.

    Error feedback keeps :math:`a - P P^T a`. If moments rotate, then by
    :math:`R = P^T P_{old}`: :math:`m \leftarrow R m`, :math:`v \leftarrow |R v|`.
    """

    rotate: bool = False
    feedback: bool = False

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step; returns what it added to ``theta``."""
        residual = getattr(self, "residual", 0.0)
        a, old = self.left(grads) + residual, self.basis
        if self.refreshes(self.count):
            q = dct_basis(len(a))
            norms = np.abs(q.T @ a).sum(axis=1)
            self.basis = q[:, np.sort(np.argsort(-norms, kind="stable")[: self.rank])]
            if self.rotate and self.count:
                r = self.basis.T @ old
                self.mu, self.nu = r @ self.mu, np.abs(r @ self.nu)
        self.count += 1
        low = self.basis.T @ a
        if self.feedback:
            self.residual = a - self.basis @ low
        self.adam(low)
        m, v = self.mu / (1 - self.b1**self.count), self.nu / (1 - self.b2**self.count)
        return self.move(-self.rate * self.basis @ (m / (np.sqrt(v) + self.eps)), "before")


@dataclass
class SnsmOracle(_MatrixOracle):
    r"""SNSM: momentum in a subspace, the raw gradient outside, subset norms of all of it.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) P^T g, \quad N = g + P (m - P^T g) \\
        V_c &\leftarrow \beta_2 V_c + (1 - \beta_2) \sum_{i \in c} g_i^2 \\
        \theta &\leftarrow \theta - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{N}{\sqrt{V_c} + \epsilon}, \quad \theta \leftarrow (1 - \eta \lambda) \theta

    Attributes:
        subsets: the subset of each element of ``params``.
        moments: what a new basis does to the momentum. ``"released"`` is the published code's:
            the old numbers are used in the new basis once more, and what is kept is zero.
    """

    eps: float = 1e-6
    subsets: npt.NDArray[np.intp] | None = None
    moments: Literal["keep", "reset", "rotate", "released"] = "reset"

    def __post_init__(self, params: npt.ArrayLike) -> None:
        super().__post_init__(params)
        if self.subsets is None:
            self.subsets = np.arange(self.theta.size).reshape(self.theta.shape)
        self.norms: Floats = np.zeros(self.subsets.max() + 1)

    def step(self, grads: npt.ArrayLike, basis_of: Basis) -> Floats:
        """Takes one step; returns what it added to ``theta``."""
        g, old = self.left(grads), self.basis
        refreshed = self.refreshes(self.count)
        if refreshed:
            self.basis = basis_of(g)
        renewed = refreshed and self.count > 0
        if renewed and self.moments == "reset":
            self.mu = np.zeros_like(self.mu)
        elif renewed and self.moments == "rotate":
            self.mu = self.basis.T @ old @ self.mu
        self.count += 1
        low = self.basis.T @ g
        self.mu = self.b1 * self.mu + (1 - self.b1) * low
        numerator = g + self.basis @ (self.mu - low)
        if renewed and self.moments == "released":
            self.mu = np.zeros_like(self.mu)
        assert self.subsets is not None
        squares = np.bincount(self.subsets.ravel(), np.asarray(grads, np.float64).ravel() ** 2)
        self.norms = self.b2 * self.norms + (1 - self.b2) * squares
        roots = self.left(np.sqrt(self.norms)[self.subsets])
        return self.move(-self.corrected_rate * numerator / (roots + self.eps), "after")
