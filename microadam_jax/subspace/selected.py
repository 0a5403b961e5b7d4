"""Subspaces that are selections: of rows, or of columns of a fixed orthogonal matrix."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.layout.view import Layout
from microadam_jax.sharding import replicated
from microadam_jax.subspace.basis import ColumnBasis, RowBasis, inner_products, row_norms
from microadam_jax.subspace.subspace import Arrays, Indices, OfRank, Slots, WeightedIndices


@dataclasses.dataclass(frozen=True)
class _Selection(OfRank):
    """A subspace that keeps an index for each dimension."""

    Kept: ClassVar[type] = Indices

    def layouts(self, size: int) -> Slots:
        """One array of indices."""
        return ((Layout(rows=size, columns=1), jnp.int32),)

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> RowBasis | ColumnBasis:
        """The selected rows."""
        del key
        return RowBasis(kept[0][..., 0], None, shape[-2])


@dataclasses.dataclass(frozen=True)
class TopRows(_Selection):
    """See :func:`top_k_rows`."""

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The longest rows."""
        del first, key
        return _largest(row_norms(matrix), kept)


@dataclasses.dataclass(frozen=True)
class UniformRows(_Selection):
    """See :func:`uniform_rows`."""

    seed: int
    seeks: ClassVar[bool] = False

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """Any rows."""
        del first
        key = jax.random.fold_in(key, self.seed)
        return _largest(jax.random.uniform(key, matrix.shape[:-1]), kept)


