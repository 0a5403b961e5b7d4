"""Codecs that encode each row by itself."""

import abc
from typing import Any

import jax

from microadam_jax.codecs.rounding import Draw


class RowByRow(abc.ABC):
    """Quantizes each row by itself: chunks share no arrays."""

    shared = None

    @abc.abstractmethod
    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> Any:
        """Encodes the float32 tensor ``x``."""

    def maxima(self, x: jax.Array, runs: tuple[int, ...] = ()) -> None:
        """Nothing is needed of other rows."""
        del x, runs

    def encode_rows(self, x: jax.Array, key: jax.Array | Draw | None, shared: None) -> Any:
        """Encodes some rows of a tensor, which is no different from encoding all.

        Arrays may keep apart what :meth:`encode` joins into one axis. CPUs take up to four times
        as long to encode if they have to join in the same pass.
        """
        del shared
        return self.encode(x, key)
