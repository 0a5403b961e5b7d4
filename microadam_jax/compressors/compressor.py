"""What a compressor is."""

from collections.abc import Iterable
from typing import Any, Protocol

import jax

from microadam_jax.compressors.block_sparse import BlockSparse


class Compressor(Protocol):
    """Chooses what of an update goes on; frozen, hashable, and free of state."""

    def keeps_dense(self, path: tuple[Any, ...], leaf: jax.Array) -> bool:
        """Whether the leaf at ``path`` is passed on whole."""
        ...

    def compress(self, update: jax.Array, dtype: Any = None) -> BlockSparse:
        """What survives of the float32 ``update``, which came and shall go on in ``dtype``."""
        ...

    def remarks(self, path: tuple[Any, ...], leaf: jax.Array) -> Iterable[str]:
        """What a memory report should say of the leaf at ``path``."""
        ...