@dataclasses.dataclass(frozen=True)
class DistinctRows(_Selection):
    """See :func:`sampled_rows`, without replacement."""

    seed: int

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The largest of log probabilities with Gumbel noise are such a sample."""
        del first
        logits = _logits(row_norms(matrix))
        noise = jax.random.gumbel(jax.random.fold_in(key, self.seed), logits.shape, jnp.float32)
        return _largest(logits + noise, kept)


@dataclasses.dataclass(frozen=True)
class ReplacedRows(_Selection):
    """See :func:`sampled_rows`, with replacement."""

    seed: int
    Kept: ClassVar[type] = WeightedIndices
    orthonormal: ClassVar[bool] = False

    def layouts(self, size: int) -> Slots:
        """Indices and weights."""
        layout = Layout(rows=size, columns=1)
        return (layout, jnp.int32), (layout, jnp.float32)

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """Independent draws, and what makes their mean the identity."""
        del first
        logits = _logits(row_norms(matrix))
        *batch, size, _ = kept[0].shape
        key = jax.random.fold_in(key, self.seed)
        drawn = jax.random.categorical(key, logits, axis=-1, shape=(size, *batch))
        indices = jnp.moveaxis(drawn, 0, -1).astype(jnp.int32)
        chances = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), indices, axis=-1)
        return indices[..., None], jax.lax.rsqrt(size * chances)[..., None]

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> RowBasis:
        """The drawn rows, weighted."""
        del key
        indices, weights = kept
        return RowBasis(indices[..., 0], weights[..., 0], shape[-2])


@dataclasses.dataclass(frozen=True)
class CosineColumns(_Selection):
    """See :func:`dct_columns`."""

    def find(self, matrix: jax.Array, kept: Arrays, first: jax.Array, key: jax.Array) -> Arrays:
        """The columns whose products with the gradient are the largest."""
        del first, key
        rows = matrix.shape[-2]
        everything = _cosines(rows, jnp.arange(rows))
        batched = jnp.broadcast_to(everything, (*matrix.shape[:-2], rows, rows))
        products = inner_products(batched, matrix)
        return _largest(replicated(jnp.sum(jnp.abs(products), axis=-1)), kept)

    def basis(self, kept: Arrays, shape: tuple[int, ...], key: jax.Array) -> ColumnBasis:
        """The selected columns."""
        del key
        indices = kept[0][..., 0]
        return ColumnBasis(_cosines(shape[-2], indices), indices)


def top_k_rows(rank: int) -> TopRows:
    """Selects the rows of the gradient with the largest Euclidean norm: biased, but exact.

    Args:
        rank: how many; no more than there are.

    Returns:
        The spec. Of a gradient that is sharded along its columns, only the norms are summed over
        devices; choose the compressed side so that it is the one that is not sharded.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: Muhamed et al., Grass (arXiv 2406.17660), Top-r.
    """
    return TopRows(rank)


def sampled_rows(
    rank: int, *, replacement: bool = True, seed: int = 0
) -> ReplacedRows | DistinctRows:
    r"""Draws rows of the gradient with chances in proportion to their norms.

    With the chances :math:`q_i` and replacement, row :math:`\sigma_j` has the weight
    :math:`\rho_j = 1 / \sqrt{r q_{\sigma_j}}`, so that :math:`E[P P^T] = I`; a row that is drawn
    twice counts twice. It is no projection, so that the rest of a gradient cannot be used and
    moments cannot be rotated. Without replacement all weights are 1, and both are possible.

    Args:
        rank: :math:`r`; no more than there are rows.
        replacement: whether a row can be drawn again.
        seed: of the draws, which also depend on the parameter's path and on the step.

    Returns:
        The spec.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: Muhamed et al., Grass (arXiv 2406.17660), Multinomial-Norm.
    """
    return ReplacedRows(rank, seed) if replacement else DistinctRows(rank, seed)


def uniform_rows(rank: int, *, seed: int = 0) -> UniformRows:
    """Draws distinct rows, all with the same chance.

    Args:
        rank: how many; no more than there are.
        seed: of the draws, which also depend on the parameter's path and on the step.

    Returns:
        The spec. The gradient is not looked at.

    Raises:
        ValueError: if ``rank`` is not a positive integer.
    """
    return UniformRows(rank, seed)


def dct_columns(rank: int) -> CosineColumns:
    r"""Selects the columns of a cosine transform whose products with the gradient are largest.

    The basis is :math:`Q_{ij} = \sqrt{2/n} \cos(i (2j + 1) \pi / 2n)`, its row 0 divided by
    :math:`\sqrt 2`; the columns :math:`j` with the largest :math:`\lVert Q_j^T G \rVert_1` are
    taken, in the order of their index.

    Args:
        rank: how many; no more than the matrix has rows.

    Returns:
        The spec. The basis is computed from the indices in every step.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Reference: FFT-based dynamic subspace selection (arXiv 2505.17967).
    """
    return CosineColumns(rank)


def _largest(scores: jax.Array, kept: Arrays) -> Arrays:
    """The indices of the largest scores, in order."""
    chosen = jax.lax.top_k(scores, kept[0].shape[-2])[1]
    return (jnp.sort(chosen, axis=-1).astype(jnp.int32)[..., None],)


def _logits(norms: jax.Array) -> jax.Array:
    """Log chances, the same for all rows if all are zero."""
    nothing = jnp.all(norms == 0, axis=-1, keepdims=True)
    return jnp.log(jnp.where(nothing, 1.0, norms))


def _cosines(rows: int, columns: jax.Array) -> jax.Array:
    """The columns of the transform, of shape ``(*batch, rows, columns)``."""
    # The angle repeats, and whole numbers are reduced without loss. A product of both may exceed
    # 32 bits from 46341 rows on, so that one of them is multiplied in two parts.
    odd = (2 * columns + 1).astype(jnp.uint32)[..., None, :]
    steps = jnp.arange(rows, dtype=jnp.uint32).reshape(*(1,) * (odd.ndim - 2), rows, 1)
    period, part = np.uint32(4 * rows), np.uint32(256)
    high = steps // part * odd % period * part
    turns = ((high + steps % part * odd) % period).astype(jnp.float32)
    cosines = jnp.cos(turns * jnp.float32(math.pi / (2 * rows))) * math.sqrt(2 / rows)
    return jnp.where(steps == 0, 1 / math.sqrt(rows), cosines)
