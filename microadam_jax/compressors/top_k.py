"""Top-K by magnitude within each block."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.arguments import require_positive
from microadam_jax.blocks import Blocks, blocked_shape, in_row, split
from microadam_jax.compressors.block_sparse import BlockSparse
from microadam_jax.layout.path_rules import path_pattern
from microadam_jax.layout.stacks import STACKED, is_small, layer_axis_of
from microadam_jax.state_arrays import state_zeros
from microadam_jax.trees import KeyPath
from pallas_kernels.topk_compress import select_top_k

MAX_BLOCK = 32768  # indices into a block are kept as int16


class NothingCarried(NamedTuple):
    """Top-K remembers nothing."""


@dataclasses.dataclass(frozen=True)
class TopK:
    r"""Keeps the :math:`k` elements of largest magnitude in each block of :math:`B`.

    :math:`k = \max(1, \lfloor \rho B + 1/2 \rfloor)` for a density :math:`\rho`. The nearest
    integer gives the published count for every block size of the released code, and keeps the
    density of a row of any length close to :math:`\rho`, so that memory follows the formula.

    Args:
        density: the share :math:`\rho` of each block that is kept; in (0, 1].
        count: :math:`k` itself, instead of a density; smaller blocks keep all they have.
        blocks: the rule that cuts rows into blocks of at most 32768 elements.
        min_size: leaves with fewer elements than this are kept dense. The size is that of the
            whole parameter, never of a device's shard of it.
        min_row: leaves whose rows are shorter than this are kept dense, because the
            bookkeeping of a short block costs more than the moments it replaces.
        stacked: a path pattern for what stacks layers along its first axis, as for
            :class:`Partition`; ``min_size`` is compared with the size of one layer. A leaf is seen
            without the others, so that the default goes by its own name and axes.

    Raises:
        TypeError: if ``blocks`` is not a :class:`Blocks`.
        ValueError: if ``density`` is outside (0, 1], ``count`` is not a positive integer, both or
            neither are given, or blocks have more than 32768 elements; if ``stacked`` is no
            regular expression.
    """

    density: float | None = None
    count: int | None = None
    blocks: Blocks = Blocks()
    min_size: int = 4096
    min_row: int = 16
    stacked: str = STACKED

    def __post_init__(self) -> None:
        path_pattern(self.stacked)
        if (self.density is None) == (self.count is None):
            raise ValueError(
                f"TopK takes either a density or a count; got density={self.density} and "
                f"count={self.count}."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"TopK.density must lie in (0, 1]; got {self.density}.")
        if self.count is not None:
            require_positive("TopK.count", self.count)
        if not isinstance(self.blocks, Blocks):
            raise TypeError(f"TopK.blocks must be such as Blocks(256); got {self.blocks!r}.")
        if self.blocks.size > MAX_BLOCK:
            raise ValueError(
                f"TopK.blocks.size must be at most {MAX_BLOCK}, so that indices fit in 16 bits; "
                f"got {self.blocks.size}."
            )

    def survivors(self, block_size: int) -> int:
        """Counts the selected entries of a block of ``block_size``."""
        if self.density is not None:
            return max(1, math.floor(self.density * block_size + 0.5))
        return min(self.count or 1, block_size)

    def keeps_dense(self, path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
        """Returns True if the leaf at ``path`` of the parameter tree is too small to compress."""
        layer_axis = layer_axis_of(path, leaf.shape, self.stacked)
        return is_small(leaf.shape, layer_axis, self.min_size, self.min_row)

    def remarks(self, path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> Iterator[str]:
        """Yields notes for the memory report about the leaf at ``path``."""
        layout = self.blocks.layout_of(leaf)
        if self.keeps_dense(path, leaf):
            yield "too small to compress, kept dense"
        elif layout.padding and layout.count > 1:
            yield f"rows of {layout.row} have no even divisor that fits, last block padded"

    @property
    def Carried(self) -> type[NothingCarried]:
        """Returns the NamedTuple of what is carried from one step to the next: nothing."""
        return NothingCarried

    def first(self, path: KeyPath, parameter: jax.Array) -> NothingCarried:
        """Returns nothing, which is what Top-K carries."""
        del path, parameter
        return NothingCarried()

    def carry(self, sent: BlockSparse, carried: Any) -> NothingCarried:
        """Returns nothing, which is what Top-K carries."""
        del sent, carried
        return NothingCarried()

    def window(
        self,
        path: KeyPath,
        parameter: jax.Array | jax.ShapeDtypeStruct,
        length: int,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns zeros for values and indices ``(*lead, blocks, length, k)``.

        Raises:
            ValueError: if the sharding of ``parameter`` does not divide its blocks.
        """
        del path
        layout = self.blocks.layout_of(parameter)
        k = self.survivors(layout.size)
        shape = blocked_shape(parameter.shape, layout, length, k)
        index_dtype = jnp.uint8 if layout.size <= 256 else jnp.int16
        return state_zeros(parameter, shape, dtype), state_zeros(parameter, shape, index_dtype)

    def compress(
        self, update: jax.Array, dtype: DTypeLike | None = None, carried: Any = ()
    ) -> BlockSparse:
        """Returns the elements of the float32 ``update`` that survive.

        Args:
            update: ``(*lead, n)`` float32.
            dtype: the dtype in which the update came and shall go on; that of ``update`` if None.
            carried: nothing.
        """
        del carried
        layout = self.blocks.layout_of(update)
        values, indices = select_top_k(
            split(update, layout),
            self.survivors(layout.size),
            selectable=in_row(layout) if layout.padding else None,
        )
        return BlockSparse(
            values=values,
            indices=indices,
            bypass=None,
            shape=update.shape,
            dtype=jnp.dtype(dtype or update.dtype),
            layout=layout,
        )


def top_k(
    density: float | None = None,
    count: int | None = None,
    blocks: Blocks = Blocks(),
    min_size: int = 4096,
    min_row: int = 16,
    stacked: str = STACKED,
) -> TopK:
    """Selects the largest magnitudes of each block; see :class:`TopK` for the arguments.

    Without a density or a count it keeps 3 elements of each block of 256.

    Returns:
        The compressor, for :func:`error_feedback`, :func:`compress` and the windows,
        :func:`scale_by_window_adam`, :func:`scale_by_mfac` and :func:`scale_by_ggt`.

    Raises:
        TypeError: if ``blocks`` is not a :class:`Blocks`.
        ValueError: if ``density`` is outside (0, 1], ``count`` is not a positive integer, both are
            given, or blocks have more than 32768 elements.

    Examples:
        >>> from microadam_jax import top_k
        >>> top_k(density=0.01).survivors(4096)
        41
    """
    if density is None and count is None:
        density = 3 / 256
    return TopK(density, count, blocks, min_size, min_row, stacked)
