"""The error-feedback step in one pass on GPUs, through jax-triton."""

import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_blocks
from pallas_kernels.topk_compress.triton import unsupported as unsupported_block

WARPS = 4
BROKEN = ("0.4.0", "0.4.1")  # its rule for dead code takes too few arguments for JAX 0.12
# Products and sums round on their own, as in the reference.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


def unsupported(shape: tuple[int, ...], size: int, k: int) -> str | None:
    """Why this kernel cannot run on a tensor of ``shape``, or None."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed: pip install microadam-jax[triton], on Python 3.12"
    version = importlib.metadata.version("jax_triton")
    if jax.__version_info__ >= (0, 12) and version in BROKEN:
        return f"jax-triton {version} cannot be lowered inside jax.jit by JAX {jax.__version__}"
    return unsupported_block(shape, size, k)


def compress(
    gradient: jax.Array,
    codes: jax.Array,
    low: jax.Array,
    high: jax.Array,
    k: int,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`pallas_kernels.topk_compress.reference.compress`.

    Raises:
        NotImplementedError: if asked to interpret: Triton's interpreter is none of JAX's.
    """
    if interpret:
        raise NotImplementedError(
            "A Triton kernel runs on CPUs in Triton's own interpreter, which takes no traced "
            "arrays; tests/targets/triton_interpreter.py runs it. Leave interpret=False."
        )
    import jax_triton

    from pallas_kernels.topk_compress.triton_source import compiled_kernel

    known = constants(gradient.shape[-1], low.shape[-1], codes.shape[-1], low.size, k)
    sent = jax.ShapeDtypeStruct((low.size * k,), jnp.float32)
    flat = gradient.reshape(-1), codes.reshape(-1), low.reshape(-1), high.reshape(-1)
    results = jax_triton.triton_call(
        *flat,
        kernel=compiled_kernel,
        out_type=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[1:]),
            sent,
            sent.update(dtype=jnp.dtype(jnp.int32)),
        ],
        grid=(programs(low.size, codes.shape[-1]),),
        name="topk_compress",
        # Not jax.new_ref, which jax-triton 0.4.1 prefers: JAX 0.12 cannot lower it (a rule of the
        # wrong number of arguments).
        input_output_aliases={1: 0, 2: 1, 3: 2},
        backend_options=OPTIONS,
        **known,
    )
    new = [x.reshape(like.shape) for x, like in zip(results, (codes, low, high), strict=False)]
    values, indices = (x.reshape(*low.shape, k) for x in results[3:])
    return values, indices, new[0], new[1], new[2]


def constants(n: int, count: int, half: int, total: int, k: int) -> dict[str, Any]:
    """Names what the kernel is compiled for.

    Args:
        n: elements in a row.
        count: blocks in a row.
        half: elements in half a block.
        total: blocks in all rows.
        k: selected entries of a block.
    """
    tile = gpu_blocks.per_program(2 * half)
    width = gpu_blocks.padded(half)
    blocks = {"total": total, "count": count, "n": n, "half": half}
    return {**blocks, "width": width, "tile": tile, "k": k}


def programs(total: int, half: int) -> int:
    """Counts the programs that the blocks have."""
    return -(-total // gpu_blocks.per_program(2 * half))
