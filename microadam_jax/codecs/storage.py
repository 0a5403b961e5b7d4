"""How one field of a state is stored: which codec for which leaf."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.boxes import box_path, boxed_blocks
from microadam_jax.codecs.codec import Codec, as_codec
from microadam_jax.codecs.plain import Plain
from microadam_jax.layout.path_rules import PathRules, path_pattern
from microadam_jax.layout.stacks import STACKED, is_small, layer_axes
from microadam_jax.memory import remark
from microadam_jax.sharding import moment_zeros, state_zeros, unused_state
from microadam_jax.trees import KeyPath, map_with_path, path_name

FLOAT32 = Plain("float32")
# What `STACKED` was at first, of which the labels of stored states have digests.
FIRST_STACKED = (
    r"(^|/)(\w*_)?(layers|blocks|stack|h|encoderblock)/(?!\d+(/|$))|(^|/)(Scan|Vmap)\w*_\d+/"
)
Field = dict[str, dict[str, Any]]
Slots = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Storage:
    r"""Stores a state field: a codec, exceptions by path, and what stays in float32.

    In the state the field is a dictionary with one key, the storage's :attr:`label`, so that a
    checkpoint can only be restored by the storage that saved it. Below it stands a tree of the
    parameters' structure for each array of the codecs.

    Args:
        codec: a codec or its name.
        rules: pairs of a path pattern and a codec for the leaves whose path it matches; the first
            match counts. A pattern is a regular expression for the end of a path, as for
            :class:`Partition`: ``"embedding"``, or ``"embedding/.*"`` for what stands below one.
        min_size: leaves with fewer elements stay in float32. The size is that of the whole
            leaf, never of a device's shard of it, and of one layer where layers are stacked.
        min_row: leaves whose last axis is shorter stay in float32, because the scales of short
            blocks would take more than they save.
        stacked: a path pattern for what stacks layers for a scan, as for :class:`Partition`.
        layer_axis: the layer axis of those.

    Raises:
        TypeError: if a codec is neither a codec nor a name.
        ValueError: if a name is unknown, or a pattern is not a regular expression.

    Examples:
        >>> from microadam_jax import Storage
        >>> Storage("dynamic8", rules=(("embedding", "float32"),)).label
        'dynamic8_b256+float32_...'
    """

    codec: Codec | str
    rules: Sequence[tuple[str, Codec | str]] = ()
    min_size: int = 4096
    min_row: int = 16
    stacked: str = STACKED
    layer_axis: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", as_codec(self.codec))
        rules = PathRules(self.rules)
        rules = PathRules((pattern, as_codec(codec)) for pattern, codec in rules)
        object.__setattr__(self, "rules", rules)
        path_pattern(self.stacked)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Returns all codecs, that of small leaves last."""
        codecs = map(as_codec, (self.codec, *(codec for _, codec in self.rules)))
        named = {codec.name: codec for codec in codecs}
        return (*named.values(), FLOAT32)

    def signed(self, field: str) -> "Storage":
        """Returns this storage, for a field that has both signs.

        Raises:
            ValueError: if one of its codecs has no negative numbers.
        """
        unsigned = [codec.name for codec in self.codecs if not codec.signed]
        if unsigned:
            raise ValueError(f"{field!r} has both signs, which {unsigned[0]} cannot hold.")
        return self

    @property
    def label(self) -> str:
        """Returns the names of the codecs; with rules or other limits, also a digest of those."""
        names = "+".join(dict.fromkeys(codec.name for codec in self.codecs[:-1]))
        rules = tuple((pattern, as_codec(codec).name) for pattern, codec in self.rules)
        stacked = FIRST_STACKED if self.stacked == STACKED else self.stacked
        limits = (rules, self.min_size, self.min_row, stacked, self.layer_axis)
        if limits == ((), 4096, 16, FIRST_STACKED, 0):
            return names
        return f"{names}_{zlib.crc32(repr(limits).encode()):08x}"

    @property
    def slots(self) -> tuple[str, ...]:
        """Returns the names of all arrays of all codecs."""
        return tuple(dict.fromkeys(slot for c in self.codecs for slot in c.Encoded._fields))

    def assign(self, tree: Any) -> Callable[[KeyPath, Any], Codec]:
        """Returns a function from a leaf's path and the leaf to its codec.

        Args:
            tree: the tree of the leaves, which tells stacks from single layers.
        """
        axis_of = layer_axes(tree, self.stacked, self.layer_axis)

        def codec_of(path: KeyPath, leaf: Any) -> Codec:
            shape, name = tuple(leaf.shape), path_name(box_path(path))
            axis = axis_of(path, leaf)
            if 0 in shape or is_small(shape, axis, self.min_size, self.min_row):
                return FLOAT32
            codec = next(PathRules(self.rules).matching(name), self.codec)
            return as_codec(codec).for_layers(axis)

        return codec_of

    def zeros(self, tree: Any) -> Field:
        """Returns the field for a tree of zeros, placed as the tree is."""
        codec_of = self.assign(tree)

        def zeros_of(path: KeyPath, leaf: jax.Array) -> Slots:
            codec = codec_of(path, leaf)
            return self._slots_of(path, codec, codec.zeros(leaf), leaf)

        return self._field(map_with_path(zeros_of, len(self.slots), tree), tree)

    def encode_tree(self, tree: Any) -> Field:
        """Returns the field for a tree of values, rounded to nearest."""
        codec_of = self.assign(tree)

        def encode(path: KeyPath, leaf: jax.Array) -> Slots:
            codec = codec_of(path, leaf)
            encoded = codec.encode(leaf.astype(jnp.float32), None)
            return self._slots_of(path, codec, encoded, leaf)

        return self._field(map_with_path(encode, len(self.slots), tree), tree)

    def columns(self, field: Field, path: str = "") -> tuple[Any, ...]:
        """Returns the trees of a field's arrays.

        Raises:
            ValueError: if the field was stored otherwise.
        """
        if not isinstance(field, dict) or tuple(field) != (self.label,):
            found = ", ".join(map(str, field)) if isinstance(field, dict) else "no codec"
            raise ValueError(
                f"The state's field {path!r} was stored with {found}, and this optimizer stores it "
                f"with {self.label}. Restore it with the codecs that it was saved with."
            )
        return tuple(field[self.label][slot] for slot in self.slots)

    def field(self, columns: Sequence[Any]) -> Field:
        """Returns the field that has these trees of arrays."""
        return {self.label: dict(zip(self.slots, columns, strict=True))}

    def codec_for(self, codec: Codec, slots: Slots) -> Codec:
        """Returns the leaf's codec: what :meth:`assign` says."""
        del slots
        return codec

    def encoded(self, codec: Codec, slots: Slots) -> Any:
        """Returns those of ``slots`` that the leaf's codec uses, as it made them."""
        by_name = dict(zip(self.slots, slots, strict=True))
        return codec.Encoded(*(by_name[slot] for slot in codec.Encoded._fields))

    def replaced(self, slots: Slots, encoded: Any) -> Slots:
        """Returns ``slots`` with what a codec made."""
        by_name = dict(zip(encoded._fields, encoded, strict=True))
        return tuple(
            by_name.get(slot, before) for slot, before in zip(self.slots, slots, strict=True)
        )

    def require(self, path: KeyPath, codec: Codec, slots: Slots, leaf: Any) -> None:
        """Refuses slots that do not hold a leaf of the shape of ``leaf``.

        Raises:
            ValueError: if shapes or dtypes differ.
        """
        stored = [(x.shape, str(x.dtype)) for x in self.encoded(codec, slots)]
        wanted = _types_of(codec, leaf.shape)
        if stored != wanted:
            raise ValueError(
                f"The state of {path_name(path)!r} holds arrays {stored}; {codec.name} stores a "
                f"leaf of shape {leaf.shape} in {wanted}. Use the codecs it was made with."
            )

    def _slots_of(self, path: KeyPath, codec: Codec, encoded: Any, leaf: jax.Array) -> Slots:
        """The arrays of ``encoded``, and next to nothing in the slots of other codecs."""
        if codec == FLOAT32 and codec != self.codec:
            remark(path, "too small for its codec, or excepted: kept in float32")
        by_name = dict(zip(encoded._fields, encoded, strict=True))

        def unused() -> jax.Array:
            if math.prod(leaf.shape) < max(1, self.min_size):
                return unused_state(leaf)
            return moment_zeros(leaf, (1,) * leaf.ndim, jnp.uint8)

        return tuple(by_name[slot] if slot in by_name else unused() for slot in self.slots)

    def _field(self, columns: Sequence[Any], tree: Any) -> Field:
        return self.field([boxed_blocks(column, tree) for column in columns])


