"""One leaf of a state of which each field is stored through a codec of its own."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.codecs import Codec, Storage, Unstored
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.transforms.chunks import Arrays
from microadam_jax.trees import KeyPath


class StoredField(NamedTuple):
    """A field that has an array for each leaf, or several: its columns."""

    name: str
    storage: Storage | Unstored
    codec_of: Callable[[KeyPath, Any], Codec]
    columns: tuple[Any, ...]


class StoredLeaf(NamedTuple):
    """How the fields of one leaf are stored.

    Attributes:
        fields: the fields.
        codecs: the codec that each has for this leaf.
    """

    fields: Sequence[StoredField]
    codecs: Sequence[Codec]

    def require(self, path: KeyPath, slots: Arrays, leaf: jax.Array) -> None:
        """Refuses slots that do not hold ``leaf``; see :meth:`Storage.require`."""
        for field, codec, own in self._each(slots):
            field.storage.require(path, codec, own, leaf)

    def decode(self, slots: Arrays, shape: tuple[int, ...]) -> Iterator[jax.Array]:
        """What each field holds."""
        return (field.storage.decode(codec, own, shape) for field, codec, own in self._each(slots))

    def measure(self, moments: Sequence[jax.Array], runs: tuple[int, ...] = ()) -> Arrays:
        """What some rows contribute to the arrays that all rows share; see :class:`Codec`."""
        measured = (
            codec.measure(moment.astype(jnp.float32), runs)
            for codec, moment in zip(self.codecs, moments, strict=True)
        )
        return tuple(x for x in measured if x is not None)

    def combine(self, measured: Arrays) -> Arrays:
        """What all rows share, from the largest that runs of them contribute."""
        sharing = [codec for codec in self.codecs if codec.shared is not None]
        found = (codec.measure(x) for codec, x in zip(sharing, measured, strict=True))
        return tuple(x for x in found if x is not None)

    def encode(
        self,
        moments: Sequence[jax.Array],
        slots: Arrays,
        shared: Arrays,
        draw: Callable[[str, Rows], Draw],
        rows: Rows,
    ) -> Arrays:
        """The slots of some rows of the leaf.

        Args:
            moments: what each field shall hold.
            slots: what it was stored in.
            shared: of each codec that has one, the array that all rows share.
            draw: what the random numbers of a field follow from.
            rows: which rows.
        """
        encoded: list[jax.Array] = []
        arrays = iter(shared)
        for (field, codec, own), moment in zip(self._each(slots), moments, strict=True):
            key = draw(field.name, rows) if codec.needs_key else None
            of_all_rows = None if codec.shared is None else next(arrays)
            encoded += field.storage.encode(codec, moment, own, key, of_all_rows)
        return tuple(encoded)

    def part(self, slots: Arrays) -> tuple[Arrays, Arrays]:
        """The slots that have their own values for each row, and those that rows share."""
        flagged = list(zip(slots, self._shared, strict=True))
        return tuple(x for x, shared in flagged if not shared), tuple(
            x for x, shared in flagged if shared
        )

    def join(self, by_row: Arrays, shared: Arrays) -> Arrays:
        """The slots that :meth:`part` took apart."""
        sources = iter(by_row), iter(shared)
        return tuple(next(sources[shared]) for shared in self._shared)

    @property
    def _shared(self) -> list[bool]:
        return [
            slot == codec.shared
            for field, codec in zip(self.fields, self.codecs, strict=True)
            for slot in field.storage.slots
        ]

    def _each(self, slots: Arrays) -> Iterator[tuple[StoredField, Codec, Arrays]]:
        widths = [len(field.columns) for field in self.fields]
        return zip(self.fields, self.codecs, split(slots, widths), strict=True)


def split(values: Arrays, widths: Sequence[int]) -> list[Arrays]:
    """``values`` cut into pieces of the given numbers."""
    ends = list(itertools.accumulate(widths))
    return [values[end - width : end] for end, width in zip(ends, widths, strict=True)]
