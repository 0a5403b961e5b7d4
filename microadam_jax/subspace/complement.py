"""What is done with the part of a gradient that its subspace misses."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from microadam_jax.layout.view import ONE, WHOLE
from microadam_jax.subspace.basis import Basis
from microadam_jax.subspace.subspace import Arrays, Slots

NORM_EPS = 1e-8  # the papers' guard of a projected gradient of zeros


class Step(NamedTuple):
    """One step of the matrices of a parameter; all arrays are folded.

    Attributes:
        gradient: what was projected.
        low: its projection.
        scaled: what the inner transformation made of that.
        basis: the subspace.
        scale: of the update in it.
        lost: the momentum that the last change of the basis lost, as feedback counts it; None if
            nobody asked for it.
    """

    gradient: jax.Array
    low: jax.Array
    scaled: jax.Array
    basis: Basis
    scale: ArrayLike
    lost: jax.Array | None

    @property
    def inside(self) -> jax.Array:
        """The update in the subspace."""
        return jnp.asarray(self.scale, jnp.float32) * self.basis.back(self.scaled)

    @property
    def rest(self) -> jax.Array:
        """Returns the residual of the projection."""
        return self.gradient - self.basis.back(self.low)


class Complement(Protocol):
    """Handles the residual of a projection.

    Attributes:
        Kept: the NamedTuple of what is kept.
        feeds_back: whether the first array kept is added to the next gradient.
        uses_rest: whether :math:`G - P P^T G` plays a role, which takes a projection.
    """

    Kept: ClassVar[type]
    feeds_back: ClassVar[bool]
    uses_rest: ClassVar[bool]

    @property
    def layouts(self) -> Slots:
        """Returns the layout and dtype of each array of ``Kept``."""
        ...

    @property
    def needs_b1(self) -> bool:
        """Returns True if the decay rate of the first moment plays a role."""
        ...

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the whole update, and what is kept for the next one; folded."""
        ...


class _NothingKept(NamedTuple):
    """Nothing is kept of the rest."""


class _NoFeedback:
    Kept: ClassVar[type] = _NothingKept
    feeds_back: ClassVar[bool] = False
    uses_rest: ClassVar[bool] = True
    needs_b1 = False
    layouts: Slots = ()


@dataclasses.dataclass(frozen=True)
class Discard(_NoFeedback):
    r"""Drops the rest, as GaLore does: the update is :math:`\alpha P N`."""

    uses_rest: ClassVar[bool] = False

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the update in the subspace alone."""
        return step.inside, kept


@dataclasses.dataclass(frozen=True)
class RawRest(_NoFeedback):
    r"""Takes the rest as it is: the update is :math:`\alpha P N + w (G - P P^T G)`.

    Args:
        weight: :math:`w`, between a unit of the inner transformation and one of the gradient.
    """

    weight: ArrayLike = 1.0

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the rest added; a single product takes both ways back."""
        weight, scale = jnp.float32(self.weight), jnp.float32(step.scale)
        back = step.basis.back(scale * step.scaled - weight * step.low)
        return weight * step.gradient + back, kept


