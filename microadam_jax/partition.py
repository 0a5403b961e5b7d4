"""Which parameters share a second moment: rules from the names and shapes of a tree."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from microadam_jax.axes import Axes, Fused, Shape, Sharing, elementwise
from microadam_jax.boxes import axis_names, box_path
from microadam_jax.layer_names import STACKED, layer_axis_of, transformer_rules
from microadam_jax.memory import format_table, remark
from microadam_jax.trees import KeyPath, path_name

Rules = Sequence[tuple[str, str | Axes | Fused]]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a partition does to one parameter.

    Attributes:
        path: the parameter's path, ``"layers/0/attention/query/kernel"``.
        shape: its shape.
        rule: the rule it follows; None if there is none, and every element is on its own.
        sharing: its blocks.
        layer_axis: the axis of stacked layers, which is never averaged.
    """

    path: str
    shape: Shape
    rule: Axes | Fused | None
    sharing: Sharing
    layer_axis: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the float32 second moment."""
        return 4 * math.prod(self.sharing.moment_shape)


@dataclasses.dataclass(frozen=True)
class Partition:
    r"""Rules that say which elements of a parameter share a second moment.

    The first rule whose pattern matches the parameter's path and whose axes fit its shape
    counts. A pattern is a regular expression for the end of the path, whole components of it:
    ``"(query|key)/kernel"`` matches ``"layers/0/query/kernel"`` but not ``"subquery/kernel"``. A
    parameter that follows no rule shares nothing: each of its elements keeps its own second
    moment, which is safe and costs memory. :func:`explain_partition` shows what comes of it.

    Args:
        rules: pairs of a pattern and the axes, :class:`Axes` or its notation, or
            :class:`Fused`. Put your own before those of :func:`transformer_rules`.
        stacked: a regular expression for paths of parameters of layers that are stacked for a
            scan. Each layer has blocks of its own. A parameter in a Linen box that names its layer
            axis needs no pattern.
        layer_axis: the layer axis of those, 0 or, as in MaxText, 1.

    Raises:
        ValueError: if a pattern is no regular expression, or an axes notation cannot be read.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import Partition, explain_partition, transformer_rules
        >>> rules = (("adapter/w", "in | out -> out"), *transformer_rules(heads=4))
        >>> params = {"adapter": {"w": jnp.zeros((8, 16))}, "mixer": jnp.zeros((8, 8))}
        >>> print(explain_partition(params, Partition(rules)))
        parameter  shape    blocks  bytes  rule
        -------------------------------------------------------
        adapter/w  (8, 16)      16     64  in | out -> out
        mixer      (8, 8)       64    256  no rule, elementwise
        total                   80    320  Adam: 768 bytes
        No rule for 1 of 2 parameters, each of whose elements has its own: mixer
    """

    rules: Rules = dataclasses.field(default_factory=transformer_rules)
    stacked: str = STACKED
    layer_axis: int = 0

    def __post_init__(self) -> None:
        if self.layer_axis < 0:
            raise ValueError(f"layer_axis must not be negative; got {self.layer_axis}.")
        for pattern in (*(pattern for pattern, _ in self.rules), self.stacked):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"The partition's pattern {pattern!r} is bad: {error}.") from error
        rules = [(p, Axes(axes) if isinstance(axes, str) else axes) for p, axes in self.rules]
        object.__setattr__(self, "rules", tuple(rules))

    def assign(self, params: Any) -> Callable[[KeyPath, Any], Assignment]:
        """A function from a leaf's path and the leaf to what this partition does to it.

        Args:
            params: the tree of the leaves: its Flax boxes may name the axes.
        """
        names = dict(axis_names(params))

        def assignment(path: KeyPath, leaf: Any) -> Assignment:
            boxed = box_path(path)
            return self._assignment(path_name(boxed), tuple(leaf.shape), names.get(boxed))

        return assignment

    def _assignment(self, path: str, shape: Shape, names: tuple[Any, ...] | None) -> Assignment:
        layer_axis = layer_axis_of(path, shape, names, self.stacked, self.layer_axis)
        if layer_axis is not None:
            found = self._rule(path, _without(shape, layer_axis))
            if found is not None:
                rule, sharing = found
                stacked = sharing.with_axis(layer_axis, shape[layer_axis])
                return Assignment(path, shape, rule, stacked, layer_axis)
        found = self._rule(path, shape)
        if found is not None:
            rule, sharing = found
            # A rule for the whole shape tells that there is no stack, if it leaves the axis alone.
            if layer_axis is None or sharing.moment_shape[layer_axis] == shape[layer_axis]:
                return Assignment(path, shape, rule, sharing)
        return Assignment(path, shape, None, elementwise(shape), layer_axis)

    def _rule(self, path: str, shape: Shape) -> tuple[Axes | Fused, Sharing] | None:
        if 0 in shape:
            return None
        for pattern, axes in self.rules:
            if not isinstance(axes, str) and re.search(rf"(?:^|/)(?:{pattern})$", path):
                sharing = axes.fit(shape)
                if sharing is not None:
                    return axes, sharing
        return None


@dataclasses.dataclass(frozen=True)
class PartitionReport:
    """What a partition does to each parameter of a tree; printing it gives a table.

    Attributes:
        assignments: one for each parameter, in the tree's order.
    """

    assignments: tuple[Assignment, ...]

    @property
    def unnamed(self) -> tuple[Assignment, ...]:
        """The parameters that follow no rule, and share nothing."""
        return tuple(a for a in self.assignments if a.rule is None)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("parameter", "shape", "blocks", "bytes", "rule"),
            *(
                (a.path, str(a.shape), f"{a.sharing.blocks:,}", f"{a.bytes:,}", _rule_text(a))
                for a in self.assignments
            ),
            (
                "total",
                "",
                f"{sum(a.sharing.blocks for a in self.assignments):,}",
                f"{sum(a.bytes for a in self.assignments):,}",
                f"Adam: {sum(4 * math.prod(a.shape) for a in self.assignments):,} bytes",
            ),
        ]
        lines = format_table(rows, left=(0, 1, 4))
        if self.unnamed:
            lines.append(
                f"No rule for {len(self.unnamed)} of {len(self.assignments)} parameters, each of "
                f"whose elements has its own: {', '.join(a.path for a in self.unnamed)}"
            )
        return "\n".join(lines)


def explain_partition(params: Any, partition: Partition | None = None) -> PartitionReport:
    """Says for every parameter which rule it follows, its blocks and the bytes they take.

    Args:
        params: the parameters, or ``jax.ShapeDtypeStruct`` of them.
        partition: the rules; None stands for those of :func:`transformer_rules`.

    Returns:
        The report; print it.

    Examples:
        >>> from microadam_jax import explain_partition, model_shapes
        >>> report = explain_partition(model_shapes("llama2-7b"))
        >>> print(report.assignments[0].rule, report.unnamed)
        token embed -> token ()
    """
    assign = (partition or Partition()).assign(params)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return PartitionReport(tuple(assign(path, leaf) for path, leaf in leaves))


def remark_assignment(path: KeyPath, assignment: Assignment) -> None:
    """Tells the memory report of a parameter that shares nothing because no rule names it."""
    if assignment.rule is None and assignment.sharing.blocks > 1:
        remark(path, "no rule of the partition, one second moment for each element")


def require_shape(path: KeyPath, moment: jax.Array, shape: Shape) -> None:
    """Refuses a state that was made for other blocks.

    Raises:
        ValueError: if ``moment`` does not have ``shape``.
    """
    if moment.shape != shape:
        raise ValueError(
            f"The state of {path_name(path)!r} holds a second moment of shape {moment.shape}, but "
            f"by these rules it has {shape}. Use the partition that the state was made with."
        )


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _rule_text(assignment: Assignment) -> str:
    text = "no rule, elementwise" if assignment.rule is None else str(assignment.rule)
    if assignment.layer_axis is None:
        return text
    return f"{text}, for each of {assignment.shape[assignment.layer_axis]} layers"
