"""Modules of Flax NNX: COAT's layers, with the parameters of NNX's own; NF4; side tuning."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from microadam_jax.layers.fp8_elementwise import fp8_rms_norm, fp8_silu_gate
from microadam_jax.layers.fp8_linear import fp8_linear
from microadam_jax.layers.nf4_nnx import (
    FrozenWeight,
    Nf4Linear,
    quantize_linears,
    replace_linears,
    require_plain_product,
)
from microadam_jax.layers.side_nnx import Adapter, LowRankMap, Pool, SideNetwork

__all__ = [
    "Adapter",
    "Fp8Linear",
    "Fp8RMSNorm",
    "Fp8SwiGLU",
    "FrozenWeight",
    "LowRankMap",
    "Nf4Linear",
    "Pool",
    "SideNetwork",
    "quantize_linears",
    "replace_linears",
]


class Fp8Linear(nnx.Linear):
    """Replaces ``nnx.Linear`` by way of :func:`fp8_linear`.

    The arguments and parameters are those of ``nnx.Linear``; ``dtype`` is that of the outputs, and
    the kernel is quantized from ``param_dtype``. A bias is added in ``dtype``. ``precision`` and
    ``preferred_element_type`` have no effect.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import Fp8Linear
        >>> layer = Fp8Linear(32, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((8, 32)))
        >>> print(y.shape, y.dtype)
        (8, 64) bfloat16

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """

    def __call__(
        self, inputs: jax.Array, out_sharding: NamedSharding | PartitionSpec | None = None
    ) -> jax.Array:
        """Multiplies ``(..., in)`` by the kernel, and adds the bias if there is one.

        Raises:
            ValueError: if the last axis of ``inputs`` is not ``in``, or the layer has a
                ``dot_general`` or a ``promote_dtype`` of its own.
        """
        require_plain_product(self)
        x = inputs.astype(self.dtype or jnp.result_type(inputs, self.kernel[...]))
        y = fp8_linear(x, self.kernel[...], out_sharding=out_sharding)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Fp8RMSNorm(nnx.RMSNorm):
    """Replaces ``nnx.RMSNorm`` over the last axis by way of :func:`fp8_rms_norm`.

    The arguments and parameters are those of ``nnx.RMSNorm``. It has a scale, and takes no mask.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import Fp8RMSNorm
        >>> y = Fp8RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([7.0, -1.0]))
        >>> print(f"{y[0]:.2f} {y[1]:.2f}")
        1.40 -0.20

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """

    def __call__(self, x: jax.Array, mask: None = None) -> jax.Array:
        """Normalizes ``(..., n)``.

        Raises:
            ValueError: if a mask is given, or the layer has no scale or normalizes other axes than
                the last.
        """
        if (
            mask is not None
            or self.scale is None
            or (self.feature_axes, self.reduction_axes) != (-1, -1)
        ):
            raise ValueError(
                "Fp8RMSNorm normalizes the last axis, with a scale and without a mask; got "
                f"use_scale={self.use_scale}, feature_axes={self.feature_axes}, "
                f"reduction_axes={self.reduction_axes}, mask={mask}. Use nnx.RMSNorm for others."
            )
        x = x.astype(self.dtype or jnp.result_type(x, self.scale[...]))
        return fp8_rms_norm(x, self.scale[...], self.epsilon)


class Fp8SwiGLU(nnx.Module):
    r"""Computes COAT's feed-forward layer :math:`(\mathrm{silu}(x W_g) \odot x W_u)\, W_d`.

    The two products of one input share its codes. Saved for each token are ``hidden`` bytes of
    the input, 3.25 ``intermediate`` bytes in between, and nothing in bfloat16.

    Args:
        hidden: channels of input and output.
        intermediate: channels in between.
        dtype: of the outputs; by default that of inputs and parameters.
        param_dtype: of the three kernels ``gate``, ``up`` and ``down``.
        kernel_init: draws them.
        rngs: random numbers for it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from microadam_jax.layers.nnx import Fp8SwiGLU
        >>> Fp8SwiGLU(32, 96, rngs=nnx.Rngs(0))(jnp.ones((8, 32))).shape
        (8, 32)

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the kernels."""

        def linear(n_in: int, n_out: int) -> Fp8Linear:
            return Fp8Linear(
                n_in,
                n_out,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.gate = linear(hidden, intermediate)
        self.up = linear(hidden, intermediate)
        self.down = linear(intermediate, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms ``(..., hidden)``.

        Raises:
            ValueError: if the last axis of ``x`` is not ``hidden``.
        """
        kernels = (self.gate.kernel[...], self.up.kernel[...])
        x = x.astype(self.gate.dtype or jnp.result_type(x, *kernels))
        return self.down(fp8_silu_gate(*fp8_linear(x, kernels)))
