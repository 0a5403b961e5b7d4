"""What spans a subspace: vectors, or selected rows."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax.sharding import explicit_sharding, place_on, replicated

# A basis drifts from orthogonality in bfloat16 or TF32, the more where it is its own start.
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class DenseBasis:
    """The columns of a matrix.

    Attributes:
        vectors: float32, of shape ``(*batch, rows, rank)``.
    """

    vectors: jax.Array

    def project(self, matrix: jax.Array) -> jax.Array:
        """Inner products with the vectors."""
        return inner_products(self.vectors, matrix)

    def back(self, low: jax.Array) -> jax.Array:
        """Sums of the vectors."""
        return jnp.einsum("...nr,...rl->...nl", self.vectors, low, precision=PRECISION)

    def overlap(self, old: "Basis") -> jax.Array:
        """Inner products of the vectors with each other."""
        assert isinstance(old, DenseBasis)
        return inner_products(self.vectors, old.vectors)


@dataclasses.dataclass(frozen=True)
class ColumnBasis(DenseBasis):
    """Columns of one orthogonal matrix, which overlap where they are the same.

    Attributes:
        indices: int32, of shape ``(*batch, rank)``.
    """

    indices: jax.Array

    def overlap(self, old: "Basis") -> jax.Array:
        """Ones and zeros."""
        assert isinstance(old, ColumnBasis)
        return _same(self.indices, old.indices)


@dataclasses.dataclass(frozen=True)
class RowBasis:
    """Rows of the identity, selected by index, each with a weight.

    Attributes:
        indices: int32, of shape ``(*batch, rank)``; the same may occur several times.
        weights: float32, of the same shape; None if all are 1.
        rows: how many there are to select from.
    """

    indices: jax.Array
    weights: jax.Array | None
    rows: int

    def project(self, matrix: jax.Array) -> jax.Array:
        """The selected rows, weighted."""
        others = [axis for axis in range(matrix.ndim) if axis != matrix.ndim - 2]
        matrix = place_on(matrix, matrix, others)
        return self._weighted(jnp.take_along_axis(matrix, self.indices[..., None], axis=-2))

    def back(self, low: jax.Array) -> jax.Array:
        """The rows in their places, those of one place added."""
        low = self._weighted(low)

        def scatter(low: jax.Array, indices: jax.Array) -> jax.Array:
            out = jnp.zeros((*low.shape[:-2], self.rows, low.shape[-1]), low.dtype)
            batch = jnp.ix_(*map(jnp.arange, low.shape[:-2])) if low.ndim > 2 else ()
            return out.at[(*(b[..., None] for b in batch), indices)].add(low)

        sharding = explicit_sharding(low)
        if sharding is None:
            return scatter(low, self.indices)
        # A scatter has no rule for its sharding; along whole rows every device has its own.
        spec = sharding.spec
        run = jax.shard_map(
            scatter, mesh=sharding.mesh, in_specs=(spec, P(*spec[:-1])), out_specs=spec,
            check_vma=False,
        )  # fmt: skip
        batch_axes = tuple(range(low.ndim - 2))
        indices = place_on(self.indices, low, batch_axes)
        return run(low, indices)

    def overlap(self, old: "Basis") -> jax.Array:
        """The weights of rows that are in both."""
        assert isinstance(old, RowBasis)
        same = _same(self.indices, old.indices)
        if self.weights is None or old.weights is None:
            return same
        return self.weights[..., :, None] * same * old.weights[..., None, :]

    def _weighted(self, low: jax.Array) -> jax.Array:
        return low if self.weights is None else self.weights[..., None] * low


Basis = DenseBasis | RowBasis  # a matrix P of shape (*batch, rows, rank)


def inner_products(left: jax.Array, right: jax.Array) -> jax.Array:
    r""":math:`L^T R`, which sums over the rows of both: they may lie on several devices."""
    equation = "...nr,...nl->...rl"
    known = explicit_sharding(left), explicit_sharding(right)
    sharding = known[1] or known[0]
    if sharding is None:
        return jnp.einsum(equation, left, right, precision=PRECISION)
    *batch, rows, _ = sharding.spec
    columns = known[1].spec[-1] if known[1] else None
    left = jax.sharding.reshard(left, NamedSharding(sharding.mesh, P(*batch, rows, None)))
    right = jax.sharding.reshard(right, NamedSharding(sharding.mesh, P(*batch, rows, columns)))
    spec = P(*batch, None, columns)
    return jnp.einsum(
        equation, left, right, precision=PRECISION, out_sharding=NamedSharding(sharding.mesh, spec)
    )


def row_norms(matrix: jax.Array) -> jax.Array:
    """The length of each row, of shape ``(*batch, rows)``, on every device."""
    return replicated(jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-1)))


def _same(one: jax.Array, other: jax.Array) -> jax.Array:
    return (one[..., :, None] == other[..., None, :]).astype(jnp.float32)
