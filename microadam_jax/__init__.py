"""Memory-efficient optimizers for JAX, as Optax gradient transformations."""

from microadam_jax.aliases import (
    MicroAdamLayout,
    adagrad_sn,
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adam_sn,
    adamw4bit,
    adamw4bit_factored,
    adamw8bit,
    adamw_fp8,
    came,
    microadam,
)
from microadam_jax.axes import Axes, Fused
from microadam_jax.blocks import Blocks
from microadam_jax.codecs import (
    Storage,
    affine4,
    dynamic4,
    dynamic8,
    encoded_bytes,
    float8,
    linear4,
    rank1_dynamic4,
    rank1_linear4,
)
from microadam_jax.compressors import BlockSparse, top_k
from microadam_jax.diagnostics import DiagnosticsState, with_diagnostics
from microadam_jax.layer_names import transformer_rules
from microadam_jax.memory import MemoryReport, memory_report
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.partition import Partition, PartitionReport, explain_partition
from microadam_jax.state_format import require_state_format, state_format
from microadam_jax.state_shardings import state_shardings
from microadam_jax.subsets import Subsets
from microadam_jax.transforms import (
    DecayUpdatedWeightsState,
    ErrorFeedbackState,
    QuantizedState,
    ScaleByAdamMiniState,
    ScaleByCameState,
    ScaleByFactoredAdamState,
    ScaleBySubsetNormState,
    ScaleByWindowAdamState,
    Window,
    compress,
    decay_updated_weights,
    error_feedback,
    quantize_state,
    scale_by_adam_mini,
    scale_by_came,
    scale_by_factored_adam,
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
    "DiagnosticsState",
    "ErrorFeedbackState",
    "Fused",
    "MemoryReport",
    "MicroAdamLayout",
    "Partition",
    "PartitionReport",
    "QuantizedState",
    "ScaleByAdamMiniState",
    "ScaleByCameState",
    "ScaleByFactoredAdamState",
    "ScaleBySubsetNormState",
    "ScaleByWindowAdamState",
    "Storage",
    "Subsets",
    "Window",
    "adagrad_sn",
    "adam_mini",
    "adam_mini4bit",
    "adam_mini8bit",
    "adam_sn",
    "adamw4bit",
    "adamw4bit_factored",
    "adamw8bit",
    "adamw_fp8",
    "affine4",
    "came",
    "compress",
    "decay_updated_weights",
    "dynamic4",
    "dynamic8",
    "encoded_bytes",
    "error_feedback",
    "explain_partition",
    "float8",
    "linear4",
    "memory_report",
    "microadam",
    "model_shapes",
    "quantize_state",
    "rank1_dynamic4",
    "rank1_linear4",
    "require_state_format",
    "scale_by_adam_mini",
    "scale_by_came",
    "scale_by_factored_adam",
    "scale_by_subset_norm",
    "scale_by_window_adam",
    "state_format",
    "state_shardings",
    "to_dense",
    "top_k",
    "transformer_rules",
    "with_diagnostics",
]
