"""An element-wise step on leaves, some moments of which are stored through codecs."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.codecs import Codec, Plain, StoredLeaf
from microadam_jax.codecs.rank1 import RankOne
from microadam_jax.codecs.rounding import Draw, Rows, key_of_layer
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.engine import two_passes
from microadam_jax.engine.chunks import Chunks
from microadam_jax.engine.leaf_loops import (
    Arrays,
    Work,
    by_kind,
    each_kind,
    on_accelerator,
    on_cpu,
    piece_of,
    written,
)
from microadam_jax.sharding import shapes_of
from microadam_jax.state_arrays import state_zeros
from microadam_jax.trees import LeafKey
from pallas_kernels.blockwise_codec import blockwise_step, moved, step, stored
from pallas_kernels.dispatch import compiles_for_gpus, names_kernel

Rule = Callable[[Arrays, Arrays], tuple[jax.Array, Sequence[jax.Array]]]


class StoredStep(NamedTuple):
    """A step on one leaf.

    Attributes:
        rule: from float32 moments and inputs to an output and the new moments; it acts on each
            element alone. Leaves that have the same rule, not an equal one, are compiled together.
        codecs: of the moments.
        encoded: the moments, as their codecs made them.
        inputs: the gradient, and arrays that broadcast against it.
        keys: for each codec the leaf's, or None if it draws no random numbers.
        replaces: the input whose place the output takes.
        sharding: how the leaf is sharded, on a mesh with Auto axes, where nothing else says so.
    """

    rule: Rule
    codecs: tuple[Codec, ...]
    encoded: tuple[Any, ...]
    inputs: Arrays
    keys: tuple[LeafKey | None, ...]
    replaces: int = 0
    sharding: NamedSharding | None = None

    @classmethod
    def of(
        cls,
        rule: Rule,
        moments: Sequence[StoredLeaf],
        inputs: Arrays,
        replaces: int,
        sharding: NamedSharding | None,
    ) -> "StoredStep":
        """The step on one leaf of several fields; ``moments`` are the leaf's in each of them."""
        codecs, encoded, keys = zip(*moments, strict=True)
        return cls(rule, codecs, encoded, inputs, keys, replaces, sharding)

    @property
    def arrays(self) -> Any:
        """Returns the arrays of the step."""
        return self.encoded, self.inputs, self.keys

    def given(self, arrays: Any) -> "StoredStep":
        """The same step on other arrays."""
        encoded, inputs, keys = arrays
        return self._replace(encoded=encoded, inputs=inputs, keys=keys)

    @property
    def kind(self) -> Hashable:
        """Equal for steps that are compiled together."""
        leaves, structure = jax.tree.flatten(self.arrays)
        settings = self.rule, self.codecs, self.replaces, self.sharding
        return settings, structure, tuple(map(jax.typeof, leaves))

    @property
    def dtype(self) -> jnp.dtype:
        """The output's."""
        moment = jax.ShapeDtypeStruct(self.inputs[0].shape, jnp.float32)
        return jax.eval_shape(self.rule, (moment,) * len(self.codecs), self.inputs)[0].dtype


