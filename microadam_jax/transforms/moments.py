"""Exponential moving averages and their bias correction, in float32."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.codecs import Codec, Storage, as_storage
from microadam_jax.engine.leafwise import Arrays, Leaf
from microadam_jax.layout.axes import Sharing, require_shape

FIRST_MOMENTS = ("mu", "trace")  # names of their fields in states


def over_root(codec: Storage | Codec | str) -> Storage:
    """Returns the storage of first moments that are divided by the root of the second.

    Raises:
        TypeError: if ``codec`` is none that :func:`as_storage` takes.
        ValueError: if it has no negative numbers, or its name is unknown.
    """
    return dataclasses.replace(as_storage(codec).signed("mu"), unit="root_nu")


def moment_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which a moment is kept.

    Raises:
        ValueError: if ``dtype`` is not a floating dtype.
    """
    try:
        if not isinstance(dtype, jax.Array) and jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:  # no dtype at all
        pass
    raise ValueError(
        f"mu_dtype must be a floating dtype such as 'float32' or 'bfloat16'; got {dtype!r}. Under "
        "optax.inject_hyperparams give its name, because a type is taken for a schedule there."
    )


def moving_average(decay: ArrayLike, average: jax.Array, new: jax.Array) -> jax.Array:
    r""":math:`\beta a + (1 - \beta) x`."""
    return jnp.float32(decay) * average.astype(jnp.float32) + jnp.float32(1 - decay) * new


def zero_moments(params: Any) -> tuple[Any, Any]:
    """Returns two trees of float32 zeros of the parameters' shapes."""

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), params)

    return zeros(), zeros()


def adam_moments(b1: ArrayLike, b2: ArrayLike, updates: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
    r"""Returns Adam's next moments, :math:`\beta_1 m + (1 - \beta_1) g` and that of :math:`g^2`."""
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    return (
        jax.tree.map(lambda g, m: moving_average(b1, m, g), wide, mu),
        jax.tree.map(lambda g, v: moving_average(b2, v, jnp.square(g)), wide, nu),
    )


def power(decay: ArrayLike, steps: jax.Array) -> jax.Array:
    r""":math:`\beta^t`."""
    return jnp.power(jnp.asarray(decay, jnp.float32), steps.astype(jnp.float32))


def one_minus_power(decay: ArrayLike, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t` with the digits that the subtraction loses in float32."""
    if isinstance(decay, int | float):
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log1p(jnp.asarray(decay, jnp.float32) - 1)
    return -jnp.expm1(log_decay * steps.astype(jnp.float32))


class BlockMoments(NamedTuple):
    r"""Steps along a first moment, over the root of what its block's second moment is.

    With the second moments :math:`v` of blocks,

    .. math::

        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} .

    A first moment in few bits is kept as :math:`\tilde m_t = m_t / \sqrt{v_t}`. Elements that share
    a scale are then of one size, whatever their gradients' are. Else the noise of rounding, which
    the largest of them decides, would be divided by the small :math:`\sqrt v` of others, such as
    the outputs of a head for rare tokens: their steps would be a hundred times AdamW's.

    Attributes:
        b1: :math:`\beta_1`.
        b2: :math:`\beta_2`.
        eps: :math:`\epsilon`.
        relative: whether first moments are kept over the root.
    """

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    relative: bool

    def reduce(self, leaf: Leaf, blocks: Sharing, nu: jax.Array) -> tuple[Arrays, Arrays]:
        """Returns the new second moments of a leaf, and what the rule reads of them."""
        squares = leaf.squares
        require_shape(leaf.path, nu, blocks.moment_shape)
        new = moving_average(self.b2, nu, blocks.mean(squares))
        if self.relative:
            before, after = root_of(nu, 0), root_of(new, 1)
            return (new,), (blocks.spread(before), blocks.spread(after))
        root = jnp.sqrt(new / one_minus_power(self.b2, leaf.t))
        return (new,), (blocks.spread(root) + self.eps,)

    def rule(self, t: jax.Array, g: jax.Array, mu: jax.Array, *roots: jax.Array) -> Arrays:
        """Returns the update and the new first moment of each element."""
        if not self.relative:
            mu = moving_average(self.b1, mu, g)
            return mu / one_minus_power(self.b1, t) / roots[0], mu
        before, after = roots
        mu = moving_average(self.b1, mu * before, g)
        root = after / jnp.sqrt(one_minus_power(self.b2, t)) + self.eps
        return mu / one_minus_power(self.b1, t) / root, mu / after


def root_of(nu: jax.Array, of_zero: int) -> jax.Array:
    """The root of a second moment, or ``of_zero`` where there has been no gradient yet.

    To divide by, 1; to multiply codes by, 0: they have the noise of rounding.
    """
    return jnp.where(nu < np.finfo(np.float32).tiny, of_zero, jnp.sqrt(nu))


def correction(b1: ArrayLike, b2: ArrayLike | None, t: jax.Array) -> jax.Array:
    r"""Returns :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`, or 1 for AdaGrad."""
    if b2 is None:
        return jnp.float32(1)
    return jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)
