"""Memory-efficient optimizers for JAX, as Optax gradient transformations."""

from microadam_jax.aliases import MicroAdamLayout, adagrad_sn, adam_mini, adam_sn, came, microadam
from microadam_jax.axes import Axes, Fused
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import affine4
from microadam_jax.compressors import BlockSparse, top_k
from microadam_jax.layer_names import transformer_rules
from microadam_jax.memory import MemoryReport, memory_report
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.partition import Partition, PartitionReport, explain_partition
from microadam_jax.subsets import Subsets
from microadam_jax.transforms import (
    DecayUpdatedWeightsState,
    ErrorFeedbackState,
    ScaleByAdamMiniState,
    ScaleByCameState,
    ScaleBySubsetNormState,
    ScaleByWindowAdamState,
    Window,
    compress,
    decay_updated_weights,
    error_feedback,
    scale_by_adam_mini,
    scale_by_came,
    scale_by_subset_norm,
    scale_by_window_adam,
    to_dense,
)

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "Axes",
    "BlockSparse",
    "Blocks",
    "DecayUpdatedWeightsState",
    "ErrorFeedbackState",
    "Fused",
    "MemoryReport",
    "MicroAdamLayout",
    "Partition",
    "PartitionReport",
    "ScaleByAdamMiniState",
    "ScaleByCameState",
    "ScaleBySubsetNormState",
    "ScaleByWindowAdamState",
    "Subsets",
    "Window",
    "adagrad_sn",
    "adam_mini",
    "adam_sn",
    "affine4",
    "came",
    "compress",
    "decay_updated_weights",
    "error_feedback",
    "explain_partition",
    "memory_report",
    "microadam",
    "model_shapes",
    "scale_by_adam_mini",
    "scale_by_came",
    "scale_by_subset_norm",
    "scale_by_window_adam",
    "to_dense",
    "top_k",
    "transformer_rules",
]
