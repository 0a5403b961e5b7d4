"""What the axes of a parameter are, and which of its elements share a second moment."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from microadam_jax.sharding import place_like, whole_where_uneven
from microadam_jax.trees import KeyPath, Shape, path_name

Sides = tuple[tuple[int, ...], tuple[int, ...]]  # input axes and output axes of a linear map


class Sharing(Protocol):
    """Describes the blocks of one parameter."""

    @property
    def moment_shape(self) -> Shape:
        """Returns the shape of what is kept, of the parameter's rank."""
        ...

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        ...

    @property
    def matrix(self) -> Sides | None:
        """Returns the input and output axes of a linear map; all others batch such maps."""
        ...

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean of ``x`` over each block, in ``moment_shape``."""
        ...

    def spread(self, moment: jax.Array) -> jax.Array:
        """Returns ``moment`` in a shape that broadcasts against the parameter."""
        ...

    def with_axis(self, axis: int, size: int) -> "Sharing":
        """Returns the same for a stack along a new axis, each layer with its own blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class AxisBlocks:
    """Describes blocks that are products of whole axes, where an axis may consist of several.

    Attributes:
        axes: for each axis of the parameter the sizes it consists of, and for each of those
            whether its indices keep numbers of their own.
        matrix: see :class:`Sharing`.
    """

    axes: tuple[tuple[tuple[int, bool], ...], ...]
    matrix: Sides | None = None

    @property
    def moment_shape(self) -> Shape:
        """Returns one number per kept index; other axes have size 1."""
        return tuple(math.prod(n for n, kept in axis if kept) for axis in self.axes)

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        return math.prod(self.moment_shape)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean over each block."""
        averaged = [i for i, axis in enumerate(self.axes) if not any(kept for _, kept in axis)]
        x = jnp.mean(x, axis=averaged, keepdims=True) if averaged else x
        if not self._partly_kept:
            return x
        # Only now, when it is small: cutting an axis into heads would gather a tensor whose
        # shards are no whole heads.
        x = whole_where_uneven(x, self.moment_shape)
        parts = [(n if i not in averaged else 1, kept) for i, n, kept in self._parts]
        x = x.reshape([n for n, _ in parts])
        inner = [i for i, (_, kept) in enumerate(parts) if not kept]
        return jnp.mean(x, axis=inner).reshape(self.moment_shape)

    def spread(self, moment: jax.Array) -> jax.Array:
        """Repeats a number over its part of an axis, where it has only a part."""
        if not self._partly_kept:
            return moment
        kept = [n if kept else 1 for _, n, kept in self._parts]
        full = [n if kept or i in self._partly_kept else 1 for i, n, kept in self._parts]
        sizes = [
            math.prod(n for n, _ in axis) if i in self._partly_kept else n
            for i, (axis, n) in enumerate(zip(self.axes, self.moment_shape, strict=True))
        ]
        return jnp.broadcast_to(moment.reshape(kept), full).reshape(sizes)

    def with_axis(self, axis: int, size: int) -> "AxisBlocks":
        """Returns the same with a new axis, all kept."""
        axes = (*self.axes[:axis], ((size, True),), *self.axes[axis:])
        return AxisBlocks(axes, _matrix_with_axis(self.matrix, axis))

    def turned(self) -> "AxisBlocks":
        """Returns the same for a parameter whose last two axes are swapped."""
        *lead, first, last = self.axes
        return AxisBlocks((*lead, last, first), _turned_matrix(self.matrix, len(self.axes)))

    @property
    def _parts(self) -> list[tuple[int, int, bool]]:
        return [(i, n, kept) for i, axis in enumerate(self.axes) for n, kept in axis]

    @property
    def _partly_kept(self) -> set[int]:
        return {
            i
            for i, axis in enumerate(self.axes)
            if any(kept for _, kept in axis) and not all(kept for _, kept in axis)
        }


@dataclasses.dataclass(frozen=True)
class FusedBlocks:
    """Describes several tensors side by side along one axis, each with blocks of its own.

    What is kept has full size along that axis, so that it is sharded as the parameter is: a few
    equal numbers for every head, next to a whole matrix that shares them.

    Attributes:
        axis: along which they lie.
        parts: the blocks of each.
        matrix: see :class:`Sharing`.
    """

    axis: int
    parts: tuple[AxisBlocks, ...]
    matrix: Sides | None = None

    @property
    def moment_shape(self) -> Shape:
        """Returns the full size along the fused axis and along those that a part keeps."""
        shapes = zip(*(part.moment_shape for part in self.parts), strict=True)
        shape = [
            1 if set(kept) == {1} else math.prod(n for n, _ in names)
            for kept, names in zip(shapes, self.parts[0].axes, strict=True)
        ]
        shape[self.axis] = sum(self._sizes)
        return tuple(shape)

    @property
    def blocks(self) -> int:
        """Counts the blocks of the parts."""
        return sum(part.blocks for part in self.parts)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean over each block, repeated over its part of the fused axis."""
        shape = self.moment_shape
        averaged = [i for i, n in enumerate(shape) if n == 1]
        small = jnp.mean(x, axis=averaged, keepdims=True) if averaged else x
        # The parts are no whole shards.
        small = whole_where_uneven(small, (*shape[: self.axis], 1, *shape[self.axis + 1 :]))
        slices = jnp.split(small, list(itertools.accumulate(self._sizes))[:-1], axis=self.axis)
        means = [
            jnp.broadcast_to(part.spread(part.mean(piece)), piece.shape)
            for part, piece in zip(self.parts, slices, strict=True)
        ]
        return place_like(jnp.concatenate(means, axis=self.axis), x, shape)

    def spread(self, moment: jax.Array) -> jax.Array:
        """Returns the moment itself."""
        return moment

    def with_axis(self, axis: int, size: int) -> "FusedBlocks":
        """Returns the same with a new axis, all kept."""
        return FusedBlocks(
            self.axis + (axis <= self.axis),
            tuple(part.with_axis(axis, size) for part in self.parts),
            _matrix_with_axis(self.matrix, axis),
        )

    def turned(self) -> "FusedBlocks":
        """Returns the same for a parameter whose last two axes are swapped."""
        rank = len(self.parts[0].axes)
        return FusedBlocks(
            _turned_axis(self.axis, rank),
            tuple(part.turned() for part in self.parts),
            _turned_matrix(self.matrix, rank),
        )

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(n for n, _ in part.axes[self.axis]) for part in self.parts]


