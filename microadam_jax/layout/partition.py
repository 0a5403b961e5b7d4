"""Which parameters share a second moment: rules from the names and shapes of a tree."""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from microadam_jax.arguments import require_kind, require_not_negative
from microadam_jax.execution import all_leaves, is_reporting, remark
from microadam_jax.layout.axes import Axes, Fused, Kernel, Sharing, elementwise
from microadam_jax.layout.names import NORM, transformer_rules
from microadam_jax.layout.orientation import Orientation, orientations
from microadam_jax.layout.path_rules import PathRules, matches_none, path_pattern
from microadam_jax.layout.stacks import STACKED, is_small, layer_axes, one_layer
from microadam_jax.memory import format_table
from microadam_jax.trees import KeyPath, LeafShape, Shape, leaf_shapes

Rules = Sequence[tuple[str, str | Axes | Fused | Kernel]]

UNKNOWN = ("elementwise", "output", "error")
OUTPUT = Axes("in | out -> out")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Records what a partition does to one parameter.

    Attributes:
        path: the parameter's path, ``"layers/0/attention/query/kernel"``.
        shape: its shape.
        rule: the rule it follows; None if there is none, and every element is on its own.
        sharing: its blocks.
        layer_axis: the axis of stacked layers, which is never averaged.
        orientation: the order of a kernel's last two axes, as far as it is known.
    """

    path: str
    shape: Shape
    rule: Axes | Fused | None
    sharing: Sharing
    layer_axis: int | None = None
    orientation: Orientation = Orientation.IN_OUT

    @property
    def bytes(self) -> int:
        """Counts the bytes of the float32 second moment."""
        return 4 * math.prod(self.sharing.moment_shape)

    @property
    def layer_shape(self) -> Shape:
        """Returns the shape of one layer."""
        return one_layer(self.shape, self.layer_axis)

    @property
    def axes_of_a_layer(self) -> tuple[int, ...]:
        """Returns all axes but that of stacked layers."""
        return tuple(i for i in range(len(self.shape)) if i != self.layer_axis)


@dataclasses.dataclass(frozen=True)
class Partition:
    r"""Says by rules which elements of a parameter share a second moment.

    The first rule whose pattern matches the parameter's path and whose axes fit its shape
    counts. A pattern is a regular expression for the end of the path, whole components of it
    (:func:`path_pattern`): ``"(query|key)/kernel"`` matches ``"layers/0/query/kernel"`` but not
    ``"subquery/kernel"``. A parameter that follows no rule shares nothing: each of its elements
    keeps its own second moment, which is safe and costs memory. :func:`explain_partition` shows
    what comes of it. A rule of your own that no parameter can follow is warned of.

    Args:
        rules: pairs of a pattern and the axes, :class:`Axes` or its notation, or
            :class:`Fused`. Put your own before those of :func:`transformer_rules`.
        stacked: a pattern for the containers of layers that are stacked for a scan, or for their
            parameters. Each layer has blocks of its own. Where the index of a layer follows, as in
            ``"layers/layer_0/kernel"``, the parameter belongs to a single one. The default also
            asks the tree whether the layers have one size. A parameter in a Linen box that names
            its layer axis needs no pattern.
        layer_axis: the layer axis of those, 0 or, as in MaxText, 1.
        unknown: of a matrix of two axes that follows no rule: ``"elementwise"`` keeps a second
            moment for each element, and optimizers warn of its bytes; ``"output"`` takes it for a
            kernel ``(in, out)`` and keeps one for each output; ``"error"`` refuses it, and every
            other parameter of two or more axes that follows no rule.

    Raises:
        ValueError: if a pattern is no regular expression, an axes notation cannot be read, or
            ``unknown`` is none of those; in ``assign``, if ``unknown`` is ``"error"`` and a
            parameter follows no rule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import Partition, explain_partition
        >>> from microadam_jax.layout.names import transformer_rules
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
    unknown: Literal["elementwise", "output", "error"] = "elementwise"

    def __post_init__(self) -> None:
        if self.unknown not in UNKNOWN:
            raise ValueError(f"Partition.unknown must be one of {UNKNOWN}; got {self.unknown!r}.")
        require_not_negative("layer_axis", self.layer_axis)
        rules = PathRules(self.rules)
        parsed = tuple((p, Axes(axes) if isinstance(axes, str) else axes) for p, axes in rules)
        for pattern, axes in parsed:
            if not hasattr(axes, "fit"):
                raise TypeError(
                    f"The rule of {pattern!r} must be axes such as 'in | out -> out'; got {axes!r}."
                )
        object.__setattr__(self, "rules", PathRules(parsed))
        path_pattern(self.stacked)

    def assign(self, params: Any) -> dict[KeyPath, Assignment]:
        """Returns for each leaf of a tree, by its path, what this partition does to it.

        Args:
            params: the parameters, or their updates; the whole tree, which tells stacks from
                single layers and kernels ``(in, out)`` from ``(out, in)``.

        Raises:
            ValueError: if ``unknown`` is ``"error"`` and a leaf follows no rule.
        """
        return self.assign_leaves(leaf_shapes(params))

    def assign_leaves(self, leaves: Mapping[KeyPath, LeafShape]) -> dict[KeyPath, Assignment]:
        """Returns what :meth:`assign` does, for a tree of which the leaves are known.

        Raises:
            ValueError: if ``unknown`` is ``"error"`` and a leaf follows no rule.
        """
        found = _assignments(self, tuple(leaves.values()), all_leaves(leaves))
        return dict(zip(leaves, found, strict=True))

    def _assignment(
        self, path: str, shape: Shape, layer_axis: int | None, orientation: Orientation
    ) -> Assignment:
        if layer_axis is not None:
            found = self._rule(path, one_layer(shape, layer_axis), orientation)
            if found is not None:
                rule, sharing, orientation = found
                stacked = sharing.with_axis(layer_axis, shape[layer_axis])
                return Assignment(path, shape, rule, stacked, layer_axis, orientation)
        found = self._rule(path, shape, orientation)
        if found is not None:
            rule, sharing, orientation = found
            # A rule for the whole shape tells that there is no stack, if it leaves the axis alone.
            if layer_axis is None or sharing.moment_shape[layer_axis] == shape[layer_axis]:
                return Assignment(path, shape, rule, sharing, None, orientation)
        layer = one_layer(shape, layer_axis)
        if self.unknown == "output" and _is_unnamed_matrix(path, layer):
            sharing = OUTPUT.fit(layer)
            if sharing is not None and layer_axis is not None:
                sharing = sharing.with_axis(layer_axis, shape[layer_axis])
            if sharing is not None:
                return Assignment(path, shape, OUTPUT, sharing, layer_axis, Orientation.ASSUMED)
        return Assignment(path, shape, None, elementwise(shape), layer_axis)

    def _rule(
        self, path: str, shape: Shape, orientation: Orientation
    ) -> tuple[Axes | Fused, Sharing, Orientation] | None:
        if 0 in shape:
            return None
        for axes in PathRules(self.rules).matching(path):
            if isinstance(axes, str):  # there are none after __post_init__
                continue
            order = Orientation.IN_OUT
            if isinstance(axes, Kernel):  # other rules describe a parameter as it is stored
                order = orientation
                sharing = axes.fit(shape, turned=order is Orientation.OUT_IN)
                axes = axes.axes
            else:
                sharing = axes.fit(shape)
            if sharing is not None:
                return axes, sharing, order
        return None


