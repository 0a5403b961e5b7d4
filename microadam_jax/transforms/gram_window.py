"""The newest update of a window, preconditioned by all of them through one small system."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_jax.compressors import Compressor, Dense, is_compressed, require_compressor
from microadam_jax.engine.transformation import transformation
from microadam_jax.engine.window_sums import Sent, window_sums
from microadam_jax.state_arrays import state_zeros, unused_factor
from microadam_jax.transforms.window import Window
from microadam_jax.trees import KeyPath, boxed_blocks, boxed_like, map_with_path, path_name, rows_of

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
        return GramWindowState(
            jnp.zeros([], jnp.int32),
            jnp.zeros((window.length, window.length), jnp.float32),
            *(boxed_blocks(tree, params) for tree in trees),
        )

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
        sums = window_sums([(_sent(update, p), p, own) for _, update, p, *own in rows], y)
        left = boxed_like(left, state.window_left)
        right = boxed_like(right, state.window_right)
        return treedef.unflatten(sums), GramWindowState(count, gram, left, right)

    # Dense windows are larger by their nature.
    warns_as = None if compressor is None else "scale_by_mfac or scale_by_ggt"
    return transformation(init, update, warns_as=warns_as)


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

    Directions with a divisor of ``least`` or below are left out.
    """
    inverse = jnp.where(divisors > least, 1 / divisors, 0)
    return jnp.matmul(vectors, inverse * vectors[newest], precision=jax.lax.Precision.HIGHEST)


def _sent(update: Any, target: Any) -> Sent:
    return update if is_compressed(update) else Dense(update, target.dtype)


def _form(update: Any) -> str:
    name = type(update).__name__ if is_compressed(update) else "dense"
    return f"{name} of shape {update.shape}"
