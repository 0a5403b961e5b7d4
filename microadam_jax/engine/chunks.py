"""How a leaf is cut into chunks of rows, whatever devices its axes are sharded over."""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.codecs.rounding import Rows

CACHED = 2**17  # elements of a chunk, about, whose temporaries stay in a CPU's cache
TILES = (32, 8)  # rows of bytes, and of float32, that an accelerator moves together


Numbers = tuple[jax.Array | int, ...]
ArrayType = Any  # of shape and dtype, as of jax.typeof


class Chunks(NamedTuple):
    """Equal parts of a leaf, each of a contiguous segment of rows from every device's part.

    An axis of ``n`` becomes ``(shards, cut, length)``, and a chunk takes ``length`` rows
    from each shard: nothing has to move, however the axis is sharded. Rows that are neighbours
    stay neighbours, as tiles of an accelerator need it.

    Attributes:
        shape: the leaf's shape.
        shards: for each of its axes but the last, over how many devices it may be sharded.
        cuts: for each of them, into how many chunks it is cut.
        slices: True if an axis on one device stays one axis, of which chunks are slices: less to
            compile for CPUs. TPUs' compiler would then copy what it updates.
    """

    shape: tuple[int, ...]
    shards: tuple[int, ...]
    cuts: tuple[int, ...]
    slices: bool

    @classmethod
    def of_about(cls, leaf: jax.Array, size: int, slices: bool = False) -> "Chunks":
        """Chunks of about ``size`` elements, or one."""
        shards = tuple(_shards(leaf, axis) for axis in range(leaf.ndim - 1 if leaf.size else 0))
        wanted, cuts = max(1, math.ceil(leaf.size / size)), []
        for axis, among in enumerate(shards):
            rows = leaf.shape[axis] // among
            cuts.append(_cut(rows, wanted, tiled=axis == leaf.ndim - 2))
            wanted = math.ceil(wanted / cuts[-1])
        return cls(leaf.shape, shards, tuple(cuts), slices)

    @property
    def total(self) -> int:
        """The number of chunks."""
        return math.prod(self.cuts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The rows of each run, along each axis but the last."""
        return tuple(
            n // shards // cut
            for n, shards, cut in zip(self.shape, self.shards, self.cuts, strict=False)
        )

    def numbers(self, chunk: jax.Array) -> Numbers:
        """The number of the cut of each axis, for one of the chunks."""
        numbers: list[jax.Array | int] = []
        left = self.total
        for cut in self.cuts:
            left //= cut
            if cut == 1:
                numbers.append(0)
                continue
            # Not % and //, which take a dozen operations to get negative numbers right.
            size = jnp.asarray(cut, chunk.dtype)
            numbers.append(chunk if left == 1 else jax.lax.rem(chunk, size))
            chunk = chunk if left == 1 else jax.lax.div(chunk, size)
        return tuple(numbers)

    def rows(self, numbers: Numbers) -> Rows:
        """The rows of the leaf that a chunk holds."""
        starts = tuple(map(operator.mul, numbers, self.lengths))
        steps = tuple(map(operator.mul, self.cuts, self.lengths))
        return Rows(self.shape[:-1], starts, self.lengths, steps)

    def cut(self, x: jax.Array) -> jax.Array:
        """``x``, which has the leaf's axes or size 1 instead, with its cut axes in three."""
        return self._as_carried(x).reshape([n for n, _, _ in self._axes(x.shape)])

    def joined(self, x: jax.Array, whole: ArrayType) -> jax.Array:
        """The inverse of :meth:`cut`, for an array of type ``whole``."""
        return _viewed(x, whole.dtype).reshape(whole.shape)

    def take(self, x: jax.Array, whole: ArrayType, numbers: Numbers) -> jax.Array:
        """A chunk of what was cut from an array of type ``whole``."""
        cuts = self._cuts_of(whole.shape)
        if math.prod(cuts) > 1:
            starts, sizes = self._place(whole.shape, numbers)
            part = [n // cut for n, cut in zip(whole.shape, cuts, strict=True)]
            x = jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)
            x = x.reshape(part)
        return _viewed(x, whole.dtype)

    def put(self, x: jax.Array, whole: ArrayType, part: jax.Array, numbers: Numbers) -> jax.Array:
        """``x`` with a chunk replaced."""
        cuts = self._cuts_of(whole.shape)
        # Joined first: axes of a sharded array can be joined or parted, not both at once.
        part = part.reshape([n // cut for n, cut in zip(whole.shape, cuts, strict=True)])
        part = self._as_carried(part)
        if math.prod(cuts) == 1:
            return part
        starts, sizes = self._place(whole.shape, numbers)
        part = part.reshape(sizes)
        return jax.lax.dynamic_update_slice(x, part, starts, allow_negative_indices=False)

    def _as_carried(self, x: jax.Array) -> jax.Array:
        """``x`` as loops carry it: on CPUs as integers if it is a float of less than 32 bits.

        CPUs' compiler widens such an array as a whole to update a chunk of it.
        """
        bits = 8 * x.dtype.itemsize
        narrow = self.slices and jnp.issubdtype(x.dtype, jnp.floating) and bits < 32
        return _viewed(x, jnp.dtype(f"uint{bits}")) if narrow else x

    def _cuts_of(self, whole: tuple[int, ...]) -> list[int]:
        """Into how many chunks each axis of an array is cut: the leaf's axes, unless of size 1."""
        known = len(self.cuts)
        return [
            self.cuts[axis] if axis < known and n == self.shape[axis] else 1
            for axis, n in enumerate(whole)
        ]

    def _axes(self, whole: tuple[int, ...]) -> list[tuple[int, int | None, int]]:
        """The sizes of the cut array's axes, each with the leaf's axis whose cuts it numbers."""
        axes: list[tuple[int, int | None, int]] = []
        for axis, (n, cut) in enumerate(zip(whole, self._cuts_of(whole), strict=True)):
            if cut == 1:
                axes.append((n, None, n))
                continue
            shards, length = self.shards[axis], self.lengths[axis]
            if shards == 1 and self.slices:
                axes.append((n, axis, length))
                continue
            # Axes of size 1 are left out: CPUs would order them otherwise, and copy the array.
            axes += [(shards, None, shards)] * (shards > 1)
            axes.append((cut, axis, 1))
            axes += [(length, None, length)] * (length > 1)
        return axes

    def _place(
        self, whole: tuple[int, ...], numbers: Numbers
    ) -> tuple[list[jax.Array | int], list[int]]:
        """Returns where in the cut array a chunk begins, and its size there."""
        axes = self._axes(whole)
        starts = [0 if axis is None else numbers[axis] * length for _, axis, length in axes]
        return starts, [length for _, _, length in axes]


def _viewed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The bits of ``x`` as another type of the same width."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _cut(rows: int, wanted: int, tiled: bool) -> int:
    """Into how many parts rows are cut, of about ``wanted``, and into tiles if they are the last.

    Leaves of different shapes get parts of equal sizes where they can: to CPUs' compiler, equal
    operations on them are one.
    """
    divisors = [cut for cut in range(1, min(rows, 2 * wanted) + 1) if rows % cut == 0]
    if not tiled:
        return max(cut for cut in divisors if cut <= wanted)
    enough = [cut for cut in divisors if cut >= wanted]
    in_tiles = [[cut for cut in enough if rows // cut % tile == 0] for tile in TILES]
    choices = [*in_tiles, enough, divisors[-1:]]
    return min(next(filter(None, choices)))


def _shards(leaf: jax.Array, axis: int) -> int:
    """Over how many devices an axis may be cut: over a divisor of that."""
    rows, sharding = leaf.shape[axis], jax.typeof(leaf).sharding
    if sharding.mesh.empty:
        return math.gcd(rows, jax.device_count())
    names = (*sharding.spec, *[None] * leaf.ndim)[axis]
    names = names if isinstance(names, tuple) else (names,)
    known = math.prod(sharding.mesh.shape[name] for name in names if name)
    unknown = math.prod(sharding.mesh.shape[name] for name in sharding.mesh.auto_axes)
    return known * math.gcd(rows // known, unknown)
