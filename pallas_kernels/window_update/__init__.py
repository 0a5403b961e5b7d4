"""Turning sparse entries of a block into a dense block."""

from pallas_kernels.window_update.api import window_update
from pallas_kernels.window_update.apply import window_apply
from pallas_kernels.window_update.reference import descent, expand, values_at, window_adam, written

__all__ = [
    "descent",
    "expand",
    "values_at",
    "window_adam",
    "window_apply",
    "window_update",
    "written",
]
