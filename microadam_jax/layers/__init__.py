"""Parts that live in a model: layers that keep little for the backward pass.

The modules of Flax NNX are in ``microadam_jax.layers.nnx``: nothing else here needs Flax.
"""

from microadam_jax.layers.backward_updates import UpdateInBackward, update_in_backward
from microadam_jax.layers.compress_residuals import compress_residuals
from microadam_jax.layers.fp8_activation import (
    Fp8Activation,
    Fp8ActivationCodes,
    fp8_activation,
)
from microadam_jax.layers.fp8_elementwise import (
    fp8_multiply,
    fp8_rms_norm,
    fp8_silu,
    fp8_silu_gate,
)
from microadam_jax.layers.fp8_linear import fp8_linear
from microadam_jax.layers.saved_bytes import SavedBytes, saved_bytes

__all__ = [
    "Fp8Activation",
    "Fp8ActivationCodes",
    "SavedBytes",
    "UpdateInBackward",
    "compress_residuals",
    "fp8_activation",
    "fp8_linear",
    "fp8_multiply",
    "fp8_rms_norm",
    "fp8_silu",
    "fp8_silu_gate",
    "saved_bytes",
    "update_in_backward",
]
