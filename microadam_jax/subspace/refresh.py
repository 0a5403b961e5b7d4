"""When a subspace is found anew, and what becomes of the moments in it."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from microadam_jax.arguments import require_positive
from microadam_jax.subspace.basis import PRECISION

MOMENTS = ("keep", "reset", "rotate_first", "rotate", "released")


@dataclasses.dataclass(frozen=True)
class Refresh:
    r"""Says when a new basis is computed, and what becomes of the moments in the old one.

    A gradient of zeros finds no basis in its place: the old one stays, and without one the first
    gradient that is not zero finds it, whenever it comes.

    Args:
        every: :math:`T`, the number of steps between two bases; 1 for a new one in every step.
        first: the published ways to count. 0: with the 0-based step, 0, T, 2T and so on. 1: with
            the 1-based step, 1, T, 2T and so on, so that the first interval is one step shorter.
            None, as of ``moments`` and ``momentum_share``: what the method publishes; in
            :func:`project_gradients` 0, ``"keep"`` and 0.
        stagger: spreads the refreshes of different parameters over the interval, so that no step
            has to do all of them. The first step finds every basis in any case.
        moments: ``"keep"``, as they are, whatever they mean in the new basis. ``"reset"``, to
            where they started; a count that all parameters share goes on, so that only the bias
            correction of :func:`scale_by_restartable_adam` starts anew with them.
            ``"rotate_first"``: the first moment becomes :math:`P^T P_{old} m`. ``"rotate"``: both
            follow, by LDAdam's rule; see :func:`project_gradients`. ``"released"`` is what the
            code of :func:`subspace_momentum`'s authors does in place of a reset: old numbers are
            used in the new basis once more, and the step after starts from zeros. Results then
            depend on the signs of singular vectors.
        momentum_share: :math:`\rho` in the matrix that the new basis is found for,
            :math:`\rho P_{old} \hat m + (1 - \rho) G`; 0: the gradient.

    Raises:
        ValueError: if ``every`` is not a positive integer, ``first`` or ``moments`` is not one of
            those, or ``momentum_share`` is outside [0, 1].
    """

    every: int = 200
    first: Literal[0, 1] | None = None
    stagger: bool = False
    moments: Literal["keep", "reset", "rotate_first", "rotate", "released"] | None = None
    momentum_share: float | None = None

    def __post_init__(self) -> None:
        name = "The update interval of a subspace, Refresh.every,"
        require_positive(name, self.every, "update_interval")
        if self.first not in (0, 1, None):
            raise ValueError(
                "Refresh.first must be 0 or 1, or None for the method's own count; "
                f"got {self.first!r}."
            )
        if self.moments not in (*MOMENTS, None):
            raise ValueError(
                f"Refresh.moments must be one of {MOMENTS}, or None for the method's own; "
                f"got {self.moments!r}."
            )
        if self.momentum_share is not None and not 0 <= self.momentum_share <= 1:
            raise ValueError(
                "Refresh.momentum_share must lie in [0, 1], or be None for the method's own; "
                f"got {self.momentum_share!r}."
            )

    @property
    def needs_decay_rates(self) -> bool:
        """Returns True if a bias has to be corrected."""
        return self.moments == "rotate" or bool(self.momentum_share)

    @property
    def restarts(self) -> bool:
        """Returns True if moments begin anew in a new basis."""
        return self.moments in ("reset", "released")

    @property
    def rotates(self) -> bool:
        """Returns True if moments follow a new basis."""
        return self.moments in ("rotate_first", "rotate")

    def completed(self, published: "Refresh") -> "Refresh":
        """Returns these settings, and those of ``published`` for what is None."""
        own = {
            name: getattr(published, name)
            for name in ("first", "moments", "momentum_share")
            if getattr(self, name) is None
        }
        return dataclasses.replace(self, **own)

    def offset(self, index: int, total: int) -> int:
        """Returns by how many steps the parameter ``index`` of ``total`` is refreshed earlier."""
        return index * self.every // total if self.stagger else 0

    def due(self, count: jax.Array, offset: int) -> jax.Array:
        """Returns True if the step after ``count`` others finds a new basis."""
        return (count == 0) | (self._passed(count, offset) % self.every == 0)

    def epoch(self, count: jax.Array, offset: int) -> jax.Array:
        """Returns a number that is another one for each basis."""
        return self._passed(count, offset) // self.every

    def _passed(self, count: jax.Array, offset: int) -> jax.Array:
        assert self.first is not None
        return count + self.first + offset


def refresh_every(update_interval: int | Refresh, published: Refresh) -> Refresh:
    """Returns ``published`` with this many steps between two bases, or with what is not None there.

    Raises:
        ValueError: if it is neither a positive integer nor a :class:`Refresh`.
    """
    if isinstance(update_interval, Refresh):
        return update_interval.completed(published)
    return dataclasses.replace(published, every=update_interval)


def rotate_first(overlap: jax.Array, mu: jax.Array) -> jax.Array:
    r"""The first moment in the new basis, :math:`Q m` with :math:`Q = P^T P_{old}`."""
    return jnp.matmul(overlap, mu, precision=PRECISION)


def rotate_second(
    overlap: jax.Array, mu: jax.Array, nu: jax.Array, c1: jax.Array, c2: jax.Array
) -> jax.Array:
    r"""The second moment in the new basis, by LDAdam's rule.

    .. math::

        v \leftarrow c_2 \left| (Q \circ Q) \left( \frac{v}{c_2} - \frac{m^2}{c_1^2} \right)
            + \frac{(Q m)^2}{c_1^2} \right|

    Variances are mapped by squared coefficients, as if coordinates were independent, and the mean
    is put back.

    Args:
        overlap: :math:`Q = P^T P_{old}`.
        mu: :math:`m`, in the old basis.
        nu: :math:`v`, in the old basis.
        c1: the bias correction of :math:`m`, :math:`1 - \beta_1^k` after :math:`k` steps.
        c2: that of :math:`v`.
    """
    variance = nu / c2 - jnp.square(mu / c1)
    moved = jnp.matmul(jnp.square(overlap), variance, precision=PRECISION)
    return c2 * jnp.abs(moved + jnp.square(rotate_first(overlap, mu) / c1))


def begun_anew(
    inner: optax.GradientTransformation, inner_state: Any, begins: Any, low: optax.Updates
) -> Any:
    """The state of ``inner``, as it was at first for the matrices that ``begins`` marks.

    Args:
        inner: updates ``low``.
        inner_state: its state.
        begins: for each of ``low`` an array of its rank, with a mark for each matrix.
        low: projected gradients.
    """
    fresh = inner.init(jax.tree.map(jnp.zeros_like, low))
    marks = optax.tree_utils.tree_map_params(
        inner.init,
        lambda _, marks: marks,
        inner_state,
        begins,
        transform_non_params=lambda _: False,
    )
    leaves = zip(*map(jax.tree.leaves, (marks, fresh, inner_state)), strict=True)
    chosen = [
        old if marks is False else jnp.where(_of_shared(marks, old), new, old)
        for marks, new, old in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(inner_state), chosen)


def _of_shared(marks: jax.Array, x: jax.Array) -> jax.Array:
    """Marks the numbers of ``x`` that belong to marked matrices alone."""
    sizes = list(zip(marks.shape, x.shape, strict=False))
    if marks.ndim != x.ndim or any(m != n and 1 not in (m, n) for m, n in sizes):
        return jnp.all(marks)
    shared = [axis for axis, (m, n) in enumerate(sizes) if m != n == 1]
    return jnp.all(marks, axis=shared, keepdims=True)
