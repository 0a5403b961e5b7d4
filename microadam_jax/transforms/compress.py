"""Into the sparse form that links exchange, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from microadam_jax.compressors import Compressor, is_block_sparse, top_k
from microadam_jax.trees import KeyPath, map_with_path


def compress(compressor: Compressor = top_k()) -> optax.GradientTransformationExtraArgs:
    r"""Sends :math:`C(g_t)` and forgets the rest: compression without error feedback.

    Args:
        compressor: :math:`C`. Leaves that it keeps dense pass through unchanged.

    Returns:
        The transformation, which has no state.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import compress, to_dense, top_k
        >>> tx = optax.chain(compress(top_k(count=1, min_size=0, min_row=0)), to_dense())
        >>> updates, _ = tx.update(jnp.array([1.0, 3.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [0. 3.]
    """

    def send(path: KeyPath, gradient: jax.Array, target: jax.Array) -> tuple[Any]:
        if compressor.keeps_dense(path, gradient):
            return (gradient,)
        return (compressor.compress(gradient.astype(jnp.float32), target.dtype),)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        targets = updates if params is None else params
        (sent,) = map_with_path(send, 1, updates, targets)
        return sent

    return optax.with_extra_args_support(optax.stateless(update))


def to_dense() -> optax.GradientTransformationExtraArgs:
    """Turns the :class:`BlockSparse` updates of a compressing link into ordinary arrays.

    Put it between :func:`error_feedback` or :func:`compress` and any Optax transformation.
    Updates that are ordinary arrays already pass through unchanged.

    Returns:
        The transformation, which has no state.

    Examples:
        Adam on the three largest of each 256 gradient elements, with error feedback:

        >>> import optax
        >>> from microadam_jax import error_feedback, to_dense
        >>> tx = optax.chain(error_feedback(), to_dense(), optax.adam(1e-3))
    """

    def dense(update: Any) -> jax.Array:
        return update.to_dense() if is_block_sparse(update) else update

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(dense, updates, is_leaf=is_block_sparse)

    return optax.with_extra_args_support(optax.stateless(update))
