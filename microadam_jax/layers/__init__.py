"""Parts that live in a model: layers that keep little for the backward pass.

The modules of Flax NNX are in ``microadam_jax.layers.nnx``: nothing else here needs Flax.
"""

from microadam_jax.layers.backward_updates import UpdateInBackward, update_in_backward
from microadam_jax.layers.compress_residuals import compress_residuals
from microadam_jax.layers.fp8_activation import Fp8Activation, Fp8ActivationCodes, fp8_activation
from microadam_jax.layers.fp8_elementwise import fp8_multiply, fp8_rms_norm, fp8_silu, fp8_silu_gate
from microadam_jax.layers.fp8_linear import fp8_linear
from microadam_jax.layers.head_loss import chunked_cross_entropy
from microadam_jax.layers.nf4_linear import nf4_linear
from microadam_jax.layers.saved_bytes import SavedBytes, saved_bytes
from microadam_jax.layers.side_network import (
    adapter,
    average_pool,
    fuse,
    low_rank,
    max_pool,
    mix_hidden_states,
)

__all__ = [
    "Fp8Activation",
    "Fp8ActivationCodes",
    "SavedBytes",
    "UpdateInBackward",
    "adapter",
    "average_pool",
    "chunked_cross_entropy",
    "compress_residuals",
    "fp8_activation",
    "fp8_linear",
    "fp8_multiply",
    "fp8_rms_norm",
    "fp8_silu",
    "fp8_silu_gate",
    "fuse",
    "low_rank",
    "max_pool",
    "mix_hidden_states",
    "nf4_linear",
    "saved_bytes",
    "update_in_backward",
]
