"""Adam with a second moment that is a product of rows and columns."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.boxes import boxed_like, boxed_moments
from microadam_jax.codecs import Codec, Storage, as_storage
from microadam_jax.partition import Partition, require_shape
from microadam_jax.sharding import moment_zeros, require_named
from microadam_jax.transforms.chunks import Arrays, Turns
from microadam_jax.transforms.descent import finishes, read_by, replaced_by
from microadam_jax.transforms.factors import factor_shapes, mean, sides
from microadam_jax.transforms.moments import moving_average, one_minus_power
from microadam_jax.transforms.stored_step import Kernels, Moment, stored_step
from microadam_jax.transforms.transformation import transformation
from microadam_jax.trees import KeyPath, leaf_key, map_with_path
from pallas_kernels.dispatch import check_implementation


class ScaleByFactoredAdamState(NamedTuple):
    """A first moment, and two factors of a second moment.

    Attributes:
        count: int32 scalar, steps taken.
        mu: what the codec makes of the first moments.
        nu_row: float32 squared gradients, averaged over the columns; the whole second moment of a
            parameter that is not factored.
        nu_col: float32 squared gradients, averaged over the rows.
    """

    count: jax.Array
    mu: Any
    nu_row: Any
    nu_col: Any


def scale_by_factored_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    mu_codec: Storage | Codec | str = "dynamic4",
    seed: ArrayLike = 0,
    implementation: str | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, with a factored second moment and a stored first one.

    With :math:`\langle\cdot\rangle_r` the mean over the columns, which leaves one number for
    each row, and :math:`\langle\cdot\rangle_c` the mean over the rows,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \langle g_t^2 \rangle_r, \quad
        c_t = \beta_2 c_{t-1} + (1 - \beta_2) \langle g_t^2 \rangle_c \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{r_t c_t / (\bar r_t (1 - \beta_2^t))} + \epsilon}

    Unlike in Adafactor, :math:`\beta_2` is constant, nothing is clipped, and nothing is added to
    the squares. Vectors keep a float32 second moment for each element.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        partition: which parameters are linear maps, and between which axes; None stands for
            ``Partition()``, the names of :func:`transformer_rules`. Others of two and more axes
            are factored along the last two.
        mu_codec: how :math:`m` is stored.
        seed: of a codec that rounds stochastically.
        implementation: of the step; see :func:`quantize_state`.
        shardings: where the parameters lie; see :func:`quantize_state`.

    Returns:
        The transformation. Its state takes 0.53 bytes per parameter and 4 for each row and column.

    Raises:
        ValueError: if a codec does not exist or has no negative numbers; in ``update``, if the
            state was made for another partition or through another codec.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_factored_adam
        >>> tx = scale_by_factored_adam()
        >>> state = tx.init({"kernel": jnp.zeros((512, 256))})
        >>> state.nu_row["kernel"].shape, state.nu_col["kernel"].shape
        ((512, 1), (1, 256))

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), "4-bit Factor".
    """
    partition = partition or Partition()
    storage = as_storage(mu_codec).signed("mu")
    check_implementation("scale_by_factored_adam", implementation)
    require_named(shardings)

    def init(params: optax.Params) -> ScaleByFactoredAdamState:
        assign = partition.assign(params)

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, ...]:
            shapes = factor_shapes(assign(path, parameter))
            return tuple(moment_zeros(parameter, shape, jnp.float32) for shape in shapes)

        nu = (boxed_moments(factor, params) for factor in map_with_path(zeros, 2, params))
        return ScaleByFactoredAdamState(jnp.zeros([], jnp.int32), storage.zeros(params), *nu)

    def update(
        updates: optax.Updates,
        state: ScaleByFactoredAdamState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByFactoredAdamState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        assign, codec_of = partition.assign(updates), storage.assign(updates)
        columns = storage.columns(state.mu, "mu")
        turns = Turns.over(updates, state.count)
        kernels = Kernels.choose(
            implementation, shardings, updates, lambda path, g: [codec_of(path, g)]
        )

        def scale(
            path: KeyPath,
            g: jax.Array,
            target: jax.Array,
            finish: Callable[..., jax.Array],
            nu_row: jax.Array,
            nu_col: jax.Array,
            *stored: jax.Array,
        ) -> tuple[jax.Array, ...]:
            assignment, codec = assign(path, g), codec_of(path, g)
            for moment, shape in zip((nu_row, nu_col), factor_shapes(assignment), strict=True):
                require_shape(path, moment, shape)
            storage.require(path, codec, stored, g)
            matrix = sides(assignment)
            rows, cols = matrix or ((), ())

            def mean_square(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
                return mean(jnp.square(g.astype(jnp.float32)), axes)

            # In one computation the squares would be written, to be read by both means.
            by_row = turns.alone(functools.partial(mean_square, axes=cols), g)
            nu_row = moving_average(b2, nu_row, by_row)
            row_root = jnp.sqrt(nu_row / one_minus_power(b2, count))
            col_root = jnp.ones_like(nu_col)
            if matrix is not None:
                by_col = turns.alone(functools.partial(mean_square, axes=rows), g)
                nu_col = moving_average(b2, nu_col, by_col)
                # Rows without any gradient have no mean to be divided by.
                whole = mean(nu_row, rows)
                col_root = jnp.sqrt(nu_col / jnp.where(whole > 0, whole, 1))

            def rule(moments: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
                g, row_root, col_root, *p = inputs
                mu = moving_average(b1, moments[0], g.astype(jnp.float32))
                scaled = mu / one_minus_power(b1, count) / (row_root * col_root + eps)
                return finish(scaled.astype(target.dtype), *p), (mu,)

            def key() -> jax.Array:
                return leaf_key(seed, state.count, path)

            scaled, (stored,) = stored_step(
                turns,
                rule,
                [Moment(storage, codec, stored, key)],
                (g, row_root, col_root, *read_by(finish, target)),
                path,
                replaces=replaced_by(finish),
                kernels=kernels,
            )
            return scaled, nu_row, nu_col, *stored

        targets = updates if params is None else params
        scaled, nu_row, nu_col, *stored = map_with_path(
            scale,
            3 + len(columns),
            updates,
            targets,
            finishes(finish, updates),
            state.nu_row,
            state.nu_col,
            *columns,
        )
        mu = storage.field([boxed_like(new, old) for new, old in zip(stored, columns, strict=True)])
        nu = boxed_like(nu_row, state.nu_row), boxed_like(nu_col, state.nu_col)
        return scaled, ScaleByFactoredAdamState(count, mu, *nu)

    return transformation(init, update, b1=b1, b2=b2, eps=eps)
