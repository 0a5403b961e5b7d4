"""PowerSGD: a low-rank approximation by one step of a warm-started power iteration."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.arguments import require_positive
from microadam_jax.compressors.low_rank import LowRank, absent_axes, axes_of, only_columns
from microadam_jax.layout.path_rules import path_pattern
from microadam_jax.layout.stacks import STACKED, layer_axis_of
from microadam_jax.sharding import contract
from microadam_jax.state_arrays import moment_zeros, place_moment
from microadam_jax.trees import KeyPath, leaf_key

# What is left of a column after the projection, relative to its length, is rounding error below.
ROUNDING = 1e-6


class RightFactor(NamedTuple):
    """``right``: ``(1, ..., 1, n, r)`` float32, where the next power iteration starts."""

    right: jax.Array


@dataclasses.dataclass(frozen=True)
class PowerSGD:
    r"""Approximates each matrix by one of rank :math:`r`.

    A tensor :math:`(\dots, n)` is a matrix :math:`A_t` with a row for each index of its leading
    axes and :math:`n` columns. One power iteration starts from the last step's right factor:

    .. math::

        P_t &= \mathrm{orthonormalize}(A_t Q_{t-1}) \\
        Q_t &= A_t^\top P_t \\
        C(A_t) &= P_t Q_t^\top

    The columns are orthonormalized from left to right (Gram and Schmidt). :math:`Q_0` is drawn
    from a normal distribution. A column of :math:`Q_t` that is zero, as after a zero gradient,
    is replaced by its predecessor before the next step: zero would remain zero for ever.

    Args:
        rank: :math:`r`. Vectors, and matrices of which the factors would be no smaller, are kept
            dense.
        stacked: a path pattern for what stacks layers along its first axis, as for
            :class:`Partition`; each layer is a matrix of its own. A leaf is seen without the
            others, so that the default goes by its own name and axes.
        seed: of :math:`Q_0`, which is drawn from the seed and the leaf's path.

    Raises:
        ValueError: if ``rank`` is not a positive integer, or ``stacked`` no regular expression.
    """

    rank: int = 4
    stacked: str = STACKED
    seed: int = 0

    def __post_init__(self) -> None:
        path_pattern(self.stacked)
        require_positive("PowerSGD.rank", self.rank)

    @property
    def Carried(self) -> type[RightFactor]:
        """Returns the NamedTuple of what is carried from one step to the next."""
        return RightFactor

    def first(self, path: KeyPath, parameter: jax.Array) -> RightFactor:
        """Returns a random right factor for the leaf at ``path``, the same on any mesh."""
        key = leaf_key(self.seed, jnp.zeros([], jnp.int32), path)
        shape = (*self._right_axes(path, parameter), self.rank)
        return RightFactor(place_moment(jax.random.normal(key, shape, jnp.float32), parameter))

    def keeps_dense(self, path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
        """Returns True if the factors of the leaf at ``path`` would be no smaller than the leaf."""
        if leaf.ndim < 2:
            return True
        layers, *_, columns = self._right_axes(path, leaf)
        rows = math.prod(leaf.shape[:-1]) // max(1, layers)
        return self.rank * (rows + columns) >= rows * columns

    def remarks(self, path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> Iterator[str]:
        """Yields notes for the memory report about the leaf at ``path``."""
        if self.keeps_dense(path, leaf):
            yield f"too small for rank {self.rank}, kept dense"

    def compress(
        self, update: jax.Array, dtype: DTypeLike | None = None, carried: Any = ()
    ) -> LowRank:
        """Returns the factors of the float32 ``update``.

        Args:
            update: ``(*lead, n)`` float32.
            dtype: the dtype in which the update came and shall go on; that of ``update`` if None.
            carried: the right factor of the last step.
        """
        start = RightFactor(*carried).right
        rows, col, whole = axes_of(start.shape[:-1])
        left = contract(f"{whole},{col}r->{rows}r", update, only_columns(start))
        left = _orthonormalized(left, tuple(range(len(col) - 1, len(rows))))
        right = contract(f"{whole},{rows}r->{col}r", update, left)
        return LowRank(
            left=jnp.expand_dims(left, len(rows)),
            right=jnp.expand_dims(right, absent_axes(start.shape[:-1])),
            bypass=None,
            mark=jnp.zeros([], jnp.int32),
            shape=update.shape,
            dtype=jnp.dtype(dtype or update.dtype),
        )

    def carry(self, sent: LowRank, carried: Any) -> RightFactor:
        """Returns the right factor of ``sent`` for the next step, its columns of length 1.

        Lengths do not matter to the iteration, and without them it cannot under- or overflow.
        """
        right = _near_one(sent.right, (-2,))
        length = jnp.sqrt(jnp.sum(jnp.square(right), axis=-2, keepdims=True))
        usable = (length > 0) & jnp.isfinite(length)
        start = RightFactor(*carried).right
        return RightFactor(jnp.where(usable, right / jnp.where(usable, length, 1), start))

    def window(
        self,
        path: KeyPath,
        parameter: jax.Array | jax.ShapeDtypeStruct,
        length: int,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns zeros for the factors ``(*lead, 1, length, r)`` and ``(..., n, length, r)``."""
        left = (*parameter.shape[:-1], 1, length, self.rank)
        right = (*self._right_axes(path, parameter), length, self.rank)
        return moment_zeros(parameter, left, dtype), moment_zeros(parameter, right, dtype)

    def _right_axes(self, path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
        layers = 1
        if leaf.ndim > 2 and layer_axis_of(path, leaf.shape, self.stacked) == 0:
            layers = leaf.shape[0]
        return (layers, *(1,) * (leaf.ndim - 2), leaf.shape[-1])


def power_sgd(rank: int = 4, stacked: str = STACKED, seed: int = 0) -> PowerSGD:
    """Returns PowerSGD, a low-rank approximation of each matrix; see :class:`PowerSGD`.

    Give it by itself to :func:`error_feedback`: under ``optax.inject_hyperparams`` the bare
    rank would become a traced array.

    Args:
        rank: of the approximation.
        stacked: a path pattern for what stacks layers.
        seed: of the first right factors.

    Returns:
        The compressor, for :func:`error_feedback`, :func:`compress`, :func:`scale_by_mfac` and
        :func:`scale_by_ggt`.

    Raises:
        ValueError: if ``rank`` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import compress, to_dense
        >>> from microadam_jax.compressors import power_sgd
        >>> import optax
        >>> tx = optax.chain(compress(power_sgd(rank=1)), to_dense())
        >>> g = jnp.outer(jnp.arange(3.0), jnp.ones(4))  # has rank 1
        >>> sent, _ = tx.update(g, tx.init(g))
        >>> bool(jnp.allclose(sent, g))
        True

    Reference: Vogels et al., PowerSGD (arXiv 1905.13727), Algorithm 1.
    """
    return PowerSGD(rank, stacked, seed)


def _near_one(matrix: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``matrix`` times a power of two, so that squares neither over- nor underflow."""
    largest = jnp.max(jnp.abs(matrix), axis=axes, keepdims=True)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
    return matrix * jnp.ldexp(jnp.float32(1), jnp.clip(-exponent, -126, 126))


def _orthonormalized(matrix: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """The columns along the last axis, orthonormal over the axes ``rows`` (Gram and Schmidt)."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=rows, keepdims=True)

    matrix = _near_one(matrix, rows)
    lengths = jnp.sqrt(dot(matrix, matrix))
    columns: list[jax.Array] = []
    for j in range(matrix.shape[-1]):
        column, matrix = matrix[..., :1], matrix[..., 1:]
        length = jnp.sqrt(dot(column, column))
        independent = length > ROUNDING * lengths[..., j, None]
        column = jnp.where(independent, column / jnp.where(independent, length, 1), 0)
        columns.append(column)
        matrix = matrix - column * dot(column, matrix)
    return jnp.concatenate(columns, axis=-1)
