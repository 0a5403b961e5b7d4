"""How many bytes an optimizer keeps, from shapes alone."""

import dataclasses
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import optax

from microadam_jax.arguments import require_transformation
from microadam_jax.execution import is_reporting, remark, within
from microadam_jax.layout.stacks import is_small, layer_axes
from microadam_jax.trees import KeyPath, leaf_shapes, owner_of, path_name

GIB = 2**30
ADAM_BYTES = 8  # of two float32 moments
ROUNDING = 16  # bytes: counts, and the single bytes of arrays that a leaf does not need


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Counts the bytes that an optimizer keeps for a tree of parameters.

    Printing it gives a table; an AdamW of the same parameters stands beside it.

    Attributes:
        parameters: how many parameters there are.
        fields: bytes of each state field.
        remarks: what the transformations say of single leaves: the text, and the leaves' paths.
    """

    parameters: int
    fields: dict[str, int]
    remarks: dict[str, tuple[str, ...]]

    @property
    def total(self) -> int:
        """Counts the bytes of the whole state."""
        return sum(self.fields.values())

    @property
    def bytes_per_parameter(self) -> float:
        """Divides the bytes of the state by the parameters."""
        return self.total / max(1, self.parameters)

    @property
    def adamw(self) -> dict[str, int]:
        """Returns the bytes of AdamW's two moments for the same parameters, by their dtype."""
        return {"AdamW, float32": 8 * self.parameters, "AdamW, bfloat16": 4 * self.parameters}

    def __str__(self) -> str:
        rows = [
            ("state", "bytes", "GiB", "bytes/param"),
            *(_row(name, size, self.parameters) for name, size in self.fields.items()),
            _row("total", self.total, self.parameters),
            *(_row(name, size, self.parameters) for name, size in self.adamw.items()),
        ]
        lines = [f"{self.parameters:,} parameters", *format_table(rows), *self.remark_lines()]
        return "\n".join(lines)

    def remark_lines(self) -> list[str]:
        """Returns each remark in one line, with the number of leaves and their first paths."""
        return [
            f"{text} ({len(paths)}): {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"
            for text, paths in self.remarks.items()
        ]


def memory_report(tx: optax.GradientTransformation, params: optax.Params) -> MemoryReport:
    """Counts the bytes that ``tx`` keeps for ``params``, without allocating any.

    Args:
        tx: any Optax transformation.
        params: the parameters, or ``jax.ShapeDtypeStruct`` of them.

    Returns:
        The bytes by state field and in total.

    Raises:
        TypeError: if ``tx`` is not a transformation.
        Exception: what ``tx.init`` raises.

    Examples:
        >>> import jax, optax
        >>> from microadam_jax import memory_report, microadam
        >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> print(memory_report(microadam(1e-3), params))
        16,777,216 parameters
        state                                        bytes    GiB  bytes/param
        ----------------------------------------------------------------------
        ErrorFeedbackState.count                         4  0.000       0.0000
        ErrorFeedbackState.residual.codes        8,388,608  0.008       0.5000
        ErrorFeedbackState.residual.low            262,144  0.000       0.0156
        ErrorFeedbackState.residual.high           262,144  0.000       0.0156
        ScaleByWindowAdamState.count                     4  0.000       0.0000
        ScaleByWindowAdamState.window_values     3,932,160  0.004       0.2344
        ScaleByWindowAdamState.window_indices    1,966,080  0.002       0.1172
        total                                   14,811,144  0.014       0.8828
        AdamW, float32                         134,217,728  0.125       8.0000
        AdamW, bfloat16                         67,108,864  0.062       4.0000
    """
    require_transformation(tx=tx)
    remarks: dict[str, list[str]] = defaultdict(list)
    with within(notes=remarks):
        # A fresh function each time: eval_shape would answer a known one from its cache,
        # without running it, and no remark would be heard.
        state = jax.eval_shape(lambda params: tx.init(params), params)
        for path, _ in more_than_adam(state, params):
            remark(path, "takes more bytes than AdamW in float32")
    fields: Counter[str] = Counter()
    for name, leaf in named_leaves(state, params):
        fields[name] += leaf.size * leaf.dtype.itemsize
    return MemoryReport(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        fields=dict(fields),
        remarks={text: tuple(paths) for text, paths in remarks.items()},
    )


def more_than_adam(state: Any, params: optax.Params) -> list[tuple[KeyPath, int]]:
    """Returns the parameters whose state takes more bytes than AdamW's two float32 moments.

    Args:
        state: the state, or its shapes.
        params: the parameters. Small ones (:func:`is_small`) are left out.

    Returns:
        Their paths and the bytes of their states.
    """
    leaves = leaf_shapes(params)
    taken: Counter[KeyPath] = Counter()
    for path, array in jax.tree.leaves_with_path(state):
        owner = owner_of(path, leaves)
        if owner is not None:
            taken[owner] += array.size * array.dtype.itemsize
    axes = layer_axes(tuple(leaves.values()))
    found = []
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        if not is_small(leaf.shape, axes[leaf.path]) and taken[path] > ADAM_BYTES * size + ROUNDING:
            found.append((path, taken[path]))
    return found


def warn_of_more_than_adam(transformation: str, state: Any, params: optax.Params) -> None:
    """Warns of parameters for which ``state`` takes more bytes than AdamW; reports say it anyway.

    Args:
        transformation: its name.
        state: what it keeps.
        params: the parameters.
    """
    if is_reporting():
        return
    found = more_than_adam(state, params)
    if not found:
        return
    path, most = max(found, key=lambda item: item[1])
    shape = leaf_shapes(params)[path].shape
    warnings.warn(
        f"{transformation} takes more bytes than AdamW's two float32 moments for {len(found)} of "
        f"{len(jax.tree.leaves(params))} parameters; the most for {path_name(path)!r} of shape "
        f"{shape}, {most:,} in place of {ADAM_BYTES * math.prod(shape):,}. They are too narrow, "
        "or the rank or window is too large. Choose a smaller one, or give such parameters to "
        "optax.adamw with optax.partition.",
        UserWarning,
        stacklevel=2,
    )


def format_table(rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Returns lines of a table with a header row; the columns ``left`` are aligned to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def _row(name: str, size: int, parameters: int) -> tuple[str, ...]:
    return name, f"{size:,}", f"{size / GIB:.3f}", f"{size / max(1, parameters):.4f}"


def named_leaves(state: Any, params: optax.Params) -> Iterator[tuple[str, Any]]:
    """Returns each array of the state with the name of its field: its path less its parameter's."""
    parameter_paths = {path for path, _ in jax.tree.leaves_with_path(params)}
    for path, leaf in jax.tree.leaves_with_path(state):
        owner = owner_of(path, parameter_paths)
        field = path if owner is None else path[: len(path) - len(owner)]
        yield _field_name(state, field), leaf


def _field_name(state: Any, path: KeyPath) -> str:
    """``ScaleByAdamState.mu``: the innermost NamedTuple ending in State, and what follows."""
    names: list[str] = []
    node = state
    for key in path:
        name = type(node).__name__
        if name.endswith("State"):
            names = [name]
        if isinstance(key, jax.tree_util.GetAttrKey):
            names.append(key.name)
            node = getattr(node, key.name)
        else:
            names.append(str(getattr(key, "key", getattr(key, "idx", key))))
            node = node[getattr(key, "key", getattr(key, "idx", None))]
    return ".".join(names)
