"""Error feedback: what compression drops is added to the next gradient."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Codec, as_codec
from microadam_jax.compressors import Compressor, TopK, require_compressor, top_k
from microadam_jax.diagnostics import announce_feedback, observe_feedback, observing
from microadam_jax.engine.top_k_feedback import (
    TopKFeedback,
    Uncompressed,
    compress_all,
    goes_by_rows,
    require_unnamed,
)
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import remark, scope
from microadam_jax.state_arrays import state_zeros, unused_state
from microadam_jax.state_format import setting
from microadam_jax.transforms.compress import first_carried
from microadam_jax.trees import KeyPath, boxed_like, columns_of, leaf_key, map_with_path, rows_of


class ErrorFeedbackState(NamedTuple):
    """Keeps the residual.

    Attributes:
        count: int32 scalar, steps taken.
        residual: the codec's NamedTuple, with a tree of the parameters' structure for each of
            its arrays. Those of a leaf that is kept dense are unused; inside
            :func:`accumulate_into_residual` the first of them is the float32 sum of its gradients.
        carried: the compressor's NamedTuple, likewise; Top-K's is empty.
    """

    count: jax.Array
    residual: Any
    carried: Any


def error_feedback(
    compressor: Compressor = top_k(),
    residual: Codec | str = "affine4",
    alpha: ArrayLike | None = None,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Compresses each gradient together with what earlier compressions dropped.

    With the compressor :math:`C` and the residual's codec :math:`Q`,

    .. math::

        a_t &= g_t + Q^{-1}(e_t) \\
        c_t &= C(a_t) \\
        e_{t+1} &= Q(a_t - c_t)

    and :math:`c_t` goes on down the chain as :class:`BlockSparse` or :class:`LowRank` updates.
    Leaves that the compressor keeps dense pass through unchanged, and their residual is unused.

    A non-finite element is selected first by Top-K and so leaves with :math:`c_t`; where a block
    has more of them than it sends, its bucket of the residual becomes and stays NaN, as does the
    whole residual of a low-rank compressor. Wrap the whole chain in ``optax.apply_if_finite`` to
    skip such steps.

    Args:
        compressor: :math:`C`.
        residual: :math:`Q`, a codec or one of ``"affine4"``, ``"float32"``, ``"bfloat16"``.
        alpha: the share of the residual that goes straight to the parameters each step, past
            the preconditioner of a window and in gradient units, and leaves the residual; with
            :func:`to_dense` it goes into the link behind as all else. The released MicroAdam
            offers it for pre-training. None switches it off.
        seed: of stochastic rounding, which draws from the seed, the step and the leaf's path.

    Returns:
        The transformation. Its state takes 0.53 bytes per parameter with the default codec.

    Raises:
        TypeError: if ``compressor`` or ``residual`` is of another class; in ``init``, if a leaf is
            not a floating-point array.
        ValueError: if ``residual`` is an unknown name or has no negative numbers, or ``alpha`` is
            outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import error_feedback, to_dense, top_k
        >>> one_of_two = top_k(count=1, min_size=0, min_row=0)
        >>> tx = optax.chain(error_feedback(one_of_two, residual="float32"), to_dense())
        >>> state = tx.init(jnp.zeros(2))
        >>> sent, state = tx.update(jnp.array([1.0, 3.0]), state)
        >>> print(sent)
        [0. 3.]
        >>> sent, state = tx.update(jnp.array([1.5, 1.0]), state)
        >>> print(sent)
        [2.5 0. ]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, lines 5 to 9.
    """
    require_compressor(compressor)
    codec = as_codec(residual)
    if not codec.signed:
        raise ValueError(
            f"The residual has both signs, which {codec.name} cannot hold; give a signed codec, "
            "such as 'affine4'."
        )
    if isinstance(alpha, int | float) and not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), or be None to switch it off; got {alpha}.")
    arrays = len(codec.Encoded._fields)
    carried_arrays = len(compressor.Carried._fields)

    def init(params: optax.Params) -> ErrorFeedbackState:
        setting("residual", codec)
        setting("compressor", compressor)
        announce_feedback()
        batch = scope().micro_batch

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, ...]:
            for text in compressor.remarks(path, parameter):
                remark(path, text)
            if batch is not None:
                batch.taken.append(path)
            if not compressor.keeps_dense(path, parameter):
                return tuple(codec.zeros(parameter))
            unused = [unused_state(parameter) for _ in range(arrays)]
            if batch is not None:
                unused[0] = state_zeros(parameter, parameter.shape, jnp.float32)
            return tuple(unused)

        residual = codec.Encoded(*map_with_path(zeros, arrays, params))
        carried = first_carried(compressor, params)
        return ErrorFeedbackState(jnp.zeros([], jnp.int32), residual, carried)

    def update(
        updates: optax.Updates,
        state: ErrorFeedbackState,
        params: optax.Params | None = None,
        *,
        defers: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorFeedbackState]:
        del extra_args
        implementation = scope().implementation_for("error_feedback")
        placed = scope().shardings_by_path(updates)
        batch = scope().micro_batch

        def send(
            path: KeyPath, gradient: jax.Array, target: jax.Array, *stored: jax.Array
        ) -> tuple[Any, ...] | Uncompressed:
            if compressor.keeps_dense(path, gradient):
                return gradient, *stored
            key = leaf_key(seed, state.count, path) if codec.needs_key else None
            if (
                isinstance(compressor, TopK)
                and alpha is None
                and not observing()
                and goes_by_rows(codec, gradient)
            ):
                layout = compressor.blocks.layout_of(gradient)
                feedback = TopKFeedback(compressor, codec, layout, implementation, placed.get(path))
                if not feedback.is_one_operation:
                    require_unnamed(implementation, path)
                return Uncompressed(feedback, gradient, stored, key, jnp.dtype(target.dtype))
            require_unnamed(implementation, path)
            residual, carried = stored[:arrays], stored[arrays:]
            owed = codec.decode(codec.Encoded(*residual), gradient.shape)
            accumulated = gradient.astype(jnp.float32) + owed
            sent = compressor.compress(accumulated, target.dtype, carried)
            rest = sent.rest_of(accumulated)
            left = codec.encode(rest, key)
            if observing():
                observe_feedback(path, accumulated, rest, codec.decode(left, gradient.shape))
            if alpha is not None:
                owed = codec.decode(left, gradient.shape)
                bypass = jnp.asarray(alpha, jnp.float32) * owed
                sent = dataclasses.replace(sent, bypass=bypass)
                left = codec.encode(owed - bypass, key)
            return sent, *left, *compressor.carry(sent, carried)

        def take_share(
            path: KeyPath, gradient: jax.Array, target: jax.Array, *stored: jax.Array
        ) -> tuple[Any, ...] | Uncompressed:
            if batch is None:
                return send(path, gradient, target, *stored)
            batch.taken.append(path)
            share = batch.share(gradient)
            if compressor.keeps_dense(path, gradient):
                total = stored[0] + share
                if batch.completes:
                    return total.astype(gradient.dtype), jnp.zeros_like(total), *stored[1:]
                return gradient, total, *stored[1:]
            if batch.completes:
                return send(path, share, target, *stored)
            residual, carried = stored[:arrays], stored[arrays:]
            key = batch.key(leaf_key(seed, state.count, path)) if codec.needs_key else None
            accumulated = share + codec.decode(codec.Encoded(*residual), gradient.shape)
            # Only so that the links that follow can be traced: their results are dropped.
            sent = compressor.compress(accumulated, target.dtype, carried)
            return sent, *codec.encode(accumulated, key), *carried

        targets = updates if params is None else params
        treedef, rows = rows_of(updates, targets, *state.residual, *state.carried)
        results = [take_share(*row) for row in rows]
        waiting = [one for one in results if isinstance(one, Uncompressed)]
        if defers and all(one.sends_few for one in waiting):
            together = iter([(one, *one.stored) for one in waiting])
        else:
            together = iter(compress_all(waiting))
        results = [next(together) if isinstance(one, Uncompressed) else one for one in results]
        sent, *kept = columns_of(treedef, results, 1 + arrays + carried_arrays)
        residual = codec.Encoded(*kept[:arrays])
        carried = compressor.Carried(*map(boxed_like, kept[arrays:], state.carried))
        count = state.count
        if batch is None or batch.completes:
            count = jnp.asarray(optax.safe_increment(count))
        return sent, ErrorFeedbackState(count, residual, carried)

    return transformation(init, update, alpha=alpha)
