"""Decoding stored moments, an element-wise step, and encoding the new ones."""

from pallas_kernels.blockwise_codec.api import blockwise_step
from pallas_kernels.blockwise_codec.reference import moved, step, stored, uniform

__all__ = ["blockwise_step", "moved", "step", "stored", "uniform"]