@functools.lru_cache(maxsize=16)
def _assignments(
    partition: Partition, leaves: tuple[LeafShape, ...], among: tuple[LeafShape, ...]
) -> tuple[Assignment, ...]:
    """Returns what a partition does to leaves among others, found once for all steps."""
    axes = layer_axes(among, partition.stacked, partition.layer_axis)
    shapes = {x.path: (x.shape, one_layer(x.shape, axes[x.path])) for x in among}
    _warn_unmatched(partition, shapes)
    known = orientations({path: layer for path, (_, layer) in shapes.items()})
    found = []
    for leaf in leaves:
        orientation = known.get(leaf.path, Orientation.IN_OUT)
        one = partition._assignment(leaf.path, leaf.shape, axes[leaf.path], orientation)
        if partition.unknown == "error" and one.rule is None and len(one.layer_shape) > 1:
            raise ValueError(
                f"{one.path!r} of shape {one.shape} follows no rule of the partition, which has "
                f"unknown='error'. Add a rule, {_rule_to_add(one)}, or choose "
                "unknown='elementwise' or, for matrices (in, out), 'output'."
            )
        found.append(one)
    return tuple(found)


def _warn_unmatched(partition: Partition, shapes: Mapping[str, tuple[Shape, Shape]]) -> None:
    """Warns of rules that are not of :func:`transformer_rules` and that nothing can follow.

    Args:
        partition: the rules.
        shapes: by path the shape of each parameter, and that of one layer of it.
    """
    own = [rule for rule in partition.rules if rule[0] not in _patterns_of_names()]
    named = [[path for path in shapes if path_pattern(rule).search(path)] for rule, _ in own]
    fitting = {
        path
        for (_, axes), paths in zip(own, named, strict=True)
        for path in paths
        if any(_fits(axes, shape) for shape in shapes[path])
    }
    for (pattern, axes), paths in zip(own, named, strict=True):
        # Of several rules for one name, each may be for another rank.
        if not shapes or not fitting.isdisjoint(paths):
            continue
        what = matches_none(list(shapes))
        if paths:
            layer = shapes[paths[0]][1]
            what = f"matches {paths[0]!r}, but its axes '{axes}' do not fit the shape {layer}"
        warnings.warn(
            f"The rule for {pattern!r} in a Partition {what}. Mend it, or leave the rule out.",
            UserWarning,
            stacklevel=2,
        )


