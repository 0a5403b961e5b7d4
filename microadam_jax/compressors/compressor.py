"""What a compressor is, and what it sends."""

from collections.abc import Iterable
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from microadam_jax.trees import Compressed, KeyPath

Row = tuple[jax.Array, jax.Array]
"""A leaf's share of a window: two arrays of several updates, or of one."""


class Deferred(Compressed):
    """Defers the compression of an update to the link that reads it: no pytree node."""


class Compressor(Protocol):
    """Chooses what of an update goes on; frozen and hashable.

    Most are free of state. What another has to remember from one step to the next, such as the
    factor from which a power iteration starts, is a NamedTuple of arrays for each compressed
    leaf, which the link holds and hands to ``compress``.
    """

    @property
    def Carried(self) -> Any:
        """Returns the NamedTuple of the arrays that are carried to the next step."""
        ...

    def first(self, path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, ...]:
        """Returns what is carried to the first step, for the leaf at ``path``."""
        ...

    def keeps_dense(self, path: KeyPath, leaf: jax.Array) -> bool:
        """Returns True if the leaf at ``path`` is passed on whole."""
        ...

    def compress(self, update: jax.Array, dtype: DTypeLike | None = None, carried: Any = ()) -> Any:
        """Compresses the float32 ``update``, whose dtype was and will be ``dtype``."""
        ...

    def carry(self, sent: Any, carried: Any) -> tuple[jax.Array, ...]:
        """Returns what is carried to the next step, after ``sent``."""
        ...

    def window(self, path: KeyPath, parameter: jax.Array, length: int, dtype: DTypeLike) -> Row:
        """Returns zeros for the latest ``length`` updates of the compressed leaf at ``path``."""
        ...

    def remarks(self, path: KeyPath, leaf: jax.Array) -> Iterable[str]:
        """Yields notes for the memory report about the leaf at ``path``."""
        ...


def require_compressor(compressor: Any) -> None:
    """Refuses what is not a compressor.

    Raises:
        TypeError: if it is a density, a rank, a name or a function.
    """
    if isinstance(compressor, type) or not hasattr(compressor, "Carried"):
        raise TypeError(
            "compressor must be one such as top_k(density=0.01) or power_sgd(rank=4); got "
            f"{compressor!r}."
        )
