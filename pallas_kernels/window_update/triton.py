"""The window link in one pass on GPUs, through Pallas on Triton.

A program has a few blocks in registers and goes through the entries of their windows, each
compared with every element: sums run in the order of the rows, and no scatter needs atomics.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu_blocks
from pallas_kernels.gpu_blocks import divide, root


def window_update(
    values: jax.Array,
    indices: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.Array,
    *,
    size: int,
    n: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """As :func:`pallas_kernels.window_update.reference.window_update`."""
    *lead, count, length, k = values.shape
    total = math.prod(lead) * count
    kernel = functools.partial(
        _kernel, length=length, k=k, total=total, count=count, n=n, size=size, interpret=interpret
    )
    update = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(total, gpu_blocks.per_program(size)),),
        out_shape=jax.ShapeDtypeStruct((math.prod(lead) * n,), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="window_update",
    )(mu_weights, nu_weights, jnp.reshape(eps, (1,)), values.reshape(-1), indices.reshape(-1))
    return update.reshape(*lead, n)


def _kernel(
    mu_ref,
    nu_ref,
    eps_ref,
    values_ref,
    indices_ref,
    out_ref,
    *,
    length: int,
    k: int,
    total: int,
    count: int,
    n: int,
    size: int,
    interpret: bool,
) -> None:
    tile = gpu_blocks.per_program(size)
    block = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    exists = block < total
    position = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (tile, size))

    def add(entry: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mu, nu = sums
        place = block * (length * k) + entry
        index = plgpu.load(indices_ref.at[place], mask=exists, other=0).astype(jnp.int32)
        value = plgpu.load(values_ref.at[place], mask=exists, other=0.0).astype(jnp.float32)
        here = position == index[:, None]
        mu += jnp.where(here, (value * mu_ref[entry // k])[:, None], 0.0)
        nu += jnp.where(here, (value * value * nu_ref[entry // k])[:, None], 0.0)
        return mu, nu

    nothing = jnp.zeros((tile, size), jnp.float32)
    mu, nu = jax.lax.fori_loop(0, length * k, add, (nothing, nothing))
    # An element that the window lacks has mu = nu = 0: the guard gives 0 even for eps = 0.
    update = jnp.where(nu == 0, 0.0, divide(mu, root(nu, interpret) + eps_ref[0], interpret))
    element, in_row = gpu_blocks.elements(block, position, n, count, size)
    plgpu.store(out_ref.at[element], update.astype(out_ref.dtype), mask=in_row & exists[:, None])
