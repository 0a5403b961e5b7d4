"""Subspaces whose basis is dense: singular vectors, power iterations, random ones."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from microadam_jax.sharding import replicated
from microadam_jax.subspace.basis import PRECISION, DenseBasis
from microadam_jax.subspace.subspace import Arrays, KeepsVectors, OfRank, Seeded, Slots


@dataclasses.dataclass(frozen=True)
class SingularVectors(KeepsVectors):
    """See :func:`svd`."""

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The leading left singular vectors."""
        del first, key
        return (_leading(replicated(matrix), kept[0].shape[-1]),)


@dataclasses.dataclass(frozen=True)
class SketchedVectors(KeepsVectors):
    """See :func:`randomized_svd`."""

    oversample: int
    iterations: int
    seed: int

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The leading left singular vectors of what a random sketch catches."""
        del first
        matrix, size = replicated(matrix), kept[0].shape[-1]
        *batch, rows, columns = matrix.shape
        width = min(size + self.oversample, rows, columns)
        key = jax.random.fold_in(key, self.seed)
        caught = _orthonormal(
            _product(matrix, jax.random.normal(key, (*batch, columns, width), jnp.float32))
        )
        for _ in range(self.iterations):
            back = _orthonormal(_product(jnp.matrix_transpose(matrix), caught))
            caught = _orthonormal(_product(matrix, back))
        inside = _leading(_product(jnp.matrix_transpose(caught), matrix), size)
        return (_signed(_product(caught, inside)),)


@dataclasses.dataclass(frozen=True)
class PowerVectors(KeepsVectors):
    """See :func:`power_iteration`."""

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """One block power iteration from the old basis; singular vectors at first."""
        del key
        matrix, old, first = replicated(matrix), replicated(kept[0]), replicated(first)
        size = old.shape[-1]

        def iterate() -> jax.Array:
            # Squares of small gradients would underflow; their scale makes no difference.
            largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
            b = matrix / jnp.where(largest > 0, largest, 1)
            image = _product(b, _product(jnp.matrix_transpose(b), old))
            nothing = jnp.all(image == 0, axis=(-2, -1), keepdims=True)
            return jnp.where(nothing, old, _orthonormal(image))

        def begin() -> jax.Array:
            return jnp.where(first[..., None, None], _leading(matrix, size), iterate())

        return (jax.lax.cond(jnp.any(first), begin, iterate),)


@dataclasses.dataclass(frozen=True)
class OrthogonalGaussian(KeepsVectors):
    """See :func:`orthogonal_gaussian`."""

    seed: int
    gathers: ClassVar[bool] = False
    seeks: ClassVar[bool] = False

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The orthogonal factor of normal numbers."""
        del first
        shape = (*matrix.shape[:-1], kept[0].shape[-1])
        return (_orthonormal(jax.random.normal(jax.random.fold_in(key, self.seed), shape)),)


@dataclasses.dataclass(frozen=True)
class Hadamard(KeepsVectors):
    """See :func:`srht`."""

    seed: int
    gathers: ClassVar[bool] = False
    seeks: ClassVar[bool] = False

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """Columns of a Hadamard matrix with random signs for its rows."""
        del first
        *batch, rows, _ = matrix.shape
        size, padded = kept[0].shape[-1], 1 << (rows - 1).bit_length()
        for_signs, for_columns = jax.random.split(jax.random.fold_in(key, self.seed))
        signs = jax.random.rademacher(for_signs, (*batch, rows, 1), jnp.float32)
        numbers = jax.random.uniform(for_columns, (*batch, padded))
        columns = jax.lax.top_k(numbers, size)[1]
        both = jnp.arange(rows).reshape(*(1 for _ in batch), rows, 1) & columns[..., None, :]
        odd = jax.lax.population_count(both) % 2
        vectors = signs * jnp.where(odd, -1.0, 1.0) / math.sqrt(padded)
        # Where rows were cut off, what is left of the columns is not orthogonal.
        return (vectors if padded == rows else _orthonormal(vectors),)


@dataclasses.dataclass(frozen=True)
class Gaussian(OfRank):
    """See :func:`gaussian`."""

    seed: int
    Kept: ClassVar[type] = Seeded
    seeks: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def layouts(self, size: int) -> Slots:
        """Nothing is kept."""
        del size
        return ()

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """Nothing is kept."""
        del matrix, first, key
        return kept

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> DenseBasis:
        """Normal numbers of variance 1 / rank."""
        del kept
        numbers = jax.random.normal(jax.random.fold_in(key, self.seed), shape, jnp.float32)
        return DenseBasis(numbers / math.sqrt(shape[-1]))


