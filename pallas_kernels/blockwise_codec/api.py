"""A step with stored moments as one operation: which implementation runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.blockwise_codec import mosaic_tpu, reference, triton
from pallas_kernels.blockwise_codec.reference import Step
from pallas_kernels.blockwise_codec.rule import Rule
from pallas_kernels.key_words import key_words

KERNELS = {"mosaic_tpu": mosaic_tpu, "triton": triton}


def blockwise_step(
    rule: Step,
    codecs: Sequence[Any],
    encoded: Sequence[Any],
    inputs: Sequence[jax.Array],
    keys: Sequence[Any],
    *,
    replaces: int = 0,
    implementation: str | None = None,
    interpret: bool = False,
    sharding: NamedSharding | None = None,
    xla: Callable[..., Any] | None = None,
) -> Any:
    r"""Decodes moments, takes an element-wise step, and encodes the new moments.

    With the codecs :math:`Q_j` and the rule :math:`f`,

    .. math::

        (u, m_1, m_2, \dots) = f(Q_1^{-1}(q_1), Q_2^{-1}(q_2), \dots; g, \dots), \qquad
        q_j \leftarrow Q_j(m_j) .

    A kernel keeps what lies between in registers. In interpret mode codes equal the reference's to
    the last bit as far as the moments do, of which compilers may contract a product and a sum. On
    another device divisions may round otherwise, and a code differ by one, as where the scale of a
    block is a root mean square, whose sum has another order.

    Args:
        rule: :math:`f`, from the tuple of float32 moments and that of the inputs to the output and
            the new moments. It acts on each element alone, and closes over scalars only.
        codecs: the moments'.
        encoded: what they made, ``(codes, *statistics)`` for each moment; updated in place if
            donated.
        inputs: the gradient ``(*lead, n)``, and arrays that broadcast against it.
        keys: for each codec a typed random key, or None if it rounds to nearest.
        replaces: the input whose place the output takes, if it has its dtype.
        implementation: None, ``"xla"``, ``"mosaic_tpu"`` or ``"triton"``, which has not run on a
            GPU yet, so that None does not take it.
        interpret: runs the kernel as ordinary operations, on any device.
        sharding: where the gradient lies, on a mesh with Auto axes.
        xla: how to run the reference, given ``(encoded, inputs)``; None for all at once.

    Returns:
        The output and the new ``encoded``.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the named implementation cannot run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.codecs import dynamic8
        >>> from pallas_kernels.blockwise_codec import blockwise_step
        >>> codec = dynamic8()
        >>> trace = codec.encode(jnp.array([1.0, -0.5]))
        >>> descend = lambda moments, inputs: (-(moments[0] + inputs[0]), [moments[0] + inputs[0]])
        >>> update, (trace,) = blockwise_step(descend, [codec], [trace], [jnp.ones(2)], [None])
        >>> print(update.round(2), codec.decode(trace, (2,)).round(2))
        [-2.  -0.5] [2.  0.5]

    Reference: Dettmers et al., 8-bit optimizers (arXiv 2110.02861), Section 2.
    """
    codecs, leaf = tuple(codecs), inputs[0]
    own, structure = jax.tree.flatten((tuple(inputs), tuple(encoded)))

    def run_xla(*operands: jax.Array) -> Any:
        inputs, encoded = jax.tree.unflatten(structure, operands[: len(own)])
        if xla is not None:
            return xla(encoded, inputs)
        return reference.step(rule, codecs, encoded, inputs, keys)

    if dispatch.only_xla("blockwise_codec", implementation):
        return run_xla(*own)
    name = implementation if implementation in KERNELS else "mosaic_tpu"
    chosen = KERNELS[name]
    reason = chosen.unsupported(codecs, inputs)
    made: Rule | None = None
    places, words = (), ()
    if reason is None:
        made = Rule(
            lambda *tiles: _flat(rule(tiles[: len(codecs)], tiles[len(codecs) :])),
            chosen.tiles(codecs, inputs),
        )
        reason = made.unsupported
        drawn = [key for codec, key in zip(codecs, keys, strict=True) if codec.needs_key]
        words = tuple(map(key_words, drawn))
        places = _places(leaf) if drawn else ()

    def run_kernel(*operands: jax.Array) -> Any:
        assert made is not None
        inputs, encoded = jax.tree.unflatten(structure, operands[: len(own)])
        rest = operands[len(own) :]
        return chosen.step(
            made,
            codecs,
            leaf.shape,
            encoded,
            inputs,
            rest[: len(places)],
            rest[len(places) : len(places) + len(words)],
            rest[len(places) + len(words) :],
            replaces=replaces % len(inputs),
            interpret=interpret,
        )

    return dispatch.run(
        "blockwise_codec",
        implementation,
        run_xla,
        lambda: {name: (run_kernel, reason)},
        (*own, *places),
        (*words, *(() if made is None else made.scalars)),
        rank=leaf.ndim,
        padded=reason is None and any(codec.blocks.layout_of(leaf).padding for codec in codecs),
        sharding=sharding,
    )


def _flat(results: tuple[jax.Array, Sequence[jax.Array]]) -> list[jax.Array]:
    output, moments = results
    return [output, *moments]


def _places(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's place in the whole leaf and each column's, which follow a leaf's sharding."""
    shape, stride, rows = leaf.shape, leaf.shape[-1], jnp.zeros((1,) * leaf.ndim, jnp.int32)
    for axis in reversed(range(leaf.ndim - 1)):
        index = jnp.arange(shape[axis], dtype=jnp.int32)
        others = [i for i in range(leaf.ndim) if i != axis]
        rows = rows + jnp.expand_dims(index * mosaic_tpu.wrapped(stride), others)
        stride *= shape[axis]
    columns = jnp.expand_dims(jnp.arange(shape[-1], dtype=jnp.int32), range(leaf.ndim - 1))
    sharding = jax.typeof(leaf).sharding
    if not any(sharding.spec):
        return rows, columns
    *lead, last = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    specs = PartitionSpec(*lead, None), PartitionSpec(*[None] * len(lead), last)
    places = zip((rows, columns), specs, strict=True)
    rows, columns = (
        jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec)) for x, spec in places
    )
    return rows, columns
