"""How one field of a state is stored: which codec for which leaf."""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.arguments import require_not_negative
from microadam_jax.codecs.codec import Codec, as_codec
from microadam_jax.codecs.plain import Plain, PlainValues
from microadam_jax.codecs.rank1 import RankOne
from microadam_jax.execution import all_leaves, remark
from microadam_jax.layout.path_rules import PathRules, matches_none, path_pattern
from microadam_jax.layout.stacks import STACKED, is_small, layer_axes
from microadam_jax.state_arrays import moment_zeros, state_zeros, unused_state
from microadam_jax.trees import (
    KeyPath,
    LeafKey,
    LeafShape,
    boxed_blocks,
    boxed_like,
    leaf_shapes,
    leaves_for,
    map_with_path,
    path_name,
    unstored_arrays,
)

FLOAT32 = Plain("float32")
# What `STACKED` was at first, of which the labels of stored states have digests.
FIRST_STACKED = (
    r"(^|/)(\w*_)?(layers|blocks|stack|h|encoderblock)/(?!\d+(/|$))|(^|/)(Scan|Vmap)\w*_\d+/"
)
Field = dict[str, dict[str, Any]]
Slots = tuple[jax.Array, ...]
Keys = Callable[[], Iterable[LeafKey]]


class StoredLeaf(NamedTuple):
    """Holds the moment of one parameter.

    Attributes:
        codec: its codec.
        encoded: the arrays that the codec made of it.
        key: for the codec's random numbers; None if it draws none.
    """

    codec: Codec
    encoded: Any
    key: LeafKey | None


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
            :class:`Partition`: ``"embedding"``, or ``"embedding/.*"`` for what stands below one. A
            rule that matches no leaf is warned of when a state is made.
        min_size: leaves with fewer elements stay in float32. The size is that of the whole
            leaf, never of a device's shard of it, and of one layer where layers are stacked.
        min_row: leaves whose last axis is shorter stay in float32, because the scales of short
            blocks would take more than they save.
        stacked: a path pattern for what stacks layers for a scan, as for :class:`Partition`.
        layer_axis: the layer axis of those.
        unit: what a transformation divides the values by before it stores them, which it says
            itself; for the label.

    Raises:
        TypeError: if a codec is neither a codec nor a name.
        ValueError: if a name is unknown, a pattern is not a regular expression, or a number is not
            an integer of at least 0.

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
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", as_codec(self.codec))
        rules = PathRules(self.rules)
        rules = PathRules((pattern, as_codec(codec)) for pattern, codec in rules)
        object.__setattr__(self, "rules", rules)
        path_pattern(self.stacked)
        for name in ("min_size", "min_row", "layer_axis"):
            require_not_negative(name, getattr(self, name))

    @functools.cached_property
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

    @functools.cached_property
    def label(self) -> str:
        """Returns the names of the codecs; with rules or other limits, also a digest of those."""
        names = "+".join(codec.name for codec in self.codecs[:-1])
        names += f"_over_{self.unit}" * bool(self.unit)
        rules = tuple((pattern, as_codec(codec).name) for pattern, codec in self.rules)
        stacked = FIRST_STACKED if self.stacked == STACKED else self.stacked
        limits = (rules, self.min_size, self.min_row, stacked, self.layer_axis)
        if limits == ((), 4096, 16, FIRST_STACKED, 0):
            return names
        return f"{names}_{zlib.crc32(repr(limits).encode()):08x}"

    @functools.cached_property
    def slots(self) -> tuple[str, ...]:
        """Returns the names of all arrays of all codecs."""
        return tuple(dict.fromkeys(slot for c in self.codecs for slot in c.Encoded._fields))

    def assign(self, tree: Any) -> dict[KeyPath, Codec]:
        """Returns the codec of each leaf of a tree by its path.

        Args:
            tree: the tree of the leaves, which tells stacks from single layers.
        """
        leaves = leaf_shapes(tree)
        codecs = _codecs(self, tuple(leaves.values()), all_leaves(leaves))
        return dict(zip(leaves, codecs, strict=True))

    def _codec(self, leaf: LeafShape, axis: int | None) -> Codec:
        if 0 in leaf.shape or is_small(leaf.shape, axis, self.min_size, self.min_row):
            return FLOAT32
        codec = as_codec(next(PathRules(self.rules).matching(leaf.path), self.codec))
        return codec.for_layers(axis) if isinstance(codec, RankOne) else codec

    def zeros(self, tree: Any) -> Field:
        """Returns the field for a tree of zeros, placed as the tree is."""
        return self._field(tree, lambda codec, leaf: codec.zeros(leaf))

    def encode_tree(self, tree: Any) -> Field:
        """Returns the field for a tree of values, rounded to nearest."""
        return self._field(tree, lambda codec, leaf: codec.encode(leaf.astype(jnp.float32), None))

    def take(
        self, name: str, field: Field, leaves: Mapping[KeyPath, LeafShape], keys: Keys
    ) -> list[StoredLeaf]:
        """Takes a field apart.

        Args:
            name: of the field.
            field: from a state.
            leaves: those that it was made for (:func:`leaf_shapes`).
            keys: makes a random key for each leaf, in their order.

        Raises:
            ValueError: if the field was stored otherwise, or for leaves of other shapes.
        """
        if not isinstance(field, dict) or tuple(field) != (self.label,):
            found = ", ".join(map(str, field)) if isinstance(field, dict) else "no codec"
            raise ValueError(
                f"The state's field {name!r} was stored with {found}, and this optimizer stores it "
                f"with {self.label}. Restore it with the codecs that it was saved with."
            )
        codecs = _codecs(self, tuple(leaves.values()), all_leaves(leaves))
        draws = [codec.needs_key for codec in codecs]
        drawn = keys() if any(draws) else [None] * len(codecs)
        own = [key if needs else None for key, needs in zip(drawn, draws, strict=True)]
        columns = [leaves_for(name, field[self.label][slot], leaves) for slot in self.slots]
        rows = zip(leaves.items(), codecs, own, zip(*columns, strict=True), strict=True)
        return [self._leaf(*leaf, codec, key, slots) for leaf, codec, key, slots in rows]

    def _leaf(
        self, path: KeyPath, leaf: LeafShape, codec: Codec, key: Any, slots: Sequence[jax.Array]
    ) -> StoredLeaf:
        by_name = dict(zip(self.slots, slots, strict=True))
        encoded = codec.Encoded(*map(by_name.get, codec.Encoded._fields))
        stored = tuple((x.shape, x.dtype) for x in encoded)
        wanted = _stored_types(codec, leaf.shape)
        if stored != wanted:
            raise ValueError(
                f"The state of {path_name(path)!r} holds arrays {_text(stored)}; {codec.name} "
                f"stores a leaf of shape {leaf.shape} in {_text(wanted)}. Use the codecs it was "
                "made with."
            )
        return StoredLeaf(codec, encoded, key)

    def put(self, field: Field, encoded: Sequence[Any]) -> Field:
        """Returns ``field`` with what the codecs of its leaves made."""
        arrays = field[self.label]

        def column(slot: str) -> Any:
            before, structure = jax.tree.flatten(arrays[slot])
            pairs = zip(encoded, before, strict=True)
            return structure.unflatten(getattr(new, slot, old) for new, old in pairs)

        return {self.label: {slot: column(slot) for slot in self.slots}}

    def _field(self, tree: Any, encode: Callable[[Codec, jax.Array], Any]) -> Field:
        codecs = self.assign(tree)

        def slots_of(path: KeyPath, leaf: jax.Array) -> Slots:
            """The arrays of the leaf's codec, and next to nothing in the slots of other codecs."""
            codec = codecs[path]
            encoded = encode(codec, leaf)
            if codec == FLOAT32 and codec != self.codec:
                remark(path, "too small for its codec, or excepted: kept in float32")
            by_name = dict(zip(encoded._fields, encoded, strict=True))

            def unused() -> jax.Array:
                if math.prod(leaf.shape) < max(1, self.min_size):
                    return unused_state(leaf)
                return moment_zeros(leaf, (1,) * leaf.ndim, jnp.uint8)

            return tuple(by_name[slot] if slot in by_name else unused() for slot in self.slots)

        columns = map_with_path(slots_of, len(self.slots), tree)
        self._warn_unmatched([leaf.path for leaf in leaf_shapes(tree).values()])
        boxed = (boxed_blocks(column, tree) for column in columns)
        return {self.label: dict(zip(self.slots, boxed, strict=True))}

    def _warn_unmatched(self, paths: Sequence[str]) -> None:
        for pattern, _ in self.rules:
            if paths and not any(map(path_pattern(pattern).search, paths)):
                warnings.warn(
                    f"The rule for {pattern!r} in a Storage {matches_none(paths)}. Mend it, or "
                    "leave the rule out.",
                    UserWarning,
                    stacklevel=2,
                )


