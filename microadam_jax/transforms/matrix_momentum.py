"""Directions of matrices: a momentum that a function of whole matrices turns into an update."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.arguments import require_kind
from microadam_jax.codecs import Codec, Storage, Unstored
from microadam_jax.engine.descent import as_it_is, finishes, read_by
from microadam_jax.engine.leaf_loops import each_kind, layer_by_layer
from microadam_jax.engine.leafwise import Arrays, Leaf, leafwise
from microadam_jax.engine.transformation import transformation
from microadam_jax.layout.axes import require_shape
from microadam_jax.layout.matrices import Assigned, Matrices
from microadam_jax.layout.partition import remark_assignment, warn_unnamed
from microadam_jax.layout.view import WHOLE
from microadam_jax.state_arrays import unused_factor
from microadam_jax.transforms.moments import (
    BlockMoments,
    moving_average,
    one_minus_power,
    over_root,
)
from microadam_jax.trees import KeyPath, map_with_path


class MatrixMomentumState(NamedTuple):
    """Holds a momentum for each parameter, and second moments for what is no matrix.

    Attributes:
        count: int32 scalar, steps taken.
        mu: momenta of the parameters' shapes, in float32 or as ``mu_codec`` stores them; those of
            what is no matrix over the root of ``nu``.
        nu: float32 second moments of Adam-mini's blocks; a single byte for a matrix.
    """

    count: jax.Array
    mu: Any
    nu: Any


class Direction(NamedTuple):
    """Turns the momentum of a matrix into its update.

    Attributes:
        of: from matrices ``(..., rows, columns)`` in float32 and ``eps`` to others of that shape.
        size: from rows and columns to the number that brings these to a root mean square of 1.
        gathered: True if a device needs whole matrices for it.
    """

    of: Callable[[jax.Array, ArrayLike], jax.Array]
    size: Callable[[int, int], float]
    gathered: bool


def matrix_momentum(
    direction: Direction,
    *,
    name: str,
    beta: ArrayLike,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    consistent_rms: ArrayLike,
    matrices: Matrices,
    mu_codec: Storage | Codec | str | None,
    seed: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves matrices along a function of Nesterov's momentum, and all others as Adam-mini does.

    With a direction :math:`D` and the number :math:`s` that brings it to a root mean square of 1,

    .. math::

        m_t &= \beta m_{t-1} + (1 - \beta)\, g_t \\
        n_t &= \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t} \\
        u_t &= c\, s\, D(n_t)

    The layers of a stack are matrices of their own and go one after another, so that only one of
    them has temporaries.

    Args:
        direction: :math:`D` and :math:`s`.
        name: of the transformation, for warnings.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: given to :math:`D`, and Adam-mini's.
        consistent_rms: :math:`c`, the root mean square of a matrix's update.
        matrices: which parameters are matrices.
        mu_codec: stores :math:`m` in few bits; None keeps it in float32.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation.

    Raises:
        TypeError: if a number is an array in fewer bits than float32.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` has no
            negative numbers; in ``update``, if the state was made for other matrices or stored
            otherwise.
    """
    require_kind(Matrices, matrices=matrices)
    storage = Unstored() if mu_codec is None else over_root(mu_codec)
    others = BlockMoments(b1, b2, eps, relative=mu_codec is not None)

    def init(leaf: Leaf) -> tuple[jax.Array]:
        if leaf.layout.view is not None:
            return (unused_factor(leaf.value),)
        remark_assignment(leaf.path, leaf.layout.assignment)
        return (leaf.zeros(leaf.layout.assignment.sharing.moment_shape),)

    def inspect(leaves: list[Leaf]) -> None:
        alone = [leaf.layout.assignment for leaf in leaves if leaf.layout.view is None]
        argument = "matrices=Matrices(exclude=OUTPUT_HEAD, partition={})"
        warn_unnamed(name, [(assignment, assignment.bytes) for assignment in alone], argument)

    def reduce(leaf: Leaf, nu: jax.Array) -> tuple[Arrays, Arrays]:
        if leaf.layout.view is not None:
            require_shape(leaf.path, nu, (1,) * leaf.value.ndim)
            return (nu,), ()
        return others.reduce(leaf, leaf.layout.assignment.sharing, nu)

    def rule(t: jax.Array, g: jax.Array, mu: jax.Array, *roots: jax.Array) -> Arrays:
        if roots:
            return others.rule(t, g, mu, *roots)
        mu = moving_average(beta, mu, g)
        ahead = mu / one_minus_power(beta, t + 1)
        return moving_average(beta, ahead, g / one_minus_power(beta, t)), mu

    momentum = leafwise(
        MatrixMomentumState,
        {"mu": storage},
        rule,
        init,
        reduce,
        matrices.assign_leaves,
        inspect=inspect,
        hyperparams={"beta": beta, "b1": b1, "b2": b2, "eps": eps},
        seed=seed,
    )

    def update(
        updates: optax.Updates,
        state: MatrixMomentumState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MatrixMomentumState]:
        seen = matrices.assign(updates)
        targets = updates if params is None else params
        ends = finishes(finish, targets)

        def of_others(path: KeyPath, g: jax.Array, end: Any) -> tuple[Any]:
            del g
            return (end if seen[path].view is None else as_it_is,)

        (early,) = map_with_path(of_others, 1, updates, ends)
        found: Any = momentum.update(updates, state, params, finish=lambda _: early, **extra_args)
        moved, state = found
        kinds, leaves = [], []
        for path, n in jax.tree.leaves_with_path(moved):
            assigned = seen[path]
            if assigned.view is not None:
                static = _Matrix(assigned, direction, eps, jnp.float32(consistent_rms))
                kinds.append((assigned.view, assigned.assignment.layer_axis, jax.typeof(n)))
                leaves.append((static, n))
        turned = iter(each_kind(_Matrix.turned, kinds, leaves))

        def scale(path: KeyPath, u: jax.Array, target: jax.Array, end: Any) -> tuple[jax.Array]:
            if seen[path].view is None:
                return (u,)
            u = next(turned).astype(target.dtype)
            return (end(u, *read_by(end, target)),)

        (scaled,) = map_with_path(scale, 1, moved, targets, ends)
        return scaled, state

    return transformation(momentum.init, update, consistent_rms=consistent_rms)


class _Matrix(NamedTuple):
    """A parameter of one matrix or several.

    Attributes:
        assigned: its axes.
        direction: of the update.
        eps: given to it.
        size: the root mean square of the update.
    """

    assigned: Assigned
    direction: Direction
    eps: ArrayLike
    size: jax.Array

    def turned(self, x: jax.Array) -> jax.Array:
        """The updates of the matrices of ``x``, layer by layer in the place of ``x``."""
        return layer_by_layer(self._of, x, self.assigned.assignment.layer_axis)

    def _of(self, x: jax.Array) -> jax.Array:
        assert self.assigned.view is not None
        view = dataclasses.replace(self.assigned.view, shape=x.shape)
        folded = view.fold(x.astype(jnp.float32), gathered=self.direction.gathered)
        u = (
            self.size
            * self.direction.size(view.rows, view.columns)
            * self.direction.of(folded, self.eps)
        )
        return view.unfold(u, WHOLE, x).astype(x.dtype)