def _fits(axes: str | Axes | Fused | Kernel, shape: Shape) -> bool:
    if 0 in shape:
        return True
    if isinstance(axes, Kernel):
        return any(axes.fit(shape, turned=turned) is not None for turned in (False, True))
    return not isinstance(axes, str) and axes.fit(shape) is not None


@functools.cache
def _patterns_of_names() -> frozenset[str]:
    """The patterns of :func:`transformer_rules`, of which most match nothing in any one model."""
    each = (transformer_rules(weight=weight, heads=1) for weight in (None, "in out", "out in"))
    return frozenset(pattern for rules in each for pattern, _ in rules)


def as_partition(partition: Partition | None) -> Partition:
    """Returns ``partition``, or ``Partition()`` for None.

    Raises:
        TypeError: if it is of another class, such as a list of rules.
    """
    if partition is None:
        return Partition()
    require_kind(Partition, partition=partition)
    return partition


@dataclasses.dataclass(frozen=True)
class PartitionReport:
    """Records what a partition does to each parameter of a tree; prints as a table.

    Attributes:
        assignments: one for each parameter, in the tree's order.
    """

    assignments: tuple[Assignment, ...]

    @property
    def unnamed(self) -> tuple[Assignment, ...]:
        """Returns the parameters that follow no rule, and share nothing."""
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

    Raises:
        TypeError: if ``partition`` is not a :class:`Partition`.
        ValueError: if ``partition`` has ``unknown="error"`` and a parameter follows no rule.

    Examples:
        >>> from microadam_jax import explain_partition
        >>> from microadam_jax.models import model_shapes
        >>> report = explain_partition(model_shapes("llama2-7b"))
        >>> print(report.assignments[0].rule, report.unnamed)
        token embed -> token ()
    """
    return PartitionReport(tuple(as_partition(partition).assign(params).values()))


def warn_unnamed(
    optimizer: str, costs: Sequence[tuple[Assignment, int]], argument: str = "partition={}"
) -> None:
    """Warns of second moments that parameters have for each element because no rule names them.

    A memory report lists them instead. Of vectors only those that are not small are worth a
    warning, such as a whole model that is flattened.

    Args:
        optimizer: the name of the transformation.
        costs: each parameter, with the bytes of its second moments that nobody asked for.
        argument: how the transformation is given a partition, which stands for the braces.
    """
    unnamed = [
        (bytes_, assignment)
        for assignment, bytes_ in costs
        if assignment.rule is None
        and bytes_ > 4
        and (
            len(assignment.layer_shape) > 1 or not is_small(assignment.shape, assignment.layer_axis)
        )
    ]
    if not unnamed or is_reporting():
        return
    largest, assignment = max(unnamed, key=lambda cost: cost[0])
    total = sum(bytes_ for bytes_, _ in unnamed)
    one_more = argument.format(f"Partition(({_rule_to_add(assignment)}, *transformer_rules()))")
    warnings.warn(
        f"{optimizer}: no rule of the partition names {len(unnamed)} of {len(costs)} parameters, "
        f"so each of their elements keeps a second moment of its own: {total:,} bytes. The largest "
        f"is {assignment.path!r} of shape {assignment.shape} with {largest:,} bytes. Give "
        f"{one_more}, transformer_rules(weight='out in') where weights are torch's, or "
        "Partition(unknown='output') if all unknown matrices are (in, out). If each element shall "
        "have its own, use the axes '... -> ...'. See explain_partition.",
        UserWarning,
        stacklevel=2,
    )


def remark_assignment(path: KeyPath, assignment: Assignment) -> None:
    """Tells the memory report of a parameter that shares nothing because no rule names it."""
    if assignment.rule is None and assignment.sharing.blocks > 1:
        remark(path, "no rule of the partition, one second moment for each element")


def _is_unnamed_matrix(path: str, shape: Shape) -> bool:
    return len(shape) == 2 and path_pattern(rf"{NORM}(/[^/]+)?").search(path) is None


def _rule_to_add(assignment: Assignment) -> str:
    """Returns a rule for a parameter; its axes are a guess, to be looked at."""
    pattern = "/".join(map(re.escape, assignment.path.split("/")[-2:]))
    rank = len(assignment.layer_shape)
    names = " ".join(["in", *(f"in{i}" for i in range(2, rank))])
    sides = f"out | {names}" if assignment.path.endswith("weight") else f"{names} | out"
    axes = "feature ->" if rank < 2 else f"{sides} -> out"
    return f"({pattern!r}, {axes!r})"


def _rule_text(assignment: Assignment) -> str:
    text = "no rule, elementwise" if assignment.rule is None else str(assignment.rule)
    if assignment.orientation is Orientation.OUT_IN:
        text += ", stored (out, in)"
    elif assignment.orientation is Orientation.ASSUMED:
        text += ", assumed (in, out)"
    if assignment.layer_axis is None:
        return text
    return f"{text}, for each of {assignment.shape[assignment.layer_axis]} layers"
