"""Turning sparse entries of a block into a dense block."""

from pallas_kernels.window_update.api import window_update
from pallas_kernels.window_update.reference import expand, values_at, window_adam

__all__ = ["expand", "values_at", "window_adam", "window_update"]