def stored_steps(
    steps: Sequence[StoredStep], implementation: str | None
) -> list[tuple[jax.Array, tuple[Any, ...]]]:
    """Dequantizes the moments of leaves, takes their steps, and quantizes the new moments.

    Args:
        steps: of the leaves.
        implementation: ``"xla"``, a kernel's name, or None for a kernel where the device has one
            that takes the leaf. A leaf that has no moment in codes is XLA's.

    Returns:
        For each leaf the output and what the codecs made of the new moments.

    Raises:
        NotImplementedError: if the named implementation cannot run.
    """
    if all(_plain(one.codecs) for one in steps):  # the compiler fuses what it need not decode
        return [step(one.rule, one.codecs, *one.arrays) for one in steps]
    flat, structure = jax.tree.flatten([one.arrays for one in steps])
    # The array of keys is all leaves', and stays one.
    places: dict[int, int] = {}
    at = [places.setdefault(id(x), len(places)) for x in flat]
    distinct = {id(x): x for x in flat}.values()

    def arrays_of(arrays: Sequence[jax.Array]) -> list[Any]:
        return structure.unflatten([arrays[i] for i in at])

    def together(*arrays: jax.Array) -> list[Any]:
        parts = zip(steps, arrays_of(arrays), strict=True)
        return _in_loops([one.given(own) for one, own in parts], on_cpu)

    kinds, elements = [one.kind for one in steps], sum(one.inputs[0].size for one in steps)

    def one_by_one(*arrays: jax.Array) -> list[Any]:
        def run(one: StoredStep, arrays: Any) -> Any:
            return _alone(one.given(arrays), implementation, piece_of(elements))

        return each_kind(run, kinds, list(zip(steps, arrays_of(arrays), strict=True)))

    def on_gpus(*arrays: jax.Array) -> list[Any]:
        def run(one: StoredStep, arrays: Any) -> Any:
            if two_passes.takes(one.codecs):
                encoded, inputs, keys = arrays
                return two_passes.step(one.rule, one.codecs, encoded, inputs, typed_keys(keys))
            return _alone(one.given(arrays), implementation, piece_of(elements))

        call, outputs, moments = by_kind(run), list[Any](), list[Any]()
        leaves = zip(kinds, steps, arrays_of(arrays), strict=True)
        for kind, one, (encoded, *rest) in leaves:
            if moments:
                # Else the compiler would join leaves in one kernel, and write temporaries of all.
                moments[-1], encoded = jax.lax.optimization_barrier((moments[-1], encoded))
            output, new = call(kind, one, (encoded, *rest))
            outputs.append(output)
            moments.append(new)
        return list(zip(outputs, moments, strict=True))

    if names_kernel(implementation):
        return one_by_one(*distinct)
    gpus = {}
    if compiles_for_gpus(steps[0].inputs[0]) and any(two_passes.takes(one.codecs) for one in steps):
        gpus = {"cuda": on_gpus, "rocm": on_gpus}
    return jax.lax.platform_dependent(*distinct, cpu=together, **gpus, default=one_by_one)


def _alone(one: StoredStep, implementation: str | None, piece: int) -> Any:
    """One leaf: a kernel, or XLA's program for an accelerator."""

    def xla(encoded: Any, inputs: Arrays) -> Any:
        step = one._replace(encoded=encoded, inputs=inputs)
        return _in_loops([step], lambda works: [on_accelerator(work, piece) for work in works])[0]

    return blockwise_step(
        one.rule,
        one.codecs,
        one.encoded,
        one.inputs,
        tuple(map(key_of_layer, typed_keys(one.keys))),
        replaces=one.replaces,
        implementation="xla" if _plain(one.codecs) else implementation,
        sharding=one.sharding,
        xla=xla,
    )


def typed_key(key: LeafKey) -> jax.Array:
    """Returns the key itself, a scalar."""
    return jax.lax.dynamic_index_in_dim(key.keys, key.index, keepdims=False)


def typed_keys(keys: Sequence[LeafKey | None]) -> tuple[jax.Array | None, ...]:
    """The keys themselves; None of a leaf that has none."""
    return tuple(None if key is None else typed_key(key) for key in keys)


def _plain(codecs: Sequence[Codec]) -> bool:
    """True if no moment is in codes."""
    return all(isinstance(codec, Plain) for codec in codecs)


Run = Callable[[Sequence[Work]], list[Arrays]]


def _in_loops(steps: Sequence[StoredStep], run: Run) -> list[Any]:
    """XLA's program for some leaves."""
    shared = _shared_arrays(steps, run)
    works, structures = [], []
    outputs: dict[Hashable, jnp.dtype] = {}
    for one, after in zip(steps, shared, strict=True):
        before = tuple(map(_shared_array, one.codecs, one.encoded))
        own, structure = jax.tree.flatten(tuple(map(_by_row, one.codecs, one.encoded)))
        indices = tuple(None if key is None else key.index for key in one.keys)
        keys = tuple(key.keys for key in one.keys if key is not None)
        read, reading = jax.tree.flatten((one.inputs, before, after, indices))
        part = _OfRows(one.rule, one.codecs, structure, reading)
        output = outputs.get(one.kind) or outputs.setdefault(one.kind, one.dtype)
        replaces = one.replaces % len(one.inputs)
        works.append(Work(part, tuple(own), tuple(read), output, replaces, keys))
        structures.append(structure)
    results = []
    for one, after, structure, (output, *new) in zip(
        steps, shared, structures, run(works), strict=True
    ):
        results.append((output, tuple(map(_whole, one.codecs, structure.unflatten(new), after))))
    return results


