"""Error feedback around Top-K, which each row has by itself."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.blocks import BlockLayout, blocked_shape
from microadam_jax.codecs import Affine4, Codec
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.compressors import BlockSparse, Deferred, TopK
from microadam_jax.compressors.rows import row_shape
from microadam_jax.engine.leaf_loops import Arrays, Work, each_kind, on_cpu
from microadam_jax.state_arrays import state_zeros
from microadam_jax.trees import KeyPath, path_name
from pallas_kernels.dispatch import names_kernel
from pallas_kernels.topk_compress import MAX_UNROLLED, topk_compress


class TopKFeedback(NamedTuple):
    """Compresses a leaf; hashable.

    Attributes:
        compressor: selects what is sent.
        codec: of the residual.
        layout: how a row of the leaf is cut into blocks.
        implementation: see :func:`run_with`.
        sharding: how the leaf is sharded, on a mesh with Auto axes.
    """

    compressor: TopK
    codec: Codec
    layout: BlockLayout
    implementation: str | None
    sharding: NamedSharding | None

    @property
    def is_one_operation(self) -> bool:
        """Returns True if residual and Top-K share their blocks."""
        return _is_one_operation(self.compressor, self.codec)

    @property
    def survivors(self) -> int:
        """Counts the selected entries of a block."""
        return self.compressor.survivors(self.layout.size)

    def of_rows(
        self,
        gradient: jax.Array,
        stored: Arrays,
        key: jax.Array | Draw | None,
        implementation: str | None,
        sharding: NamedSharding | None = None,
    ) -> Arrays:
        """The values and indices that some rows send, and their new residual."""
        if self.is_one_operation:
            return topk_compress(
                gradient,
                *stored,
                k=self.survivors,
                implementation=implementation,
                sharding=sharding,
            )
        owed = self.codec.decode(self.codec.Encoded(*stored), gradient.shape)
        accumulated = gradient.astype(jnp.float32) + owed
        sent = self.compressor.compress(accumulated)
        return sent.values, sent.indices, *self.codec.encode(sent.rest_of(accumulated), key)

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        """The step of a loop: ``carried`` are values, indices and the residual."""
        gradient, *key = inputs
        draw = Draw(key[0], rows) if key else None
        return self.of_rows(gradient, carried[2:], draw, "xla")


@functools.lru_cache(maxsize=64)
def _is_one_operation(compressor: TopK, codec: Codec) -> bool:
    return codec == Affine4(compressor.blocks)


@dataclasses.dataclass(frozen=True)
class Uncompressed(Deferred):
    """A gradient that waits to be compressed with those of other leaves.

    Attributes:
        feedback: how.
        gradient: of any float dtype.
        stored: the residual.
        key: a typed random key, if the codec draws.
        dtype: of the parameter.
    """

    feedback: TopKFeedback
    gradient: jax.Array
    stored: Arrays
    key: jax.Array | None
    dtype: jnp.dtype

    @property
    def arrays(self) -> Any:
        """Returns the arrays of the computation."""
        # No kernel reads what is wider, such as float64.
        wide = self.gradient.dtype.itemsize > 4
        gradient = self.gradient.astype(jnp.float32) if wide else self.gradient
        return gradient, self.stored, self.key

    @property
    def kind(self) -> Hashable:
        """Equal for gradients that are compressed by one program."""
        leaves, structure = jax.tree.flatten(self.arrays)
        return self.feedback, structure, tuple(map(jax.typeof, leaves))

    @property
    def layout(self) -> BlockLayout:
        """Returns the layout of a row's blocks."""
        return self.feedback.layout

    @property
    def survivors(self) -> int:
        """Counts the elements of a block that are sent."""
        return self.feedback.survivors

    @property
    def sends_few(self) -> bool:
        """Returns True if what is sent is found without sorting, which leaves do side by side."""
        return self.survivors <= MAX_UNROLLED

    @property
    def names_kernel(self) -> bool:
        """Returns True if one implementation is asked for."""
        return names_kernel(self.feedback.implementation)

    def fits(self, window: tuple[jax.Array, jax.Array]) -> bool:
        """Returns True if ``window`` holds as many elements of as many blocks."""
        sent = blocked_shape(self.gradient.shape, self.layout, self.survivors)
        values, indices = window
        return row_shape(values) == row_shape(indices) == sent

    def compressed(self, results: Arrays) -> tuple[Any, ...]:
        """The sparse update and the new residual."""
        values, indices, *left = results
        shape, layout = self.gradient.shape, self.feedback.layout
        return BlockSparse(values, indices, None, shape, self.dtype, layout), *left


def compress_all(waiting: Sequence[Uncompressed]) -> list[tuple[Any, ...]]:
    """Compresses gradients with their residuals.

    Args:
        waiting: the gradients of leaves.

    Returns:
        For each of them the sparse update and the arrays of the new residual.
    """
    if not waiting:
        return []
    flat, structure = jax.tree.flatten([one.arrays for one in waiting])
    feedbacks = [one.feedback for one in waiting]

    def one_by_one(*arrays: jax.Array) -> list[Arrays]:
        def compress(feedback: TopKFeedback, arrays: Any) -> Arrays:
            gradient, stored, key = arrays
            named = feedback.implementation
            return feedback.of_rows(gradient, stored, key, named, feedback.sharding)

        kinds = [one.kind for one in waiting]
        given = zip(feedbacks, structure.unflatten(arrays), strict=True)
        return each_kind(compress, kinds, list(given))

    def in_loops(*arrays: jax.Array) -> list[Arrays]:
        works = []
        for feedback, (value, stored, key) in zip(
            feedbacks, structure.unflatten(arrays), strict=True
        ):
            shape = blocked_shape(value.shape, feedback.layout, feedback.survivors)
            sent = (state_zeros(value, shape, dtype) for dtype in (jnp.float32, jnp.int32))
            read = (value,) if key is None else (value, key)
            works.append(Work(feedback, (*sent, *stored), read))
        return on_cpu(works, alone=0)

    # XLA's partial sort, which selects many, takes one core.
    if any(one.names_kernel or not one.sends_few for one in waiting):
        results = one_by_one(*flat)
    else:
        # Accelerators fuse what CPUs write to memory, new pages of it in every step.
        results = jax.lax.platform_dependent(*flat, cpu=in_loops, default=one_by_one)
    return [one.compressed(result) for one, result in zip(waiting, results, strict=True)]


def goes_by_rows(codec: Codec, gradient: jax.Array) -> bool:
    """Returns True if there are rows, and what stays of one depends on no other."""
    return isinstance(codec, RowByRow) and gradient.ndim > 0 and gradient.size > 0


def require_unnamed(implementation: str | None, path: KeyPath) -> None:
    """Refuses the name of a kernel where none can run.

    Raises:
        NotImplementedError: if ``implementation`` names one.
    """
    if names_kernel(implementation):
        raise NotImplementedError(
            f"{implementation!r} compresses {path_name(path)!r} only by Top-K together "
            "with residual=Affine4(buckets=compressor.blocks), rounded to nearest with "
            "float32 statistics, alpha=None, and one axis or more. Leave the implementation of "
            "run_with at None to use 'xla' elsewhere."
        )