class AxesError(ValueError):
    """Refuses a description of axes that cannot be read."""


@dataclasses.dataclass(frozen=True, init=False)
class Axes:
    """Names the axes of a parameter, and tells which of them keep their own second moment.

    ``"in | out -> out"`` reads: a matrix from ``in`` to ``out`` that keeps one number for each
    output, the mean over the inputs. Parentheses name the parts of one axis, the outermost
    first. ``|`` stands between the two sides of a linear map, of which the side that keeps names
    is the output, the right one if both do; what is no linear map has none. Some names that the
    input keeps are a batch of maps: ``"expert in | out -> expert out"``. A parameter of another
    rank, or of other sizes than given, does not fit. ``"... -> ..."`` fits all and keeps a number
    for each element.

    Args:
        notation: the names, an arrow, and the names that are kept.
        where: says of the sizes by name whether the parameter fits.
        **sizes: sizes by name; of the parts of an axis, all but one must be given.

    Raises:
        AxesError: a ValueError, if the notation cannot be read.

    Examples:
        >>> from microadam_jax.layout.axes import Axes
        >>> Axes("embed | heads head_dim -> heads").fit((512, 8, 64)).moment_shape
        (1, 8, 1)
        >>> Axes("embed | (heads head_dim) -> heads", heads=8).fit((512, 512)).moment_shape
        (1, 8)
        >>> Axes("token embed -> token").fit((32000, 512)).blocks
        32000
    """

    notation: str
    where: Callable[[Mapping[str, int]], bool] | None
    sizes: tuple[tuple[str, int], ...]

    def __init__(
        self,
        notation: str,
        /,
        where: Callable[[Mapping[str, int]], bool] | None = None,
        **sizes: int,
    ) -> None:
        """Reads the notation."""
        object.__setattr__(self, "notation", notation)
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "sizes", tuple(sorted(sizes.items())))
        names = ["..."] if self._elementwise else [name for axis in self._axes for name in axis]
        unknown = [name for name in (*self._kept, *sizes) if name not in names]
        if not self._readable or len(set(names)) < len(names) or unknown:
            raise AxesError(
                f"{notation!r} with sizes {sizes} does not describe axes. Write different names "
                "for all axes, an arrow, and the names that keep numbers of their own, such as "
                "'embed | (heads head_dim) -> heads' with heads=8."
            )

    def fit(self, shape: Shape) -> AxisBlocks | None:
        """Returns the blocks of a parameter of ``shape``; None if these are not its axes."""
        if self._elementwise:
            return elementwise(shape)
        if len(shape) != len(self._axes):
            return None
        sizes = dict(self.sizes)
        for names, size in zip(self._axes, shape, strict=True):
            unknown = [name for name in names if name not in sizes]
            known = math.prod(sizes[name] for name in names if name in sizes)
            if len(unknown) > 1 or known == 0 or size % known:
                return None
            if unknown:
                sizes[unknown[0]] = size // known
            elif size != known:
                return None
        if self.where is not None and not self.where(sizes):
            return None
        axes = tuple(tuple((sizes[n], n in self._kept) for n in names) for names in self._axes)
        return AxisBlocks(axes, self._matrix)

    @property
    def _axes(self) -> list[list[str]]:
        left = self.notation.partition("->")[0]
        tokens = re.findall(r"\(([^()]*)\)|([^\s()|]+)", left)
        return [(group or name).split() for group, name in tokens]

    @property
    def _kept(self) -> list[str]:
        return self.notation.partition("->")[2].split()

    @property
    def _elementwise(self) -> bool:
        return self.notation == "... -> ..."

    @property
    def _readable(self) -> bool:
        left, arrow, _ = self.notation.partition("->")
        names = re.sub(r"\([\w\s]*\)", " ", left)
        return self._elementwise or bool(arrow and re.fullmatch(r"[\w\s]*\|?[\w\s]*", names))

    @property
    def _matrix(self) -> Sides | None:
        left, bar, _ = self.notation.partition("->")[0].partition("|")
        if not bar:
            return None
        cut = len(re.findall(r"\([^()]*\)|[^\s()]+", left))
        sides = tuple(range(cut)), tuple(range(cut, len(self._axes)))
        kept = {i for i, names in enumerate(self._axes) if set(names) & set(self._kept)}
        inputs, outputs = sides[::-1] if kept and kept <= set(sides[0]) else sides
        batch = {i for i in inputs if set(self._axes[i]) <= set(self._kept)}
        return tuple(i for i in inputs if i not in batch) or inputs, outputs

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{self.notation} ({sizes})" if sizes else self.notation


