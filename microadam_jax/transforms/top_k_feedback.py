"""Error feedback around Top-K, which rows have each by itself: CPUs work in chunks of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.blocks import BlockLayout, blocked_shape
from microadam_jax.codecs import Affine4, Codec
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.compressors import BlockSparse, Compressor, TopK
from microadam_jax.sharding import state_zeros
from microadam_jax.transforms.chunks import Arrays, Turns
from microadam_jax.trees import KeyPath, path_name
from pallas_kernels.topk_compress import MAX_UNROLLED, topk_compress


class TopKFeedback(NamedTuple):
    """How a leaf is compressed; hashable.

    Attributes:
        compressor: chooses what is sent.
        codec: of what stays behind.
        layout: how a row of the leaf is cut into blocks.
        sharding: where the leaf lies, on a mesh with Auto axes.
    """

    compressor: TopK
    codec: Codec
    layout: BlockLayout
    sharding: NamedSharding | None

    def send(
        self,
        turns: Turns,
        gradient: jax.Array,
        target: jax.Array,
        key: jax.Array | None,
        stored: Arrays,
    ) -> tuple[BlockSparse, Arrays]:
        """What of ``gradient`` goes on, in the dtype of ``target``, and the new residual.

        Args:
            turns: in which leaves are compressed.
            gradient: of any float dtype.
            target: the parameter.
            key: a typed random key, if the codec draws.
            stored: the residual.
        """
        # What no kernel reads, such as float64.
        narrow = gradient if gradient.dtype.itemsize <= 4 else gradient.astype(jnp.float32)
        (values, indices, *left), turns.turn = _compressed(self, narrow, stored, key, turns.turn)
        dtype = jnp.dtype(target.dtype)
        return BlockSparse(values, indices, None, gradient.shape, dtype, self.layout), tuple(left)

    @property
    def is_one_operation(self) -> bool:
        """Whether residual and Top-K share their blocks."""
        return self.codec == Affine4(self.compressor.blocks)

    @property
    def survivors(self) -> int:
        """How many elements of a block are sent."""
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


def goes_by_rows(codec: Codec, gradient: jax.Array) -> bool:
    """Whether there are rows, and what stays of one depends on no other."""
    return isinstance(codec, RowByRow) and gradient.ndim > 0 and gradient.size > 0


def require_unnamed(compressor: Compressor, path: KeyPath) -> None:
    """Refuses the name of a kernel where none can run.

    Raises:
        NotImplementedError: if ``compressor`` names one.
    """
    if isinstance(compressor, TopK) and compressor.implementation not in (None, "xla"):
        raise NotImplementedError(
            f"{compressor.implementation!r} compresses {path_name(path)!r} only together "
            "with residual=Affine4(buckets=compressor.blocks), rounded to nearest with "
            "float32 statistics, alpha=None, and one axis or more. Leave "
            "TopK.implementation at None to use 'xla' elsewhere."
        )


@functools.partial(jax.jit, static_argnums=0)
def _compressed(
    feedback: TopKFeedback,
    gradient: jax.Array,
    stored: Arrays,
    key: jax.Array | None,
    turn: jax.Array,
) -> tuple[Arrays, jax.Array]:
    """What all rows send, their new residual, and whose turn is next."""
    named = feedback.compressor.implementation

    def whole(
        gradient: jax.Array, stored: Arrays, key: jax.Array | None, turn: jax.Array
    ) -> tuple[Arrays, jax.Array]:
        return feedback.of_rows(gradient, stored, key, named, feedback.sharding), turn

    def in_turn(
        gradient: jax.Array, stored: Arrays, key: jax.Array | None, turn: jax.Array
    ) -> tuple[Arrays, jax.Array]:
        def step(rows: Rows, before: Arrays, read: Arrays) -> Arrays:
            (gradient,) = read
            draw = None if key is None else Draw(key, rows)
            return feedback.of_rows(gradient, before[2:], draw, "xla")

        turns = Turns(turn)
        shape = blocked_shape(gradient.shape, feedback.layout, feedback.survivors)
        values, indices = (state_zeros(gradient, shape, x) for x in (jnp.float32, jnp.int32))
        return turns.each(step, (values, indices, *stored), (gradient,)), turns.turn

    # XLA's partial sort, which finds many survivors, takes one core: leaves run side by side.
    if named not in (None, "xla") or feedback.survivors > MAX_UNROLLED:
        return whole(gradient, stored, key, turn)
    # Accelerators fuse what CPUs write to memory, new pages of it in every step.
    return jax.lax.platform_dependent(gradient, stored, key, turn, cpu=in_turn, default=whole)
