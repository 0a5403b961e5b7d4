"""The links of a chain."""

from microadam_jax.transforms.compress import compress, to_dense
from microadam_jax.transforms.error_feedback import ErrorFeedbackState, error_feedback
from microadam_jax.transforms.window_adam import (
    ScaleByWindowAdamState,
    Window,
    scale_by_window_adam,
)

__all__ = [
    "ErrorFeedbackState",
    "ScaleByWindowAdamState",
    "Window",
    "compress",
    "error_feedback",
    "scale_by_window_adam",
    "to_dense",
]
