"""EFCP in float64 NumPy, from the formulas: dense inverses of the window's whole Fisher matrix.

A model is one flat vector here and its window a list of such vectors, the newest first. Matrices of
d x d are formed and inverted or diagonalized outright: none of the library's Gram matrices,
push-through identities, factors or ring buffers is repeated, so that none of its mistakes can be.

Papers: EFCP (arXiv 2306.06098), M-FAC (arXiv 2107.03356), GGT (arXiv 1806.02958), PowerSGD
(arXiv 1905.13727).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def fisher(rows: list[Floats], terms: int, damping: float) -> Floats:
    r"""The empirical Fisher matrix :math:`\lambda I + \frac1m \sum_i g_i g_i^\top`.

    ``terms`` is m, the window's length, also while fewer rows than that are filled.
    """
    rows_matrix = np.stack(rows)
    return damping * np.eye(rows_matrix.shape[1]) + rows_matrix.T @ rows_matrix / terms


def mfac_direction(rows: list[Floats], terms: int, damping: float, x: Floats) -> Floats:
    """The Fisher matrix's inverse times ``x``."""
    return np.linalg.solve(fisher(rows, terms, damping), x)


def ggt_direction(rows: list[Floats], eps: float, x: Floats) -> Floats:
    r""":math:`[(\sum_i g_i g_i^\top)^{1/2} + \epsilon I]^{-1} x`, by the d x d eigenvectors."""
    rows_matrix = np.stack(rows)
    squares, vectors = np.linalg.eigh(rows_matrix.T @ rows_matrix)
    return vectors @ ((vectors.T @ x) / (np.sqrt(squares.clip(0)) + eps))


@dataclass
class MfacOracle:
    """M-FAC of the latest ``length`` vectors, applied to the newest of them.

    Attributes:
        normalized: whether the Fisher matrix is divided by the number of filled rows instead.
    """

    length: int
    damping: float
    normalized: bool = False
    rows: list[Floats] = field(default_factory=list)

    def step(self, sent: npt.ArrayLike) -> Floats:
        newest = np.array(sent, np.float64)
        self.rows = [newest, *self.rows][: self.length]
        terms = len(self.rows) if self.normalized else self.length
        return mfac_direction(self.rows, terms, self.damping, newest)


@dataclass
class GgtOracle:
    """GGT of the latest ``length`` vectors, applied to the newest of them."""

    length: int
    eps: float
    rows: list[Floats] = field(default_factory=list)

    def step(self, sent: npt.ArrayLike) -> Floats:
        newest = np.array(sent, np.float64)
        self.rows = [newest, *self.rows][: self.length]
        return ggt_direction(self.rows, self.eps, newest)


def gram_schmidt(matrix: Floats) -> Floats:
    """The columns orthonormalized from left to right; one that is left without length is zero."""
    columns: list[Floats] = []
    for column in matrix.T:
        rest = column - sum((earlier @ column) * earlier for earlier in columns)
        length = np.linalg.norm(rest)
        columns.append(rest / length if length > 0 else np.zeros_like(rest))
    return np.stack(columns, axis=1)


@dataclass
class PowerSgdOracle:
    """PowerSGD of one matrix with error feedback and a warm start.

    Attributes:
        right: ``(columns, rank)``, the right factor to begin with.
        error: ``(rows, columns)``, what was not sent yet.
    """

    right: Floats
    error: Floats

    def step(self, gradient: npt.ArrayLike) -> Floats:
        owed = self.error + np.array(gradient, np.float64)
        left = gram_schmidt(owed @ self.right)
        right = owed.T @ left
        sent = left @ right.T
        self.error = owed - sent
        self.right = np.where(np.any(right, axis=0), right, self.right)
        return sent


@dataclass
class TopKOracle:
    """Top-K of each run of ``block`` elements of a row, with error feedback."""

    block: int
    count: int
    error: Floats

    def step(self, gradient: npt.ArrayLike) -> Floats:
        owed = self.error + np.array(gradient, np.float64)
        sent = np.zeros_like(owed)
        for row, kept in zip(
            owed.reshape(-1, self.block), sent.reshape(-1, self.block), strict=True
        ):
            largest = np.argsort(-np.abs(row), kind="stable")[: self.count]
            kept[largest] = row[largest]
        self.error = owed - sent
        return sent
