"""Which parameters are matrices, and which side of them is compressed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from microadam_jax.execution import remark
from microadam_jax.layout.axes import Sides, elementwise
from microadam_jax.layout.partition import Assignment, Partition, as_partition
from microadam_jax.layout.path_rules import PathRules, path_pattern
from microadam_jax.layout.view import MatrixView
from microadam_jax.trees import KeyPath, LeafShape, Shape, leaf_shapes, path_name

OUTPUT_HEAD = r"(lm_head|head|logits|logits_dense|output_projection|classifier)/[^/]+"
SIDES = ("smaller", "larger", "in", "out")


class MatrixDimensionNumbers(NamedTuple):
    """Names the axes of a linear map; what is in neither is a batch of maps.

    Attributes:
        reduction_axis: the input axes, which a forward pass sums over.
        output_axis: the output axes.
    """

    reduction_axis: int | tuple[int, ...]
    output_axis: int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Matrices:
    r"""Selects the parameters that are matrices, and the side of them that is compressed.

    Linear maps are known by their names, as for :class:`Partition`, convolutions and kernels
    ``(embed, heads, head_dim)`` among them. A parameter of two axes that no rule names is taken
    for a kernel ``(in, out)``. Embeddings, norms, biases and whatever else is no linear map are
    no matrices. Layers that are stacked along an axis are matrices of their own.

    Args:
        side: what is compressed: the ``"smaller"`` side, as in GaLore, the ``"larger"``, as
            where rows are selected, the inputs ``"in"`` or the outputs ``"out"``.
        square: which of the two is compressed where both sides have one size.
        exclude: a pattern for the paths of parameters that are left alone
            (:func:`path_pattern`).
        dimension_numbers: pairs of such a pattern and the axes of a linear map. They count
            before the names.
        partition: the rules of the names; None stands for those of :func:`transformer_rules`.

    Raises:
        TypeError: if ``partition`` is not a :class:`Partition`.
        ValueError: if ``side`` or ``square`` is not one of those, or a pattern is not a regular
            expression.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import Matrices
        >>> from microadam_jax.subspace import MatrixDimensionNumbers
        >>> gate = ("gating_einsum", MatrixDimensionNumbers(1, 2))  # (2, in, out): a batch of 2
        >>> matrices = Matrices(exclude="lm_head/kernel", dimension_numbers=(gate,))
        >>> params = {"gating_einsum": jnp.zeros((2, 8, 32)), "lm_head": {"kernel": jnp.eye(4)}}
        >>> {path: view and (view.rows, view.columns) for path, view in matrices.list(params)}
        {'gating_einsum': (8, 32), 'lm_head/kernel': None}
    """

    side: Literal["smaller", "larger", "in", "out"] = "smaller"
    square: Literal["in", "out"] = "in"
    exclude: str | None = None
    dimension_numbers: Sequence[tuple[str, MatrixDimensionNumbers]] = ()
    partition: Partition | None = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"Matrices.side must be one of {SIDES}; got {self.side!r}.")
        if self.square not in ("in", "out"):
            raise ValueError(f"Matrices.square must be 'in' or 'out'; got {self.square!r}.")
        as_partition(self.partition)
        path_pattern(self.exclude or "")
        object.__setattr__(self, "dimension_numbers", PathRules(self.dimension_numbers))

    def assign(self, params: Any) -> dict[KeyPath, "Assigned"]:
        """Returns for each leaf of a tree, by its path, how it is seen.

        Args:
            params: the parameters, or their updates; their Flax boxes may name the axes.

        Raises:
            ValueError: if ``dimension_numbers`` names axes that a leaf does not have.
        """
        return self.assign_leaves(leaf_shapes(params))

    def assign_leaves(self, leaves: Mapping[KeyPath, LeafShape]) -> dict[KeyPath, "Assigned"]:
        """Returns what :meth:`assign` does, for a tree of which the leaves are known.

        Raises:
            ValueError: if ``dimension_numbers`` names axes that a leaf does not have.
        """
        found = (self.partition or Partition()).assign_leaves(leaves)
        return {path: self._assigned(assignment) for path, assignment in found.items()}

    def _assigned(self, assignment: Assignment) -> "Assigned":
        shape = assignment.shape
        if 0 in shape or len(shape) < 2:
            return Assigned(assignment, None, "no matrix")
        if self.exclude is not None and path_pattern(self.exclude).search(assignment.path):
            return Assigned(assignment, None, "excluded by its name")
        sides = self._sides(assignment)
        if sides is None:
            return Assigned(assignment, None, "no matrix")
        # What shares a norm is asked of the sharing, which must know the map too.
        if assignment.sharing.matrix is None:
            sharing = dataclasses.replace(elementwise(shape), matrix=sides)
            assignment = dataclasses.replace(assignment, sharing=sharing)
        return Assigned(assignment, self._view(shape, sides), "")

    def list(self, params: Any) -> list[tuple[str, MatrixView | None]]:
        """Returns each parameter's path and how it is seen; None where it is left alone."""
        found = self.assign(params).items()
        return [(path_name(path), assigned.view) for path, assigned in found]

    def _sides(self, assignment: Assignment) -> Sides | None:
        for numbers in PathRules(self.dimension_numbers).matching(assignment.path):
            return _checked(numbers, assignment)
        if assignment.sharing.matrix is not None:
            return assignment.sharing.matrix
        axes = assignment.axes_of_a_layer
        if assignment.rule is not None or len(axes) != 2:
            return None
        return (axes[0],), (axes[1],)

    def _view(self, shape: Shape, sides: Sides) -> MatrixView:
        inputs, outputs = sides
        n_in, n_out = (math.prod(shape[i] for i in side) for side in sides)
        side = self.side
        if side in ("smaller", "larger"):
            side = "in" if (n_in < n_out) == (side == "smaller") else "out"
            side = self.square if n_in == n_out else side
        return MatrixView(shape, *((inputs, outputs) if side == "in" else (outputs, inputs)))


class Assigned(NamedTuple):
    """Holds the view of a parameter.

    Attributes:
        assignment: its rule, where its ``sharing`` knows the linear map.
        view: its matrices; None if it is left alone.
        reason: why it is.
    """

    assignment: Assignment
    view: MatrixView | None
    reason: str

    def remark(self, path: KeyPath) -> None:
        """Tells the memory report of a parameter that is left alone."""
        if self.view is None:
            remark(path, f"{self.reason}, not projected")


def _checked(numbers: MatrixDimensionNumbers, assignment: Assignment) -> Sides:
    rank = len(assignment.shape)
    reduction, output = ((x,) if isinstance(x, int) else tuple(x) for x in numbers)
    named = (*reduction, *output)
    axes = [axis % rank for axis in named if -rank <= axis < rank]
    if not reduction or not output or len(set(axes)) < len(named):
        raise ValueError(
            f"{numbers} does not describe {assignment.path!r} of shape {assignment.shape}: name "
            "different axes that it has, at least one for each side."
        )
    return tuple(axes[: len(reduction)]), tuple(axes[len(reduction) :])
