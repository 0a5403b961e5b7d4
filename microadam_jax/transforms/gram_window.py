"""The newest update of a window, preconditioned by all of them through one small system."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_jax.blocks import BlockLayout
from microadam_jax.codecs.rounding import Rows
from microadam_jax.compressors import (
    BlockSparse,
    Compressor,
    Dense,
    Sent,
    is_compressed,
    require_compressor,
)
from microadam_jax.compressors.block_sparse import combined
from microadam_jax.engine.leaf_loops import Arrays, Work, on_cpu
from microadam_jax.engine.transformation import transformation
from microadam_jax.memory import warn_of_more_than_adam
from microadam_jax.sharding import contract, state_zeros, unused_factor
from microadam_jax.transforms.window import Window
from microadam_jax.trees import (
    KeyPath,
    boxed_blocks,
    boxed_like,
    map_with_path,
    path_name,
    rows_of,
)

Coefficients = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class GramWindowState(NamedTuple):
    """Holds the latest updates of every leaf, and their inner products over the whole model.

    Attributes:
        count: int32 scalar, steps taken. Step ``t`` lies in row ``(t - 1) % m``.
        gram: ``(m, m)`` float32, the inner products of the rows as they are stored.
        window_left: in the window's dtype. Values ``(*lead, blocks, m, k)`` of a sparse leaf,
            left factors ``(*lead, 1, m, r)`` of a low-rank one, updates ``(*shape, m, 1)`` of one
            that is kept dense.
        window_right: indices ``(*lead, blocks, m, k)`` uint8 or int16 of a sparse leaf, right
            factors ``(1, ..., n, m, r)`` of a low-rank one, one unused byte of one that is dense.
    """

    count: jax.Array
    gram: jax.Array
    window_left: Any
    window_right: Any


def gram_window(
    coefficients: Coefficients, window: Window, compressor: Compressor | None
) -> optax.GradientTransformationExtraArgs:
    r"""The combination :math:`G^\top y` of a window's rows :math:`G`, the whole model's at once.

    A row is the update of all leaves in one step. Only its inner products with the others are
    summed over leaves and devices; every leaf then combines its own rows.

    Args:
        coefficients: gives :math:`y`, ``(m,)`` float32, from the Gram matrix
            :math:`K = G G^\top`, the newest row's position and the number of steps.
        window: how many rows are kept, and how.
        compressor: the one that made the updates; None if nothing compresses them.

    Raises:
        TypeError: if ``compressor`` is neither a compressor nor None.
        ValueError: in ``update``, if an update was not made by ``compressor``.
    """
    if compressor is not None:
        require_compressor(compressor)

    def init(params: optax.Params) -> GramWindowState:
        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, jax.Array]:
            if compressor is None or compressor.keeps_dense(path, parameter):
                rows = (*parameter.shape, window.length, 1)
                return state_zeros(parameter, rows, window.dtype), unused_factor(parameter)
            return compressor.window(path, parameter, window.length, window.dtype)

        trees = map_with_path(zeros, 2, params)
        state = GramWindowState(
            jnp.zeros([], jnp.int32),
            jnp.zeros((window.length, window.length), jnp.float32),
            *(boxed_blocks(tree, params) for tree in trees),
        )
        if compressor is not None:  # dense windows are larger by their nature
            warn_of_more_than_adam("scale_by_mfac or scale_by_ggt", state, params)
        return state

    def update(
        updates: optax.Updates,
        state: GramWindowState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GramWindowState]:
        del extra_args
        targets = updates if params is None else params
        count = jnp.asarray(optax.safe_increment(state.count))
        newest = state.count % window.length

        def insert(
            path: KeyPath, update: Any, target: Any, left: jax.Array, right: jax.Array
        ) -> tuple[jax.Array, ...]:
            sent = _sent(update, target)
            if not sent.fits((left, right)):
                raise ValueError(
                    f"The update of {path_name(path)!r} is {_form(update)}, but its window was "
                    f"made for {compressor or 'dense updates'}. Give the same compressor to "
                    "error_feedback or compress and to the window: "
                    "scale_by_mfac(compressor=...), scale_by_ggt(compressor=...)."
                )
            rows = sent.write((left, right), newest)
            return *rows, sent.products(rows, newest)

        left, right, products = map_with_path(
            insert,
            3,
            updates,
            targets,
            state.window_left,
            state.window_right,
            is_leaf=is_compressed,
        )
        row = sum(jax.tree.leaves(products), jnp.zeros(window.length, jnp.float32))
        gram = state.gram.at[newest, :].set(row).at[:, newest].set(row)
        # Of a matrix with NaN, LAPACK may return finite eigenvectors.
        y = jnp.where(jnp.isfinite(gram).all(), coefficients(gram, newest, count), jnp.nan)

        treedef, rows = rows_of(updates, targets, left, right, is_leaf=is_compressed)
        sums = _sums([(_sent(update, p), p, own) for _, update, p, *own in rows], y)
        left = boxed_like(left, state.window_left)
        right = boxed_like(right, state.window_right)
        return treedef.unflatten(sums), GramWindowState(count, gram, left, right)

    return transformation(init, update)


def spectrum(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a Gram matrix, and the least eigenvalue that means anything.

    Float32 leaves an error of that size in each of them. Where gradients repeat, exact eigenvalues
    are zero, and an inverse of what rounding made of them would take over the update; their
    directions are those in which the rows cancel, so that nothing is lost without them.
    """
    squares, vectors = jnp.linalg.eigh(gram)
    squares = jnp.maximum(squares, 0)
    least = 2 * gram.shape[0] ** 0.5 * jnp.finfo(jnp.float32).eps * squares[-1]
    return squares, vectors, least


def applied(
    vectors: jax.Array, divisors: jax.Array, least: jax.Array, newest: jax.Array
) -> jax.Array:
    """The vector that has 1 in row ``newest``, divided by ``divisors`` in the eigenbasis.

    Directions with a divisor below ``least`` are left out.
    """
    inverse = jnp.where(divisors > least, 1 / divisors, 0)
    return contract("ij,j->i", vectors, inverse * vectors[newest])


def _sent(update: Any, target: Any) -> Sent:
    return update if is_compressed(update) else Dense(update, target.dtype)


def _sums(leaves: Sequence[tuple[Sent, jax.Array, Any]], y: jax.Array) -> list[jax.Array]:
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


def _form(update: Any) -> str:
    name = type(update).__name__ if is_compressed(update) else "dense"
    return f"{name} of shape {update.shape}"
