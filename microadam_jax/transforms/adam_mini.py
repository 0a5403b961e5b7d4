"""Adam with one second moment for each block of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.boxes import boxed_like, boxed_moments
from microadam_jax.codecs import Codec, Storage, Unstored, as_storage
from microadam_jax.partition import Partition, remark_assignment, require_shape
from microadam_jax.sharding import moment_zeros, require_named
from microadam_jax.transforms.chunks import Arrays, Turns
from microadam_jax.transforms.descent import finishes, read_by, replaced_by
from microadam_jax.transforms.moments import moment_dtype, moving_average, one_minus_power
from microadam_jax.transforms.stored_step import Kernels, Moment, stored_step
from microadam_jax.transforms.transformation import transformation
from microadam_jax.trees import KeyPath, leaf_key, map_with_path
from pallas_kernels.dispatch import check_implementation


class ScaleByAdamMiniState(NamedTuple):
    """A first moment for each parameter and a second one for each block.

    Attributes:
        count: int32 scalar, steps taken.
        mu: first moments, of the parameters' shapes, in ``mu_dtype``; or what ``mu_codec`` makes of
            them.
        nu: float32 second moments of the blocks, of the parameters' ranks: ``(1, out)`` for a
            dense kernel, ``(1, heads, 1)`` for a query, ``(tokens, 1)`` for an embedding.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_mini(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
    mu_codec: Storage | Codec | str | None = None,
    seed: ArrayLike = 0,
    implementation: str | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, with one second moment for each block of parameters.

    With :math:`B(i)` the block of parameter :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_{t,B} &= \beta_2 v_{t-1,B} + (1 - \beta_2)\,
            \frac{1}{|B|} \sum_{i \in B} g_{t,i}^2 \\
        u_{t,i} &= \frac{m_{t,i} / (1 - \beta_1^t)}
            {\sqrt{v_{t,B(i)} / (1 - \beta_2^t)} + \epsilon}

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        partition: what the blocks are; None stands for ``Partition()``, the names of
            :func:`transformer_rules`. Look at them with :func:`explain_partition`.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32, because
            0.999 v rounds to v in bfloat16.
        mu_codec: stores :math:`m` through a codec instead; see :func:`quantize_state`. Large
            leaves are then updated a few rows at a time.
        seed: of a codec that rounds stochastically.
        implementation: of the step with ``mu_codec``; see :func:`quantize_state`.
        shardings: where the parameters lie; see :func:`quantize_state`.

    Returns:
        The transformation. Its state takes 4 bytes per parameter, 2 with bfloat16, 0.53 with
        ``mu_codec="dynamic4"``.

    Raises:
        ValueError: if ``mu_dtype`` is no floating dtype or ``mu_codec`` has no negative numbers;
            in ``update``, if the state was made for another partition.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_adam_mini
        >>> params = {"mlp": {"kernel": jnp.zeros((3, 2))}}  # from 3 inputs to 2 outputs
        >>> tx = scale_by_adam_mini()
        >>> state = tx.init(params)
        >>> state.nu["mlp"]["kernel"].shape
        (1, 2)
        >>> grads = {"mlp": {"kernel": jnp.array([[1.0, 0.1], [2.0, 0.1], [2.0, 0.1]])}}
        >>> updates, state = tx.update(grads, state)
        >>> with jnp.printoptions(precision=2):  # each output's gradient over its RMS
        ...     print(updates["mlp"]["kernel"])
        [[0.58 1.  ]
         [1.15 1.  ]
         [1.15 1.  ]]

    Reference: Adam-mini (arXiv 2406.16793), Algorithm 1.
    """
    partition = partition or Partition()
    storage = (
        Unstored(moment_dtype(mu_dtype)) if mu_codec is None else as_storage(mu_codec).signed("mu")
    )
    check_implementation("scale_by_adam_mini", implementation)
    require_named(shardings)

    def init(params: optax.Params) -> ScaleByAdamMiniState:
        assign = partition.assign(params)

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array]:
            assignment = assign(path, parameter)
            remark_assignment(path, assignment)
            return (moment_zeros(parameter, assignment.sharing.moment_shape, jnp.float32),)

        (nu,) = map_with_path(zeros, 1, params)
        count = jnp.zeros([], jnp.int32)
        return ScaleByAdamMiniState(count, storage.zeros(params), boxed_moments(nu, params))

    def update(
        updates: optax.Updates,
        state: ScaleByAdamMiniState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdamMiniState]:
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
            nu: jax.Array,
            *stored: jax.Array,
        ) -> tuple[jax.Array, ...]:
            sharing, codec = assign(path, g).sharing, codec_of(path, g)
            require_shape(path, nu, sharing.moment_shape)
            storage.require(path, codec, stored, g)
            squares = jnp.square(g.astype(jnp.float32))
            nu = moving_average(b2, nu, sharing.mean(squares))
            root = sharing.spread(jnp.sqrt(nu / one_minus_power(b2, count))) + eps

            def rule(moments: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
                g, root, *p = inputs
                mu = moving_average(b1, moments[0], g.astype(jnp.float32))
                scaled = (mu / one_minus_power(b1, count) / root).astype(target.dtype)
                return finish(scaled, *p), (mu,)

            def key() -> jax.Array:
                return leaf_key(seed, state.count, path)

            inputs = (g, root, *read_by(finish, target))
            if mu_codec is None:  # nothing is decoded, and the compiler fuses the step
                scaled, (mu,) = rule(stored, inputs)
                return scaled, nu, mu.astype(stored[0].dtype)
            scaled, (stored,) = stored_step(
                turns,
                rule,
                [Moment(storage, codec, stored, key)],
                inputs,
                path,
                replaces=replaced_by(finish),
                kernels=kernels,
            )
            return scaled, nu, *stored

        targets = updates if params is None else params
        scaled, nu, *stored = map_with_path(
            scale,
            2 + len(columns),
            updates,
            targets,
            finishes(finish, updates),
            state.nu,
            *columns,
        )
        mu = storage.field([boxed_like(new, old) for new, old in zip(stored, columns, strict=True)])
        return scaled, ScaleByAdamMiniState(count, mu, boxed_like(nu, state.nu))

    return transformation(init, update, b1=b1, b2=b2, eps=eps)
