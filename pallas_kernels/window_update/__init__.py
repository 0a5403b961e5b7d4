"""Turning sparse entries of a block into a dense block."""

from pallas_kernels.window_update.api import window_update
from pallas_kernels.window_update.apply import window_apply
from pallas_kernels.window_update.descent import Descent
from pallas_kernels.window_update.reference import expand, values_at, window_adam, written

__all__ = [
    "Descent",
    "expand",
    "values_at",
    "window_adam",
    "window_apply",
    "window_update",
    "written",
]
