"""The sums of the rows of windows, leaf by leaf or, on CPUs, those of one kind in a loop."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.blocks import BlockLayout
from microadam_jax.codecs.rounding import Rows
from microadam_jax.compressors import BlockSparse, Dense, LowRank, is_compressed
from microadam_jax.compressors.block_sparse import combined
from microadam_jax.engine.leaf_loops import Arrays, Work, on_cpu

Sent = BlockSparse | LowRank | Dense  # an update in the form in which a window keeps it


def window_sums(leaves: Sequence[tuple[Sent, jax.Array, Any]], y: jax.Array) -> list[jax.Array]:
    """The dense sum of each leaf's rows.

    Args:
        leaves: of each what was sent, the parameter, and the window.
        y: the coefficients of the rows.
    """
    flat, structure = jax.tree.flatten([(target, window) for _, target, window in leaves])

    def one_by_one(y: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        own = zip(leaves, structure.unflatten(arrays), strict=True)
        return [sent.combine(window, y) for (sent, *_), (_, window) in own]

    def in_loops(y: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        own = zip(sparse, structure.unflatten(arrays), strict=True)
        works = [
            Work(_Sum(sent.layout), (), (target, *window), jnp.dtype("float32"), shared=(y,))
            for sent, (target, window) in own
        ]
        return [total for (total,) in on_cpu(works, alone=0)]

    sparse = [sent for sent, *_ in leaves if isinstance(sent, BlockSparse)]
    targets = [target for _, target, _ in leaves]
    by_rows = all(not is_compressed(p) and p.ndim and p.size for p in targets)
    if leaves and by_rows and len(sparse) == len(leaves):
        sums = jax.lax.platform_dependent(y, *flat, cpu=in_loops, default=one_by_one)
    else:
        sums = one_by_one(y, *flat)
    return [
        sent.with_bypass(total).astype(sent.dtype)
        for (sent, *_), total in zip(leaves, sums, strict=True)
    ]


class _Sum(NamedTuple):
    """The sum of the rows of a window, for some rows of a leaf."""

    layout: BlockLayout

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        del rows, carried
        target, values, indices, y = inputs
        return (combined((values, indices), y, self.layout, target.shape),)
