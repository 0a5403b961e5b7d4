"""What a subspace is to the transformations: a way to find a basis, and what is kept of it."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.arguments import require_positive
from microadam_jax.layout.view import Layout, MatrixView
from microadam_jax.subspace.basis import Basis, DenseBasis

Arrays = tuple[jax.Array, ...]
Slots = tuple[tuple[Layout, DTypeLike], ...]  # of the arrays that are kept for a matrix


class Vectors(NamedTuple):
    """A basis as it is.

    Attributes:
        vectors: float32, the parameter's shape with the rank in place of the kept side.
    """

    vectors: Any


class Indices(NamedTuple):
    """A basis as a selection.

    Attributes:
        indices: int32, one for each basis vector, in place of the compressed side.
    """

    indices: Any


class WeightedIndices(NamedTuple):
    """A basis as a weighted selection.

    Attributes:
        indices: int32, one for each basis vector, in place of the compressed side.
        weights: float32, of the same shape.
    """

    indices: Any
    weights: Any


class Seeded(NamedTuple):
    """A basis that is drawn anew from its seed in every step, so that nothing is kept."""


class Subspace(Protocol):
    """Finds a subspace of each matrix.

    Attributes:
        Kept: the NamedTuple of what is kept of a basis.
        gathers: whether a new basis needs the whole gradient on one device.
        seeks: whether a basis is found from the gradient. One of zeros then finds none: the old
            basis stays, and without one the first gradient that is not zero finds it.
        orthonormal: whether the vectors of a basis are, so that :math:`P P^T` is a projection. Of
            others it only has the mean of the identity.
    """

    Kept: ClassVar[type]
    gathers: ClassVar[bool]
    seeks: ClassVar[bool]
    orthonormal: ClassVar[bool]

    @property
    def rank(self) -> int:
        """Returns the largest number of dimensions."""
        ...

    def size(self, view: MatrixView) -> int:
        """Returns the number of dimensions in the matrices of ``view``."""
        ...

    def layouts(self, size: int) -> Slots:
        """Returns the layout and dtype of each array of ``Kept``."""
        ...

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """Computes a new basis.

        Args:
            matrix: float32, the folded matrices to approximate.
            kept: what is kept of the old basis, folded; zeros at first.
            first: for each matrix, of shape ``(*batch,)``, whether there is no old basis.
            key: a random key, another one for each basis.

        Returns:
            What to keep of it, folded.
        """
        ...

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> Basis:
        """Returns the basis of what is kept of it.

        Args:
            kept: what :meth:`find` returned.
            shape: ``(*batch, rows, rank)``.
            key: that of :meth:`find`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class OfRank:
    """A subspace of so many dimensions, found from the gradient unless a class says otherwise."""

    rank: int
    gathers: ClassVar[bool] = False
    seeks: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the rank."""
        require_rank(self.rank)

    def size(self, view: MatrixView) -> int:
        """No more than the matrix has rows."""
        return min(self.rank, view.rows)


@dataclasses.dataclass(frozen=True)
class KeepsVectors(OfRank):
    """A subspace whose basis is kept as it is."""

    Kept: ClassVar[type] = Vectors
    gathers: ClassVar[bool] = True

    def size(self, view: MatrixView) -> int:
        """No more than the matrix has."""
        return min(self.rank, view.rows, view.columns)

    def layouts(self, size: int) -> Slots:
        """One array of vectors."""
        return ((Layout(rows=None, columns=size), jnp.float32),)

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> DenseBasis:
        """The vectors."""
        del shape, key
        return DenseBasis(kept[0])


def unfound(kept: Arrays) -> jax.Array:
    """Marks the matrices without a basis yet, as :func:`none_found` left them: ``(*batch,)``."""
    marks = [jnp.all(x == _mark(x), axis=(-2, -1)) for x in kept]
    return functools.reduce(jnp.logical_and, marks)


def none_found(kept: Arrays) -> Arrays:
    """Returns what is kept where no basis was found: vectors or weights of zeros, and no index."""
    return tuple(jnp.full_like(x, _mark(x)) for x in kept)


def _mark(x: jax.Array) -> int:
    return -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0


def require_rank(rank: Any) -> None:
    """Refuses a rank that is no positive integer.

    Raises:
        ValueError: if it is none.
    """
    require_positive("The rank of a subspace", rank, "rank", "update_interval")


def require_subspace(subspace: Any) -> None:
    """Refuses what is no subspace.

    Raises:
        TypeError: if it is a name, a rank or a function that makes one.
    """
    if not isinstance(getattr(subspace, "rank", None), int):
        raise TypeError(
            f"subspace must be a subspace with its rank, such as svd(128); got {subspace!r}."
        )


def of_rank(rank: int, subspace: Subspace | None, published: Any) -> Subspace:
    """Returns ``subspace``, or ``published`` with another rank where it is None.

    Args:
        rank: a positive integer.
        subspace: has a rank of its own.
        published: a dataclass, whose rank is the default of ``rank``.

    Raises:
        TypeError: if ``subspace`` is not a subspace.
        ValueError: if ``rank`` is not a positive integer, or differs from that of ``subspace``.
    """
    require_rank(rank)
    if subspace is None:
        return dataclasses.replace(published, rank=rank)
    require_subspace(subspace)
    own = subspace.rank
    if rank not in (own, published.rank):
        raise ValueError(
            f"rank={rank} contradicts subspace={subspace!r}, which has a rank of its own. Give "
            "one of them."
        )
    return subspace
