"""Memory-efficient optimizers for JAX, as Optax gradient transformations."""

from microadam_jax.aliases import MicroAdamLayout, microadam
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import affine4
from microadam_jax.compressors import BlockSparse, top_k
from microadam_jax.memory import MemoryReport, memory_report
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.transforms import (
    ErrorFeedbackState,
    ScaleByWindowAdamState,
    Window,
    compress,
    error_feedback,
    scale_by_window_adam,
    to_dense,
)

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "BlockSparse",
    "Blocks",
    "ErrorFeedbackState",
    "MemoryReport",
    "MicroAdamLayout",
    "ScaleByWindowAdamState",
    "Window",
    "affine4",
    "compress",
    "error_feedback",
    "memory_report",
    "microadam",
    "model_shapes",
    "scale_by_window_adam",
    "to_dense",
    "top_k",
]
