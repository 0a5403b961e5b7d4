"""An element-wise step of one leaf, some moments of which are stored through codecs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.codecs import Codec, Plain, Storage, Unstored
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.sharding import told
from microadam_jax.transforms.chunks import Arrays, Turns
from microadam_jax.trees import KeyPath
from pallas_kernels.blockwise_codec import blockwise_step, step

Slots = tuple[jax.Array, ...]
Rule = Callable[[Arrays, Arrays], tuple[jax.Array, Sequence[jax.Array]]]


class Moment(NamedTuple):
    """A moment of a leaf.

    Attributes:
        storage: of its field.
        codec: of the leaf.
        slots: the leaf's arrays in the field.
        key: a function that gives the random key of a codec that draws.
    """

    storage: Storage | Unstored
    codec: Codec
    slots: Slots
    key: Callable[[], jax.Array]


class Kernels(NamedTuple):
    """Which implementation runs on the leaves of a tree.

    Attributes:
        implementation: None, ``"xla"`` or a kernel's name.
        placed: by path, where leaves lie on a mesh with Auto axes, where nothing else tells.
    """

    implementation: str | None
    placed: Mapping[KeyPath, NamedSharding]

    @classmethod
    def choose(
        cls,
        implementation: str | None,
        shardings: Any,
        updates: Any,
        codecs_of: Callable[[KeyPath, Any], Sequence[Codec]],
    ) -> "Kernels":
        """What was asked for. None decides for each leaf by itself, see :func:`stored_step`.

        Args:
            implementation: None, or the name that was asked for.
            shardings: where the parameters lie, or None.
            updates: the tree.
            codecs_of: the codecs of a leaf's moments; not used.
        """
        del codecs_of
        return cls(implementation, told(shardings, updates))


def stored_step(
    turns: Turns,
    rule: Rule,
    moments: Sequence[Moment],
    inputs: Arrays,
    path: KeyPath,
    *,
    replaces: int,
    kernels: Kernels,
) -> tuple[jax.Array, list[Slots]]:
    """Decodes the moments, takes a step, and encodes the new ones.

    Args:
        turns: in which XLA takes leaves, large ones in chunks.
        rule: from float32 moments and inputs to an output and the new moments; it acts on each
            element alone.
        moments: of the leaf.
        inputs: the gradient, and arrays that broadcast against it.
        path: the leaf's.
        replaces: the input whose place the output takes.
        kernels: which implementation runs; a leaf that no moment of is in codes, XLA's.

    Returns:
        The output, and each moment's new slots.

    Raises:
        NotImplementedError: if the named implementation cannot run.
    """
    codecs = tuple(moment.storage.codec_for(moment.codec, moment.slots) for moment in moments)
    encoded = tuple(moment.storage.encoded(moment.codec, moment.slots) for moment in moments)
    keys = [m.key() if codec.needs_key else None for m, codec in zip(moments, codecs, strict=True)]

    def in_turn(encoded: Any, inputs: Arrays, turn: jax.Array) -> Any:
        own = Turns(turn, turns.elements)
        before = tuple(map(_shared_array, codecs, encoded))
        after = _measured(own, rule, codecs, encoded, inputs)
        own_rows, structure = jax.tree.flatten(tuple(map(_by_row, codecs, encoded)))
        read, reading = jax.tree.flatten((inputs, before, after))

        def part(rows: Rows, carried: Arrays, read: Arrays) -> tuple[jax.Array, Arrays]:
            inputs, before, after = reading.unflatten(read)
            draws = [None if key is None else Draw(key, rows) for key in keys]
            given = list(map(_OfRows, codecs, before, after))
            output, new = step(rule, given, structure.unflatten(carried), inputs, draws)
            return output, tuple(jax.tree.leaves(new))

        output, new = own.take(part, tuple(own_rows), tuple(read), replaces=replaces % len(inputs))
        new = map(_whole, codecs, structure.unflatten(new), after)
        return (output, tuple(new)), own.turn

    (output, new), turns.turn = blockwise_step(
        rule,
        codecs,
        encoded,
        inputs,
        keys,
        replaces=replaces,
        implementation="xla" if _plain(codecs) else kernels.implementation,
        sharding=kernels.placed.get(path),
        xla=in_turn,
        aside=(turns.turn,),
    )
    stored = zip(moments, new, strict=True)
    return output, [moment.storage.replaced(moment.slots, x) for moment, x in stored]


def _plain(codecs: Sequence[Codec]) -> bool:
    """Whether no moment is in codes."""
    return all(isinstance(codec, Plain) for codec in codecs)


class _OfRows(NamedTuple):
    """A codec for some rows of a leaf.

    Attributes:
        codec: that of the leaf.
        before: the array that all rows share, if there is one, as the rows were encoded.
        after: the same, as they shall be encoded.
    """

    codec: Codec
    before: jax.Array | None
    after: jax.Array | None

    @property
    def needs_key(self) -> bool:
        return self.codec.needs_key

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        return self.codec.decode(_whole(self.codec, encoded, self.before), shape)

    def encode(self, x: jax.Array, key: Any) -> Any:
        return _by_row(self.codec, self.codec.encode_rows(x, key, self.after))


def _measured(
    turns: Turns, rule: Rule, codecs: Sequence[Codec], encoded: Sequence[Any], inputs: Arrays
) -> tuple[jax.Array | None, ...]:
    """For each codec the array that all rows will share: a round of its own finds it."""
    if all(codec.shared is None for codec in codecs):
        return (None,) * len(codecs)
    read, reading = jax.tree.flatten((inputs, tuple(encoded)))

    def part(rows: Rows, read: Arrays) -> Arrays:
        inputs, encoded = reading.unflatten(read)
        shape = inputs[0].shape
        moments = tuple(c.decode(x, shape) for c, x in zip(codecs, encoded, strict=True))
        _, new = rule(moments, inputs)
        found = (
            c.maxima(x.astype(jnp.float32), rows.runs) for c, x in zip(codecs, new, strict=True)
        )
        return tuple(x for x in found if x is not None)

    largest = iter(turns.largest(part, tuple(read)))
    return tuple(None if codec.shared is None else codec.maxima(next(largest)) for codec in codecs)


def _shared_array(codec: Codec, encoded: Any) -> jax.Array | None:
    return None if codec.shared is None else getattr(encoded, codec.shared)


def _by_row(codec: Codec, encoded: Any) -> Any:
    """What a codec made, without the array that all rows share."""
    return _whole(codec, encoded, None)


def _whole(codec: Codec, encoded: Any, shared: jax.Array | None) -> Any:
    """What a codec made, with the array that all rows share."""
    return encoded if codec.shared is None else encoded._replace(**{codec.shared: shared})