@dataclasses.dataclass(frozen=True)
class SignOfRest(_NoFeedback):
    r"""Takes the sign of the rest.

    The update is :math:`\alpha P N + w \, \mathrm{sign}(G - P P^T G)`.

    Args:
        weight: :math:`w`; FRUGAL's is 1, and 0.1 to fine-tune.
    """

    weight: ArrayLike = 1.0

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the sign added."""
        return step.inside + jnp.asarray(self.weight, jnp.float32) * jnp.sign(step.rest), kept


class PreviousNorm(NamedTuple):
    """Keeps what a limiter compares with.

    Attributes:
        previous_norm: float32, the norm of the last limited update of each matrix.
    """

    previous_norm: Any


@dataclasses.dataclass(frozen=True)
class _Limited(_NoFeedback):
    growth: float = 1.01
    Kept: ClassVar[type] = PreviousNorm
    layouts = ((ONE, jnp.float32),)  # one number for each matrix

    def _limit(self, x: jax.Array, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """``x``, no longer than ``growth`` times the one before, if that was not zero."""
        (previous,) = kept
        norm = _norm(x, (-2, -1))
        limit = self.growth * previous
        shrink = jnp.where((previous > 0) & (norm > limit), limit / norm, 1.0)
        return shrink * x, (shrink * norm,)


@dataclasses.dataclass(frozen=True)
class NormMatchedRest(_Limited):
    r"""Scales the rest as the subspace was scaled, as Fira does.

    With :math:`\phi_j = \lVert N_j \rVert / (\lVert R_j \rVert + 10^{-8})` for each column of
    :math:`R = P^T G`,

    .. math::

        S = \phi \circ (G - \alpha P R), \qquad \text{update} = \alpha P N + S ,

    where :math:`S` is shortened to ``growth`` times its last length if it is longer than that.
    Note that :math:`\alpha` stands in the rest too. The inner transformation must not multiply
    by a learning rate.

    Args:
        growth: how much longer it may become in a step.
    """

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the scaled rest added."""
        scale = jnp.asarray(step.scale, jnp.float32)
        rest = step.gradient - scale * step.basis.back(step.low)
        limited, kept = self._limit(_growth(step, (-2,)) * rest, kept)
        return step.inside + limited, kept


@dataclasses.dataclass(frozen=True)
class ScaledGradient(_Limited):
    r"""Scales the whole gradient as the subspace was scaled, as APOLLO does.

    With :math:`\phi_j = \lVert N_j \rVert / (\lVert R_j \rVert + 10^{-8})` for each column of
    :math:`R = P^T G`, or one for the whole matrix, the update is
    :math:`\alpha\,\phi \circ G`, of which :math:`\phi \circ G` is shortened to ``growth`` times its
    last length if it is longer than that. The inner transformation must not multiply by a
    learning rate.

    Args:
        growth: how much longer it may become in a step.
        whole: whether there is one :math:`\phi` for the whole matrix.
    """

    whole: bool = False
    uses_rest: ClassVar[bool] = False

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the scaled gradient alone."""
        phi = _growth(step, (-2, -1) if self.whole else (-2,))
        limited, kept = self._limit(phi * step.gradient, kept)
        return jnp.asarray(step.scale, jnp.float32) * limited, kept


class Residual(NamedTuple):
    """Keeps the residual.

    Attributes:
        residual: of the parameter's shape.
    """

    residual: Any


@dataclasses.dataclass(frozen=True)
class FeedBack:
    r"""Adds the rest to the next gradient: error feedback.

    With the accumulated gradient :math:`a = G + E`, the update is :math:`\alpha P N`, and

    .. math::

        E \leftarrow a - P P^T a + \frac{\beta_1}{1 - \beta_1}
            (P_{old} m - P P^T P_{old} m) ,

    whose last term is the part of the first moment that a new basis loses. It is LDAdam's
    generalised error feedback; the moment is the uncorrected one from before the step.

    Args:
        momentum: whether that term is there.
        dtype: in which :math:`E` is kept; it takes as much memory as the parameter.

    Raises:
        TypeError: if ``dtype`` is not a dtype.
        ValueError: if ``dtype`` is not a floating dtype.
    """

    momentum: bool = True
    dtype: str = "float32"
    Kept: ClassVar[type] = Residual
    feeds_back: ClassVar[bool] = True
    uses_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the dtype."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                "FeedBack.dtype must be a floating dtype such as 'float32' or 'bfloat16'; got "
                f"{self.dtype!r}."
            )

    @property
    def layouts(self) -> Slots:
        """Returns one array of the parameter's shape."""
        return ((WHOLE, jnp.dtype(self.dtype)),)

    @property
    def needs_b1(self) -> bool:
        """Returns True for the momentum only."""
        return self.momentum

    def combine(self, step: Step, kept: Arrays) -> tuple[jax.Array, Arrays]:
        """Returns the update in the subspace, and the rest for the next step."""
        del kept
        rest = step.rest if step.lost is None else step.rest + step.lost
        return step.inside, (rest,)


def _growth(step: Step, axes: tuple[int, ...]) -> jax.Array:
    return _norm(step.scaled, axes) / (_norm(step.low, axes) + NORM_EPS)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
