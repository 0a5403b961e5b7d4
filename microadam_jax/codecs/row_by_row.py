"""Codecs that encode each row by itself."""

import abc
from typing import Any

import jax

from microadam_jax.codecs.rounding import Draw


class RowByRow(abc.ABC):
    """Quantizes each row by itself: chunks share no arrays."""

    @abc.abstractmethod
    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> Any:
        """Encodes the float32 tensor ``x``."""

    def encode_rows(self, x: jax.Array, key: jax.Array | Draw | None) -> Any:
        """Encodes some rows of a tensor, which is no different from encoding all.

        Arrays may keep apart what :meth:`encode` joins into one axis. CPUs take up to four times
        as long to encode if they have to join in the same pass.
        """
        return self.encode(x, key)