ELEMENTWISE = Axes("... -> ...")


@dataclasses.dataclass(frozen=True)
class Fused:
    """Describes tensors side by side along one axis, as query, key and value often are.

    Args:
        parts: the axes of each tensor; all of one rank.
        axis: along which they lie.
        shares: how much of the axis each takes, relative to the others.

    Raises:
        AxesError: a ValueError, if there are not as many ``shares`` as ``parts``.

    Examples:
        >>> from microadam_jax.layout.axes import Axes, Fused
        >>> heads = Axes("embed | slot heads head_dim -> slot heads")
        >>> each = Axes("embed | slot heads head_dim -> slot heads head_dim")
        >>> Fused((heads, heads, each), axis=1).fit((512, 3, 8, 64)).blocks
        528
    """

    parts: tuple[Axes, ...]
    axis: int = -1
    shares: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))  # hashable, if lists were given
        if self.shares is not None:
            object.__setattr__(self, "shares", tuple(self.shares))
        if self.shares is not None and len(self.shares) != len(self.parts):
            raise AxesError(f"Fused got {len(self.parts)} parts and shares {self.shares}.")

    def fit(self, shape: Shape) -> FusedBlocks | None:
        """Returns the blocks of a parameter of ``shape``; None if these are not its axes."""
        shares = self.shares or (1,) * len(self.parts)
        if not -len(shape) <= self.axis < len(shape) or shape[self.axis] % sum(shares):
            return None
        axis = self.axis % len(shape)
        unit = shape[axis] // sum(shares)
        parts = [
            part.fit((*shape[:axis], unit * share, *shape[axis + 1 :]))
            for part, share in zip(self.parts, shares, strict=True)
        ]
        fitting = tuple(part for part in parts if part is not None)
        if len(fitting) < len(parts):
            return None
        return FusedBlocks(axis, fitting, fitting[0].matrix)

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Describes a kernel from inputs to outputs, which some layers store the other way round.

    Those of :func:`transformer_rules` are such. A rule of your own describes a parameter as it is.

    Args:
        axes: the axes where the outputs are last.
    """

    axes: Axes | Fused

    def fit(self, shape: Shape, turned: bool = False) -> AxisBlocks | FusedBlocks | None:
        """Returns the blocks of a parameter of ``shape``; None if these are not its axes.

        Args:
            shape: the parameter's shape.
            turned: whether its last two axes are the outputs and the inputs.
        """
        if not turned:
            return self.axes.fit(shape)
        found = self.axes.fit((*shape[:-2], shape[-1], shape[-2]))
        return None if found is None else found.turned()

    def __str__(self) -> str:
        return str(self.axes)


def elementwise(shape: Shape) -> AxisBlocks:
    """Returns blocks of one element."""
    return AxisBlocks(tuple(((size, True),) for size in shape))


def _matrix_with_axis(matrix: Sides | None, axis: int) -> Sides | None:
    if matrix is None:
        return None
    inputs, outputs = (tuple(i + (axis <= i) for i in side) for side in matrix)
    return inputs, outputs


def _turned_axis(axis: int, rank: int) -> int:
    return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)


def _turned_matrix(matrix: Sides | None, rank: int) -> Sides | None:
    if matrix is None:
        return None
    inputs, outputs = (tuple(sorted(_turned_axis(i, rank) for i in side)) for side in matrix)
    return inputs, outputs


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