class _OfRows(NamedTuple):
    """The step on some rows of a leaf."""

    rule: Rule
    codecs: tuple[Codec, ...]
    structure: Any
    reading: Any

    def __call__(self, rows: Rows, carried: Arrays, read: Arrays) -> Arrays:
        own, shared = read[: self.reading.num_leaves], iter(read[self.reading.num_leaves :])
        inputs, before, after, indices = self.reading.unflatten(own)
        keys = typed_keys([None if i is None else LeafKey(next(shared), i) for i in indices])
        draws = [None if key is None else Draw(key, rows) for key in keys]
        given = list(map(_CodecOfRows, self.codecs, before, after))
        encoded = self.structure.unflatten(carried)
        output, *new = written(rows, lambda: moved(self.rule, given, encoded, inputs))
        return output, *jax.tree.leaves(stored(given, new, draws))


class _CodecOfRows(NamedTuple):
    """A codec for some rows of a leaf.

    Attributes:
        codec: that of the leaf.
        before: the array that all rows share, if there is one, as the rows were quantized.
        after: the same, as they shall be quantized.
    """

    codec: Codec
    before: jax.Array | None
    after: jax.Array | None

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        return self.codec.decode(_whole(self.codec, encoded, self.before), shape)

    def encode(self, x: jax.Array, key: Any) -> Any:
        if isinstance(self.codec, RankOne) and self.after is not None:
            return _by_row(self.codec, self.codec.encode_rows(x, key, self.after))
        if isinstance(self.codec, RowByRow):
            return self.codec.encode_rows(x, key)
        return self.codec.encode(x, key)


def _shared_arrays(steps: Sequence[StoredStep], run: Run) -> list[tuple[jax.Array | None, ...]]:
    """For each leaf and codec the array that all rows will share: a loop of its own finds it."""
    sharing = [i for i, one in enumerate(steps) if any(isinstance(c, RankOne) for c in one.codecs)]
    works = []
    for one in (steps[i] for i in sharing):
        read, reading = jax.tree.flatten((one.inputs, one.encoded))
        leaf = one.inputs[0]
        measure = _Measure(one.rule, one.codecs, reading, Chunks.of_about(leaf, leaf.size).shards)
        shapes = shapes_of(measure.measured, tuple(read))
        zeros = tuple(state_zeros(x, x.shape, x.dtype) for x in shapes)
        works.append(Work(measure, zeros, tuple(read)))
    found = dict(zip(sharing, run(works), strict=True))
    results = []
    for i, one in enumerate(steps):
        largest = iter(found.get(i, ()))
        shared = (c.maxima(next(largest)) if isinstance(c, RankOne) else None for c in one.codecs)
        results.append(tuple(shared))
    return results


class _Measure(NamedTuple):
    """The largest magnitudes of new moments, among some rows and those before them.

    Attributes:
        rule: of the step.
        codecs: of the moments.
        reading: the structure of what is read.
        shards: over how many devices each axis but the last may be cut. Each has a part of the
            result, as the loop compares nothing across devices.
    """

    rule: Rule
    codecs: tuple[Codec, ...]
    reading: Any
    shards: tuple[int, ...]

    def __call__(self, rows: Rows, carried: Arrays, read: Arrays) -> Arrays:
        del rows
        return tuple(map(jnp.maximum, carried, self.measured(read)))

    def measured(self, read: Arrays) -> Arrays:
        """Those of the rows that are read."""
        inputs, encoded = self.reading.unflatten(read)
        shape = inputs[0].shape
        moments = tuple(c.decode(x, shape) for c, x in zip(self.codecs, encoded, strict=True))
        _, new = self.rule(moments, inputs)
        return tuple(
            codec.maxima(x.astype(jnp.float32), self.shards)
            for codec, x in zip(self.codecs, new, strict=True)
            if isinstance(codec, RankOne)
        )


def _shared_array(codec: Codec, encoded: Any) -> jax.Array | None:
    return encoded.columns if isinstance(codec, RankOne) else None


def _by_row(codec: Codec, encoded: Any) -> Any:
    """Returns quantized arrays without the one that all rows share."""
    return _whole(codec, encoded, None)


def _whole(codec: Codec, encoded: Any, shared: jax.Array | None) -> Any:
    """Returns quantized arrays with the one that all rows share."""
    return encoded._replace(columns=shared) if isinstance(codec, RankOne) else encoded
