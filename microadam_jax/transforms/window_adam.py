"""Adam statistics of a sliding window of sparse gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.compressors import BlockSparse, TopK, is_compressed, require_compressor, top_k
from microadam_jax.engine.descent import finishes, read_by
from microadam_jax.engine.top_k_feedback import Uncompressed
from microadam_jax.engine.transformation import transformation
from microadam_jax.engine.window_step import WindowStep, WindowSteps
from microadam_jax.execution import scope
from microadam_jax.state_arrays import state_zeros, unused_state
from microadam_jax.state_format import setting
from microadam_jax.transforms.moments import moving_average, one_minus_power, power
from microadam_jax.transforms.window import Window, as_window
from microadam_jax.trees import KeyPath, columns_of, map_with_path, path_name, rows_of


class ScaleByWindowAdamState(NamedTuple):
    """Holds the latest sparse gradients; Adam's two moments for leaves that are kept dense.

    Attributes:
        count: int32 scalar, steps taken. Step ``t`` lies in row ``(t - 1) % length``.
        window_values: ``(*lead, blocks, length, k)`` in the window's dtype for each compressed
            leaf; ``(*shape, 2)`` float32, first and second moment, for each dense one.
        window_indices: ``(*lead, blocks, length, k)`` uint8 or int16 for each compressed leaf;
            unused for each dense one.
    """

    count: jax.Array
    window_values: Any
    window_indices: Any


def scale_by_window_adam(
    compressor: TopK = top_k(),
    window: Window | int = Window(),
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales sparse updates by Adam statistics recomputed from a window of them.

    With :math:`c_{t-r}` the sparse gradient of age :math:`r` and the window's length :math:`m`,

    .. math::

        \hat m_t &= \frac{1 - \beta_1}{1 - \beta_1^t}
            \sum_{r=0}^{\min(t, m) - 1} \beta_1^r \, c_{t-r} \\
        \hat v_t &= \frac{1 - \beta_2}{1 - \beta_2^t}
            \sum_{r=0}^{\min(t, m) - 1} \beta_2^r \, c_{t-r}^2 \\
        u_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    Elements absent from the window get :math:`u_t = 0`. No dense moment is kept. Leaves that
    the compressor keeps dense get ordinary bias-corrected Adam in float32. What bypasses the
    preconditioner (``alpha`` of :func:`error_feedback`) is added to :math:`u_t`.

    Args:
        compressor: the one that made the updates; it determines the shape of the state.
        window: :math:`m`, or a :class:`Window` with its options. Under
            ``optax.inject_hyperparams`` give a :class:`Window`, because a bare number would
            become a traced array.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.

    Returns:
        The transformation. Its state takes 0.35 bytes per parameter by default.

    Raises:
        TypeError: if the window's length is a traced array, a part is of another class, or a number
            is an array in fewer bits than float32; in ``init``, if a leaf is not a floating-point
            array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or the window's length
            is not positive; in ``update``, if an update was not made by ``compressor``.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import compress, scale_by_window_adam, top_k
        >>> one_of_two = top_k(count=1, min_size=0, min_row=0)
        >>> tx = optax.chain(compress(one_of_two), scale_by_window_adam(one_of_two))
        >>> updates, _ = tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(3))
        [ 0. -1.]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, lines 10 and 11, and AdamStats.
    """
    require_compressor(compressor)
    window = as_window(window)

    def init(params: optax.Params) -> ScaleByWindowAdamState:
        setting("window", f"{window.length} in {window.dtype}")

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, jax.Array]:
            if compressor.keeps_dense(path, parameter):
                moments = state_zeros(parameter, (*parameter.shape, 2), jnp.float32)
                return moments, unused_state(parameter)
            return compressor.window(path, parameter, window.length, window.dtype)

        return ScaleByWindowAdamState(jnp.zeros([], jnp.int32), *map_with_path(zeros, 2, params))

    def update(
        updates: optax.Updates,
        state: ScaleByWindowAdamState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByWindowAdamState]:
        del extra_args
        implementation = scope().implementation_for("scale_by_window_adam")
        placed = scope().shardings_by_path(updates, is_compressed)
        count = jnp.asarray(optax.safe_increment(state.count))
        newest = state.count % window.length
        # Rows that no step has filled yet hold zeros, so their ages do not matter.
        age = (newest - jnp.arange(window.length)) % window.length
        horizon = jnp.minimum(count, window.length) if window.normalized else count
        mu_weights = jnp.float32(1 - b1) * power(b1, age) / one_minus_power(b1, horizon)
        nu_weights = jnp.float32(1 - b2) * power(b2, age) / one_minus_power(b2, horizon)
        steps = WindowSteps((mu_weights, nu_weights, eps), newest, implementation)

        def dense(
            gradient: jax.Array,
            target: jax.Array,
            finish: Callable[..., jax.Array],
            moments: jax.Array,
            unused: jax.Array,
        ) -> tuple[jax.Array, ...]:
            gradient = gradient.astype(jnp.float32)
            mu = moving_average(b1, moments[..., 0], gradient)
            nu = moving_average(b2, moments[..., 1], jnp.square(gradient))
            mu_hat, nu_hat = mu / one_minus_power(b1, count), nu / one_minus_power(b2, count)
            scaled = (mu_hat / (jnp.sqrt(nu_hat) + eps)).astype(target.dtype)
            moved = finish(scaled, *read_by(finish, target))
            return moved, jnp.stack([mu, nu], axis=-1), unused

        def scale(
            path: KeyPath,
            sent: Any,
            target: Any,
            finish: Callable[..., jax.Array],
            values: jax.Array,
            indices: jax.Array,
        ) -> tuple[jax.Array, ...] | WindowStep:
            if isinstance(sent, BlockSparse | Uncompressed):
                if not sent.fits((values, indices)):
                    raise ValueError(
                        f"The update of {path_name(path)!r} keeps {sent.survivors} elements "
                        f"in blocks of {sent.layout.size}, but this window was made for "
                        f"{compressor}. Give the same compressor to both links."
                    )
                return steps.of(sent, target, finish, (values, indices), placed.get(path))
            if not is_compressed(sent) and compressor.keeps_dense(path, sent):
                return dense(sent, target, finish, values, indices)
            kind = "low-rank" if is_compressed(sent) else "dense"
            raise ValueError(
                f"scale_by_window_adam got a {kind} update for {path_name(path)!r}. Put "
                "error_feedback(compressor) or compress(compressor) before it in the chain, "
                "with the same Top-K compressor."
            )

        targets = updates if params is None else params
        treedef, rows = rows_of(
            updates,
            targets,
            finishes(finish, targets),
            state.window_values,
            state.window_indices,
            is_leaf=is_compressed,
        )
        results = steps.taken([scale(*row) for row in rows])
        scaled, values, indices = columns_of(treedef, results, 3)
        return scaled, ScaleByWindowAdamState(count, values, indices)

    return transformation(init, update, warns_as="scale_by_window_adam", b1=b1, b2=b2, eps=eps)