@functools.lru_cache(maxsize=16)
def _codecs(
    storage: Storage, leaves: tuple[LeafShape, ...], among: tuple[LeafShape, ...]
) -> tuple[Codec, ...]:
    """Returns the codecs of leaves among others, found once for all steps."""
    axes = layer_axes(among, storage.stacked, storage.layer_axis)
    return tuple(storage._codec(leaf, axes[leaf.path]) for leaf in leaves)


@functools.lru_cache(maxsize=4096)
def _stored_types(codec: Codec, shape: tuple[int, ...]) -> tuple[tuple[Any, Any], ...]:
    """Returns shape and dtype of each array in which a codec stores a leaf."""
    leaf: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = jax.eval_shape(lambda: codec.zeros(leaf))
    return tuple((x.shape, x.dtype) for x in arrays)


def _text(types: tuple[tuple[Any, Any], ...]) -> str:
    return str([(shape, str(dtype)) for shape, dtype in types])


@dataclasses.dataclass(frozen=True)
class Unstored:
    """Keeps a field as it is, a tree of arrays; what :class:`Storage` is for codes.

    Args:
        dtype: of the arrays that :meth:`zeros` makes.
    """

    dtype: DTypeLike = jnp.float32

    def zeros(self, tree: Any) -> Any:
        """Returns zeros placed as the tree is."""
        return jax.tree.map(lambda leaf: state_zeros(leaf, leaf.shape, self.dtype), tree)

    def take(
        self, name: str, field: Any, leaves: Mapping[KeyPath, LeafShape], keys: Keys
    ) -> list[StoredLeaf]:
        """Takes a field apart, as :meth:`Storage.take` does; each leaf keeps its dtype.

        Raises:
            ValueError: if the field was stored through a codec, or for leaves of other shapes.
        """
        del keys
        arrays = unstored_arrays(name, field, leaves)
        return [StoredLeaf(Plain(str(x.dtype)), PlainValues(x), None) for x in arrays]

    def put(self, field: Any, encoded: Sequence[PlainValues]) -> Any:
        """Returns ``field`` with other arrays."""
        return boxed_like(encoded, field)


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
