"""The links of a chain."""

from microadam_jax.transforms.accumulate import (
    AccumulateIntoResidualState,
    accumulate_into_residual,
)
from microadam_jax.transforms.adam_mini import ScaleByAdamMiniState, scale_by_adam_mini
from microadam_jax.transforms.came import ScaleByCameState, scale_by_came
from microadam_jax.transforms.compress import CompressState, compress, to_dense
from microadam_jax.transforms.decay import DecayUpdatedWeightsState, decay_updated_weights
from microadam_jax.transforms.error_feedback import ErrorFeedbackState, error_feedback
from microadam_jax.transforms.factored_adam import ScaleByFactoredAdamState, scale_by_factored_adam
from microadam_jax.transforms.fused_apply import fused_apply
from microadam_jax.transforms.ggt import scale_by_ggt
from microadam_jax.transforms.gram_window import GramWindowState
from microadam_jax.transforms.matrix_momentum import MatrixMomentumState
from microadam_jax.transforms.mfac import scale_by_mfac
from microadam_jax.transforms.muon import scale_by_muon
from microadam_jax.transforms.project_gradients import ProjectGradientsState, project_gradients
from microadam_jax.transforms.quantize import QuantizedState, quantize_state
from microadam_jax.transforms.restartable_adam import (
    ScaleByRestartableAdamState,
    scale_by_restartable_adam,
)
from microadam_jax.transforms.round_updates import RoundUpdatesState, round_updates
from microadam_jax.transforms.sinkhorn import scale_by_sinkhorn
from microadam_jax.transforms.subset_norm import ScaleBySubsetNormState, scale_by_subset_norm
from microadam_jax.transforms.subspace_momentum import SubspaceMomentumState, subspace_momentum
from microadam_jax.transforms.uncorrected_adam import (
    CorrectBiasState,
    ScaleByUncorrectedAdamState,
    correct_bias,
    scale_by_uncorrected_adam,
)
from microadam_jax.transforms.window import Window
from microadam_jax.transforms.window_adam import ScaleByWindowAdamState, scale_by_window_adam

__all__ = [
    "AccumulateIntoResidualState",
    "CompressState",
    "CorrectBiasState",
    "DecayUpdatedWeightsState",
    "ErrorFeedbackState",
    "GramWindowState",
    "MatrixMomentumState",
    "ProjectGradientsState",
    "QuantizedState",
    "RoundUpdatesState",
    "ScaleByAdamMiniState",
    "ScaleByCameState",
    "ScaleByFactoredAdamState",
    "ScaleByRestartableAdamState",
    "ScaleBySubsetNormState",
    "ScaleByUncorrectedAdamState",
    "ScaleByWindowAdamState",
    "SubspaceMomentumState",
    "Window",
    "accumulate_into_residual",
    "compress",
    "correct_bias",
    "decay_updated_weights",
    "error_feedback",
    "fused_apply",
    "project_gradients",
    "quantize_state",
    "round_updates",
    "scale_by_adam_mini",
    "scale_by_came",
    "scale_by_factored_adam",
    "scale_by_ggt",
    "scale_by_mfac",
    "scale_by_muon",
    "scale_by_restartable_adam",
    "scale_by_sinkhorn",
    "scale_by_subset_norm",
    "scale_by_uncorrected_adam",
    "scale_by_window_adam",
    "subspace_momentum",
    "to_dense",
]