def svd(rank: int) -> SingularVectors:
    r"""Finds the leading left singular vectors of the gradient, which are its best subspace.

    With :math:`G = U \Sigma V^T`, :math:`P = U_{:, :r}`. Of each vector the largest element is
    positive, so that its sign does not depend on the machine.

    Args:
        rank: :math:`r`; no more than the smaller side of a matrix is used.

    Returns:
        The spec. The whole gradient of a matrix is gathered and decomposed for every new basis,
        which takes far longer than any other of the library's subspaces.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: Zhao et al., GaLore (arXiv 2403.03507).
    """
    return SingularVectors(rank)


def randomized_svd(
    rank: int, *, oversample: int = 8, iterations: int = 1, seed: int = 0
) -> SketchedVectors:
    r"""Approximates singular vectors by products with a few random vectors.

    With normal numbers :math:`\Omega` of :math:`r + p` columns, :math:`Y = \mathrm{QR}(G \Omega)`,
    followed by ``iterations`` times :math:`Y = \mathrm{QR}(G\,\mathrm{QR}(G^T Y))`, the basis is
    :math:`P = Y U_{:, :r}` with :math:`Y^T G = U \Sigma V^T`.

    Args:
        rank: :math:`r`; no more than the smaller side of a matrix is used.
        oversample: :math:`p`.
        iterations: how often it is refined.
        seed: of the normal numbers.

    Returns:
        The spec.

    Raises:
        ValueError: if ``rank`` is not a positive integer, or a count is negative.

    Reference: Halko, Martinsson and Tropp (arXiv 0909.4061).
    """
    if oversample < 0 or iterations < 0:
        raise ValueError(
            "randomized_svd needs oversample and iterations from 0 on; got "
            f"{oversample} and {iterations}."
        )
    return SketchedVectors(rank, oversample, iterations, seed)


def power_iteration(rank: int) -> PowerVectors:
    r"""Takes a block power iteration from the last basis: :math:`P = \mathrm{QR}(b (b^T P_{old}))`.

    The first basis is :func:`svd`'s.

    Args:
        rank: how many dimensions; no more than the smaller side of a matrix is used.

    Returns:
        The spec. The whole gradient of a matrix is gathered for every new basis.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: Robert et al., LDAdam (arXiv 2410.16103).
    """
    return PowerVectors(rank)


def orthogonal_gaussian(rank: int, *, seed: int = 0) -> OrthogonalGaussian:
    """Draws a subspace that all directions are equally likely to be in.

    Args:
        rank: how many dimensions; no more than the smaller side of a matrix is used.
        seed: of the basis, which also depends on the parameter's path and on the step.

    Returns:
        The spec. The gradient is not looked at.

    Raises:
        ValueError: if ``rank`` is not a positive integer.
    """
    return OrthogonalGaussian(rank, seed)


def srht(rank: int, *, seed: int = 0) -> Hadamard:
    r"""Draws a subsampled randomized Hadamard transform: :math:`P = D H_{:, S}`.

    :math:`D` are random signs of the rows, :math:`H` the Hadamard matrix of the next power of
    two, divided by its root, and :math:`S` distinct random columns. Where the number of rows is
    no power of two, the columns are made orthogonal again.

    Args:
        rank: how many columns; no more than the smaller side of a matrix is used.
        seed: of the signs and the columns, which also depend on the path and on the step.

    Returns:
        The spec. The gradient is not looked at.

    Raises:
        ValueError: if ``rank`` is not a positive integer.
    """
    return Hadamard(rank, seed)


def gaussian(rank: int, *, seed: int = 0) -> Gaussian:
    r"""Draws normal numbers of variance :math:`1 / r`, of which :math:`E[P P^T] = I`.

    They are drawn anew in every step, from a key that changes with the refresh, so no basis is
    kept. The columns are not orthogonal: :math:`G - P P^T G` is not what the subspace misses.

    Args:
        rank: :math:`r`; no more than the compressed side of a matrix is used.
        seed: of the numbers, which also depend on the parameter's path and on the step.

    Returns:
        The spec. The gradient is not looked at.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: Zhu et al., APOLLO (arXiv 2412.05270).
    """
    return Gaussian(rank, seed)


def _leading(matrix: jax.Array, size: int) -> jax.Array:
    return _signed(jnp.linalg.svd(matrix, full_matrices=False)[0][..., :size])


def _signed(vectors: jax.Array) -> jax.Array:
    """The vectors, the largest element of each positive."""
    largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    return jnp.where(jnp.take_along_axis(vectors, largest, axis=-2) < 0, -vectors, vectors)


def _orthonormal(vectors: jax.Array) -> jax.Array:
    return jnp.linalg.qr(vectors)[0]


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=PRECISION)
