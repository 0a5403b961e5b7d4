"""Assigns elements of a parameter to subsets that share a norm."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from microadam_jax.layout.axes import AxisBlocks, Sharing, Sides, elementwise
from microadam_jax.layout.partition import Assignment
from microadam_jax.layout.stacks import one_layer
from microadam_jax.sharding import whole_where_uneven
from microadam_jax.trees import Shape


@dataclasses.dataclass(frozen=True)
class Subsets:
    r"""Assigns elements of a parameter to subsets that share a norm.

    Args:
        rule: ``"larger"``, the recommended one: of a linear map, one subset for each index of
            its larger side, for each output if it is square; what is no linear map shares
            nothing. Or ``"runs"``: consecutive elements of any parameter.
        size: of a run; if negative, :math:`\sqrt d / |\mathrm{size}|` in a parameter of
            :math:`d` elements. It is reduced to the next divisor of :math:`d`. Runs are
            cut from the parameter as it lies: a kernel ``(in, out)`` has others than torch's
            ``(out, in)``. Where its shards are no whole runs, the step gathers its gradient.
        reduction: ``"sum"`` of the squares in a subset, as published, or their ``"mean"``. The
            sum makes steps smaller by the root of the subset's size, and the best learning
            rate about ten times Adam's.

    Raises:
        ValueError: if ``rule`` or ``reduction`` is not one of those, or ``size`` is 0 or not an
            integer.
    """

    rule: Literal["larger", "runs"] = "larger"
    size: int = -2
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.rule not in ("larger", "runs"):
            raise ValueError(f"Subsets.rule must be 'larger' or 'runs'; got {self.rule!r}.")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"Subsets.reduction must be 'sum' or 'mean'; got {self.reduction!r}.")
        if not isinstance(self.size, int) or self.size == 0:
            raise ValueError(
                "Subsets.size must be a whole number but 0, negative for a part of the root; got "
                f"{self.size!r}."
            )

    def of(self, assignment: Assignment) -> Sharing:
        """Returns the subsets of the parameter that ``assignment`` is about."""
        shape = assignment.shape
        if self.rule == "larger":
            return _larger_side(shape, assignment.sharing.matrix)
        if not math.prod(shape):
            return elementwise(shape)
        return _runs(shape, assignment.layer_axis, self.size)


@dataclasses.dataclass(frozen=True)
class RunBlocks:
    """Describes segments of a row-major parameter, or of each layer of a stack, within rows.

    Attributes:
        shape: of the parameter.
        size: of a run.
        layer_axis: the axis along which layers are stacked.
    """

    shape: Shape
    size: int
    layer_axis: int | None = None
    matrix: None = None

    @property
    def moment_shape(self) -> Shape:
        """Returns the runs of a layer in the last axis that is no layer axis."""
        rest = len(self.shape) - (self.layer_axis is not None)
        shape = (*(1,) * (rest - 1), math.prod(self.shape) // (self._layers * self.size))
        if self.layer_axis is None:
            return shape
        return (*shape[: self.layer_axis], self._layers, *shape[self.layer_axis :])

    @property
    def blocks(self) -> int:
        """Counts the segments."""
        return math.prod(self.moment_shape)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean over each run."""
        rows = self._rows(whole_where_uneven(x, (1,) * x.ndim))
        return self._shaped(rows.reshape(self._layers, -1, self.size).mean(-1), self.moment_shape)

    def spread(self, moment: jax.Array) -> jax.Array:
        """Returns each run's number for each of its elements."""
        return self._shaped(jnp.repeat(self._rows(moment), self.size, axis=1), self.shape)

    def with_axis(self, axis: int, size: int) -> "RunBlocks":
        """Returns the same for each layer of a stack."""
        shape = (*self.shape[:axis], size, *self.shape[axis:])
        return RunBlocks(shape, self.size, axis)

    @property
    def _layers(self) -> int:
        return 1 if self.layer_axis is None else self.shape[self.layer_axis]

    def _rows(self, x: jax.Array) -> jax.Array:
        """One row for each layer."""
        return jnp.moveaxis(x, self.layer_axis or 0, 0).reshape(self._layers, -1)

    def _shaped(self, rows: jax.Array, shape: Shape) -> jax.Array:
        """The inverse of :meth:`_rows`."""
        axis = self.layer_axis or 0
        first = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return jnp.moveaxis(rows.reshape(first), 0, axis)


def _larger_side(shape: Shape, matrix: Sides | None) -> AxisBlocks:
    if matrix is None:
        return elementwise(shape)
    inputs, outputs = matrix
    more_inputs = math.prod(shape[i] for i in inputs) > math.prod(shape[i] for i in outputs)
    averaged = outputs if more_inputs else inputs
    return AxisBlocks(tuple(((n, i not in averaged),) for i, n in enumerate(shape)))


def _runs(shape: Shape, layer_axis: int | None, size: int) -> Sharing:
    layer = one_layer(shape, layer_axis)
    elements = math.prod(layer)
    limit = size if size > 0 else int(math.sqrt(elements) / -size)
    size = next(d for d in range(max(1, min(limit, elements)), 0, -1) if elements % d == 0)
    if layer and layer[-1] % size == 0:
        leading = tuple(((n, True),) for n in layer[:-1])
        runs: Sharing = AxisBlocks((*leading, ((layer[-1] // size, True), (size, False))))
    elif layer:
        runs = RunBlocks(layer, size)
    else:
        runs = elementwise(layer)
    return runs if layer_axis is None else runs.with_axis(layer_axis, shape[layer_axis])
