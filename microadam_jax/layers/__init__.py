"""Parts that live in a model: layers that keep little for the backward pass."""

from microadam_jax.layers.compress_residuals import compress_residuals
from microadam_jax.layers.fp8_activation import (
    Fp8Activation,
    Fp8ActivationCodes,
    fp8_activation,
)
from microadam_jax.layers.saved_bytes import SavedBytes, saved_bytes

__all__ = [
    "Fp8Activation",
    "Fp8ActivationCodes",
    "SavedBytes",
    "compress_residuals",
    "fp8_activation",
    "saved_bytes",
]
