"""An element-wise step of one leaf, some moments of which are stored through codecs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from microadam_jax.codecs import Codec, Plain, Storage, Unstored
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.transforms.chunks import Arrays, Turns
from pallas_kernels.blockwise_codec import blockwise_step, step

Slots = tuple[jax.Array, ...]


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
    """Which implementation runs, and where a leaf lies.

    Attributes:
        implementation: None, ``"xla"`` or a kernel's name.
        sharding: on a mesh with Auto axes, where nothing else tells.
    """

    implementation: str | None = None
    sharding: NamedSharding | None = None


def stored_step(
    turns: Turns,
    rule: Callable[[Arrays, Arrays], tuple[jax.Array, Sequence[jax.Array]]],
    moments: Sequence[Moment],
    inputs: Arrays,
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
    structure = jax.tree.structure(encoded)
    plain = all(isinstance(codec, Plain) for codec in codecs)

    def in_turn(encoded: Any, inputs: Arrays, turn: jax.Array) -> Any:
        own = Turns(turn)

        def part(rows: Rows, carried: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
            draws = [None if key is None else Draw(key, rows) for key in keys]
            output, new = step(rule, codecs, structure.unflatten(carried), inputs, draws)
            return output, tuple(jax.tree.leaves(new))

        output, new = own.take(
            part,
            tuple(jax.tree.leaves(encoded)),
            inputs,
            chunkable=all(codec.chunkable for codec in codecs),
            replaces=replaces,
        )
        return (output, structure.unflatten(new)), own.turn

    (output, new), turns.turn = blockwise_step(
        rule,
        codecs,
        encoded,
        inputs,
        keys,
        replaces=replaces,
        implementation="xla" if plain else kernels.implementation,
        sharding=kernels.sharding,
        xla=in_turn,
        aside=(turns.turn,),
    )
    stored = zip(moments, new, strict=True)
    return output, [moment.storage.replaced(moment.slots, x) for moment, x in stored]
