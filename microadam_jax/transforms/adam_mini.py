"""Adam with one second moment for each block of parameters."""

from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.codecs import Codec, Storage, Unstored
from microadam_jax.engine.leafwise import Arrays, Leaf, leafwise
from microadam_jax.layout.partition import Partition, as_partition, remark_assignment, warn_unnamed
from microadam_jax.transforms.moments import BlockMoments, moment_dtype, over_root


class ScaleByAdamMiniState(NamedTuple):
    """Holds a first moment for each parameter and a second one for each block.

    Attributes:
        count: int32 scalar, steps taken.
        mu: first moments, of the parameters' shapes, in ``mu_dtype``; or what ``mu_codec`` makes of
            them over the roots of the second ones.
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
            :func:`transformer_rules`. Look at them with :func:`explain_partition`. A warning in
            ``init`` names what follows no rule and takes a second moment for each element.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32, because
            0.999 v rounds to v in bfloat16.
        mu_codec: stores :math:`m / \sqrt v` through a codec instead; see :func:`adam_mini4bit`.
            Large leaves are then updated a few rows at a time.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation. Its state takes 4 bytes per parameter, 2 with bfloat16, 0.53 with
        ``mu_codec="dynamic4"``.

    Raises:
        TypeError: if a number is an array in fewer bits than float32, or ``partition`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``mu_dtype`` is not a
            floating dtype, or ``mu_codec`` is an unknown name or has no negative numbers; in
            ``update``, if the state was made for another partition.

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
    partition = as_partition(partition)
    storage = Unstored(moment_dtype(mu_dtype)) if mu_codec is None else over_root(mu_codec)
    moments = BlockMoments(b1, b2, eps, relative=mu_codec is not None)

    def init(leaf: Leaf) -> tuple[jax.Array]:
        remark_assignment(leaf.path, leaf.layout)
        return (leaf.zeros(leaf.layout.sharing.moment_shape),)

    def inspect(leaves: list[Leaf]) -> None:
        warn_unnamed("scale_by_adam_mini", [(leaf.layout, leaf.layout.bytes) for leaf in leaves])

    def reduce(leaf: Leaf, nu: jax.Array) -> tuple[Arrays, Arrays]:
        return moments.reduce(leaf, leaf.layout.sharing, nu)

    return leafwise(
        ScaleByAdamMiniState,
        {"mu": storage},
        moments.rule,
        init,
        reduce,
        partition.assign_leaves,
        inspect=inspect,
        hyperparams={"b1": b1, "b2": b2, "eps": eps},
        seed=seed,
    )