@dataclasses.dataclass(frozen=True)
class Unstored:
    """Keeps a field as it is, a tree of arrays, with the methods of :class:`Storage`.

    Args:
        dtype: of the arrays that :meth:`zeros` makes.
    """

    dtype: DTypeLike = jnp.float32

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Returns the one there is."""
        return (Plain(str(jnp.dtype(self.dtype))),)

    def assign(self, tree: Any) -> Callable[[KeyPath, Any], Codec]:
        """Returns the codec of every leaf, which is asked for its properties only."""
        del tree
        return lambda path, leaf: FLOAT32

    def zeros(self, tree: Any) -> Any:
        """Returns zeros placed as the tree is."""
        return jax.tree.map(lambda leaf: state_zeros(leaf, leaf.shape, self.dtype), tree)

    def columns(self, field: Any, path: str = "") -> tuple[Any, ...]:
        """Returns the one tree there is.

        Raises:
            ValueError: if the field was stored through a codec.
        """
        if isinstance(field, dict) and len(field) == 1:
            (label, arrays) = next(iter(field.items()))
            if isinstance(arrays, dict) and "codes" in arrays:
                raise ValueError(
                    f"The state's field {path!r} was stored with {label}, and this optimizer "
                    "stores it without codec. Restore it with the codec it was saved with."
                )
        return (field,)

    def field(self, columns: Sequence[Any]) -> Any:
        """Returns the field that has this tree."""
        return columns[0]

    def codec_for(self, codec: Codec, slots: Slots) -> Codec:
        """Returns the codec that keeps the dtype of the leaf."""
        del codec
        return Plain(str(slots[0].dtype))

    def encoded(self, codec: Codec, slots: Slots) -> Any:
        """Returns the leaf, as that codec makes it."""
        return codec.Encoded(*slots)

    def replaced(self, slots: Slots, encoded: Any) -> Slots:
        """Returns the quantized arrays."""
        del slots
        return tuple(encoded)

    def require(self, path: KeyPath, codec: Codec, slots: Slots, leaf: Any) -> None:
        """Refuses an array of another shape than ``leaf``.

        Raises:
            ValueError: if there is one.
        """
        del codec
        if slots[0].shape != leaf.shape:
            raise ValueError(
                f"The state of {path_name(path)!r} has shape {slots[0].shape} where its parameter "
                f"has {leaf.shape}."
            )


@functools.cache
def _types_of(codec: Codec, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what a codec makes of a leaf: large trees have many of few shapes."""
    expected = jax.eval_shape(codec.zeros, jax.ShapeDtypeStruct(shape, jnp.float32))
    return [(x.shape, str(x.dtype)) for x in expected]


def as_storage(storage: "Storage | Codec | str | Sequence[tuple[str, Codec | str]]") -> Storage:
    """Returns the storage that a codec, its name or a list of rules stands for.

    A list of rules ends with the pattern that matches all paths, ``".*"``.

    Raises:
        TypeError: if ``storage`` is none of these.
        ValueError: if a name is unknown, or a list of rules has no such end.
    """
    if isinstance(storage, Storage):
        return storage
    if isinstance(storage, Sequence) and not isinstance(storage, str):
        *rules, (last, codec) = PathRules(storage)
        if last != ".*":
            raise ValueError(
                "A list of rules ends with a codec for all other leaves, ('.*', codec); "
                f"this one ends with {last!r}."
            )
        return Storage(codec, rules)
    return Storage(storage)
