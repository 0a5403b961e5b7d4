"""The window link in one pass on GPUs, through Pallas on Triton.

A program has a few blocks in registers and goes through the entries of their windows, each
compared with every element: sums run in the order of the rows, and no scatter needs atomics.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu_blocks
from pallas_kernels.gpu_blocks import divide, root
from pallas_kernels.window_update.descent import descent


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
    scalars = mu_weights, nu_weights, jnp.reshape(eps, (1,))
    result = jax.ShapeDtypeStruct((*values.shape[:-3], n), dtype)
    return _call("window_update", _update_kernel, scalars, values, indices, result, size, interpret)


def window_apply(
    values: jax.Array,
    indices: jax.Array,
    params: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.Array,
    step: jax.Array,
    decay: jax.Array | None = None,
    *,
    size: int,
    interpret: bool = False,
) -> jax.Array:
    """As the reference; ``params`` are updated in place."""
    each = [eps, step, jnp.zeros_like(step) if decay is None else decay]
    scalars = mu_weights, nu_weights, jnp.stack([x.astype(jnp.float32) for x in each])
    kernel = functools.partial(_apply_kernel, decays=decay is not None)
    result = jax.ShapeDtypeStruct(params.shape, params.dtype)
    return _call("window_apply", kernel, scalars, values, indices, result, size, interpret, params)


def _call(
    name: str,
    kernel: Callable[..., None],
    scalars: tuple[jax.Array, ...],
    values: jax.Array,
    indices: jax.Array,
    result: jax.ShapeDtypeStruct,
    size: int,
    interpret: bool,
    *in_place: jax.Array,
) -> jax.Array:
    """Runs ``kernel`` on each few blocks of a window and of the ``(*lead, n)`` result."""
    *_, count, length, k = values.shape
    total, n = math.prod(result.shape[:-1]) * count, result.shape[-1]
    layout = {"k": k, "total": total, "count": count, "n": n, "size": size}
    flat = (x.reshape(-1) for x in (values, indices, *in_place))
    moved = pl.pallas_call(
        functools.partial(kernel, length=length, **layout, interpret=interpret),
        grid=(pl.cdiv(total, gpu_blocks.per_program(size)),),
        out_shape=jax.ShapeDtypeStruct((result.size,), result.dtype),
        input_output_aliases={len(scalars) + 2: 0} if in_place else {},
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=name,
    )(*scalars, *flat)
    return moved.reshape(result.shape)


def _update_kernel(mu_ref, nu_ref, eps_ref, values_ref, indices_ref, out_ref, **layout) -> None:
    window = mu_ref, nu_ref, eps_ref, values_ref, indices_ref
    update, element, in_row = _direction(*window, **layout)
    plgpu.store(out_ref.at[element], update.astype(out_ref.dtype), mask=in_row)


def _apply_kernel(
    mu_ref,
    nu_ref,
    scalars_ref,
    values_ref,
    indices_ref,
    params_ref,
    out_ref,
    *,
    decays: bool,
    **layout,
) -> None:
    window = mu_ref, nu_ref, scalars_ref, values_ref, indices_ref
    update, element, in_row = _direction(*window, **layout)
    step, decay = scalars_ref[1], scalars_ref[2] if decays else None
    params = plgpu.load(params_ref.at[element], mask=in_row, other=0.0).astype(jnp.float32)
    moved = params + descent(update, params, step, decay)
    plgpu.store(out_ref.at[element], moved.astype(out_ref.dtype), mask=in_row)


def _direction(
    mu_ref,
    nu_ref,
    eps_ref,
    values_ref,
    indices_ref,
    *,
    length: int,
    k: int,
    total: int,
    count: int,
    n: int,
    size: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a program's blocks ``(blocks, width)``: the direction, where it lies, and what exists."""
    tile = gpu_blocks.per_program(size)
    block = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    exists = block < total
    width = gpu_blocks.padded(size)  # positions from size on are in no window
    position = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (tile, width))

    def add(entry: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mu, nu = sums
        place = block * (length * k) + entry
        index = plgpu.load(indices_ref.at[place], mask=exists, other=0).astype(jnp.int32)
        value = plgpu.load(values_ref.at[place], mask=exists, other=0.0).astype(jnp.float32)
        here = position == index[:, None]
        mu += jnp.where(here, (value * mu_ref[entry // k])[:, None], 0.0)
        nu += jnp.where(here, (value * value * nu_ref[entry // k])[:, None], 0.0)
        return mu, nu

    nothing = jnp.zeros((tile, width), jnp.float32)
    mu, nu = jax.lax.fori_loop(0, length * k, add, (nothing, nothing))
    # An element that the window lacks has mu = nu = 0: the guard gives 0 even for eps = 0.
    update = jnp.where(nu == 0, 0.0, divide(mu, root(nu, interpret) + eps_ref[0], interpret))
    element, in_row = gpu_blocks.elements(block, position, n, count, size)
    return update, element, in_row & exists[:, None]
