"""Counts what a function keeps for its backward pass, from shapes alone."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from microadam_jax.layers.compress_residuals import compress_residuals
from microadam_jax.layers.known_values import UNKNOWN, known_outputs
from microadam_jax.memory import format_table

Arrays = Counter[tuple[tuple[int, ...], str]]  # how many of each shape and dtype


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """Holds what two forms of a function keep for their backward passes.

    Printing it gives a table. What follows from the parameters alone, such as a cast of them, is
    counted apart: it does not grow with the batch.

    Attributes:
        before: arrays of the one, as ``(shape, dtype)`` with their number.
        after: arrays of the other.
        of_parameters: bytes of what follows from the parameters, before and after. The parameters
            themselves are there anyway and count nothing.
    """

    before: Arrays
    after: Arrays
    of_parameters: tuple[int, int]

    @property
    def totals(self) -> tuple[int, int]:
        """Counts bytes before and after, without those that follow from the parameters."""
        return _bytes(self.before), _bytes(self.after)

    @property
    def ratio(self) -> float:
        """Divides the bytes after by the bytes before."""
        before, after = self.totals
        return after / max(1, before)

    def __str__(self) -> str:
        kinds = sorted(self.before | self.after, key=lambda kind: (-math.prod(kind[0]), kind))
        rows: list[tuple[str, ...]] = [
            ("shape", "format", "before", "bytes", "after", "bytes"),
            *(_row(kind, self.before[kind], self.after[kind]) for kind in kinds),
            _sums("total", self.totals),
            _sums("of parameters", self.of_parameters),
        ]
        return "\n".join(format_table(rows, left=(0, 1)))


def saved_bytes(
    f: Callable[..., Any], params: Any, *inputs: Any, after: Callable[..., Any] | None = None
) -> SavedBytes:
    """Counts what a function keeps for its backward pass, beside what another form of it keeps.

    Nothing is computed. Each array counts once, as ``jax.vjp`` returns it; what a compiler later
    fuses or copies is not seen here.

    Args:
        f: ``f(params, *inputs)``.
        params: its parameters, a pytree of arrays or ``jax.ShapeDtypeStruct``.
        *inputs: its other arguments, likewise.
        after: the function to compare with; by default ``compress_residuals(f)``.

    Returns:
        The arrays of both by shape and dtype, and their bytes.

    Raises:
        ValueError: if ``f`` changes in place what is not an NNX module, and ``after`` is None.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.layers import saved_bytes
        >>> w, x = (jax.ShapeDtypeStruct(s, "float32") for s in [(64, 256), (512, 64)])
        >>> print(saved_bytes(lambda w, x: jnp.square(jnp.sin(x @ w)), w, x))
        shape          format    before      bytes  after    bytes
        ----------------------------------------------------------
        (512, 256)     float32        2  1,048,576      0        0
        (512, 256)     uint8          0          0      2  262,144
        (512, 64)      float32        1    131,072      0        0
        (512, 64)      uint8          0          0      1   32,768
        (512, 16)      bfloat16       0          0      2   32,768
        (512, 4)       bfloat16       0          0      1    4,096
        total                            1,179,648         331,776
        of parameters                            0               0
    """
    counted = [_saved(form, params, inputs) for form in (f, after or compress_residuals(f))]
    (before, before_params), (after_arrays, after_params) = counted
    return SavedBytes(before, after_arrays, (_bytes(before_params), _bytes(after_params)))


def _saved(f: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> tuple[Arrays, Arrays]:
    """The residuals, and those that follow from the parameters."""
    traced, (shapes, _) = jax.make_jaxpr(
        lambda params, inputs: jax.vjp(f, params, *inputs), return_shape=True
    )(params, inputs)
    count = len(jax.tree.leaves(params))
    kept = traced.jaxpr.invars[:count]

    def known(*values: jax.Array) -> None:
        unknown = [UNKNOWN] * (len(traced.in_avals) - count)
        flags.extend(value is not UNKNOWN for value in known_outputs(traced, [*values, *unknown]))

    flags: list[bool] = []
    jax.eval_shape(known, *traced.in_avals[:count])
    outputs = len(jax.tree.leaves(shapes))
    arrays: tuple[Arrays, Arrays] = Counter(), Counter()
    seen = set(kept)
    for variable, flag in zip(traced.jaxpr.outvars[outputs:], flags[outputs:], strict=True):
        if isinstance(variable, core.Literal) or variable in seen:
            continue
        seen.add(variable)
        arrays[flag][variable.aval.shape, str(variable.aval.dtype)] += 1
    return arrays


def _bytes(arrays: Arrays) -> int:
    return sum(
        number * math.prod(shape) * jax.numpy.dtype(dtype).itemsize
        for (shape, dtype), number in arrays.items()
    )


def _row(kind: tuple[tuple[int, ...], str], before: int, after: int) -> tuple[str, ...]:
    one = _bytes(Counter([kind]))
    return str(kind[0]), kind[1], str(before), f"{before * one:,}", str(after), f"{after * one:,}"


def _sums(name: str, sums: tuple[int, int]) -> tuple[str, ...]:
    return name, "", "", f"{sums[0]:,}", "", f"{sums[1]:,}"
