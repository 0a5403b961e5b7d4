"""Triton's kernels: interpreted on the CPU against the reference, and compiled without a GPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.topk_compress import jax_triton, reference
from tests.pallas_kernels.blocks_of_every_kind import blocks_of, residual_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: make test-targets installs it",
)
ROOT = pathlib.Path(__file__).parents[2]
CASES: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "blocks of 256": ("normal", (3, 1024), 256, 3),
    "padded": ("tied", (3, 700), 256, 3),
    "blocks of 172": ("normal", (3, 344), 172, 2),
    "not finite": ("not finite", (3, 512), 256, 3),
}
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]


def exact(gradient: np.ndarray, residual: Any, k: int) -> list[Any]:
    """The reference, but for divisions, which are NumPy's.

    XLA divides on CPUs by a constant or a broadcast array as it multiplies by its inverse, which
    takes elements halfway between two levels to the other one. Triton divides, and so does XLA on
    GPUs.
    """
    codes, low, high = map(np.asarray, residual)
    half, n = codes.shape[-1], gradient.shape[-1]
    step = (high - low) / np.float32(15)
    level = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32)
    owed = level * step[..., None] + low[..., None]
    in_row = np.arange(low.shape[-1] * 2 * half).reshape(-1, 2 * half) < n
    x = np.pad(gradient, [(0, 0), (0, low.shape[-1] * 2 * half - n)]).reshape(owed.shape)
    x = np.where(in_row, x + owed, np.float32(0))
    zeros = [jnp.zeros_like(y) for y in residual]
    row = jnp.asarray(x.reshape(len(x), -1)[:, :n])
    values, indices, _, low, high = map(np.asarray, reference.compress(row, *zeros, k=k))
    np.put_along_axis(x, indices, np.float32(0), axis=-1)
    x = np.where(in_row, x, x[..., :1])
    with np.errstate(all="ignore"):
        step = (high - low) / np.float32(15)
        usable = ((step > 0) & (step < np.inf))[..., None]
        level = (x - low[..., None]) / np.where(usable, step[..., None], np.float32(1))
        level = np.floor(level + np.float32(0.5)).clip(0, 15)
        level = np.where(usable, level, 0).astype(np.uint8)
    return [values, indices, level[..., :half] | (level[..., half:] << 4), low, high]


def test_interpreted_it_gives_the_bits_of_the_reference(tmp_path: pathlib.Path) -> None:
    wanted = {}
    for name, (kind, shape, size, k) in CASES.items():
        gradient, residual = blocks_of(kind, shape), residual_of(shape, size=size)
        wanted[name] = exact(gradient, residual, k)
        arrays = dict(zip(("codes", "low", "high"), map(np.asarray, residual), strict=True))
        np.savez(tmp_path / f"{name}.npz", gradient=gradient, k=k, **arrays)
    files = [str(tmp_path / f"{name}.npz") for name in CASES]
    command = [sys.executable, "-m", "tests.targets.triton_interpreter", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    for name, file in zip(CASES, files, strict=True):
        found = np.load(file)
        for what, x in zip(
            ("values", "indices", "codes", "low", "high"), wanted[name], strict=True
        ):
            np.testing.assert_array_equal(found[what], x, err_msg=f"{name}: {what}")


@pytest.mark.parametrize("size", [172, 256])
@pytest.mark.parametrize("device", TARGETS, ids=str)
def test_it_compiles_without_a_gpu(device: tuple[str, Any, int], size: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.topk_compress.triton_source import compiled_kernel

    known = jax_triton.constants(43 * size, 43, size // 2, 4096 * 43, 3)
    types = ["*fp32", "*u8", "*fp32", "*fp32", "*fp32", "*i32"]
    pointers = dict(zip(compiled_kernel.arg_names, types, strict=False))
    signature = pointers | dict.fromkeys(known, "constexpr")
    source = ASTSource(compiled_kernel, signature=signature, constexprs=known)
    program = triton.compile(source, target=GPUTarget(*device), options=jax_triton.OPTIONS)
    if device[0] == "cuda":
        text = program.asm["ptx"]
        # Divisions are rounded, and no product is fused with a sum.
        assert "div.rn.f32" in text
        assert "div.full" not in text
        assert "fma" not in text
    else:
        assert program.asm["hsaco"]
        assert ".vgpr_spill_count: 0" in program.asm["amdgcn"]
