"""Into the sparse form that links exchange, and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_jax.compressors import Compressor, is_compressed, require_compressor, top_k
from microadam_jax.engine.transformation import transformation
from microadam_jax.state_arrays import unused_factor
from microadam_jax.trees import KeyPath, boxed_blocks, boxed_like, map_with_path


class CompressState(NamedTuple):
    """Keeps what the compressor carries from step to step.

    Attributes:
        carried: the compressor's NamedTuple, with a tree of the parameters' structure for each
            of its arrays; Top-K's is empty.
    """

    carried: Any


def compress(compressor: Compressor = top_k()) -> optax.GradientTransformationExtraArgs:
    r"""Sends :math:`C(g_t)` and forgets the rest: compression without error feedback.

    Args:
        compressor: :math:`C`. Leaves that it keeps dense pass through unchanged.

    Returns:
        The transformation. It has no state but what the compressor carries.

    Raises:
        TypeError: if ``compressor`` is not a compressor; in ``init``, if a leaf is not a
            floating-point array.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import compress, to_dense, top_k
        >>> tx = optax.chain(compress(top_k(count=1, min_size=0, min_row=0)), to_dense())
        >>> updates, _ = tx.update(jnp.array([1.0, 3.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [0. 3.]
    """
    require_compressor(compressor)
    arrays = len(compressor.Carried._fields)

    def init(params: optax.Params) -> CompressState:
        return CompressState(first_carried(compressor, params))

    def send(
        path: KeyPath, gradient: jax.Array, target: jax.Array, *carried: jax.Array
    ) -> tuple[Any, ...]:
        if compressor.keeps_dense(path, gradient):
            return gradient, *carried
        sent = compressor.compress(gradient.astype(jnp.float32), target.dtype, carried)
        return sent, *compressor.carry(sent, carried)

    def update(
        updates: optax.Updates,
        state: CompressState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressState]:
        del extra_args
        targets = updates if params is None else params
        sent, *carried = map_with_path(send, 1 + arrays, updates, targets, *state.carried)
        boxed = map(boxed_like, carried, state.carried)
        return sent, CompressState(compressor.Carried(*boxed))

    return transformation(init, update)


def first_carried(compressor: Compressor, params: optax.Params) -> Any:
    """Returns what ``compressor`` carries to the first step: one tree for each of its arrays."""
    arrays = len(compressor.Carried._fields)

    def first(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, ...]:
        if compressor.keeps_dense(path, parameter):
            return tuple(unused_factor(parameter) for _ in range(arrays))
        return compressor.first(path, parameter)

    trees = map_with_path(first, arrays, params)
    return compressor.Carried(*(boxed_blocks(tree, params) for tree in trees))


def to_dense() -> optax.GradientTransformationExtraArgs:
    """Turns the compressed updates of a link into ordinary arrays.

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
        return update.to_dense() if is_compressed(update) else update

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(dense, updates, is_leaf=is_compressed)

    return optax.with_extra_args_support(optax.stateless(update))
