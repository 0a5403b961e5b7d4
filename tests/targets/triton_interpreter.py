"""Runs a Triton kernel on NumPy arrays in Triton's interpreter, which expects PyTorch's tensors.

As a program it compresses what a file holds: Triton must be told before it is imported that it
shall interpret, and could not compile any more in the same process.

TRITON_INTERPRET=1 python -m tests.targets.triton_interpreter case.npz ...
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


class Memory:
    """Answers what the interpreter asks of a tensor, for an array that is on the CPU already."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Memory":
        return self

    def cpu(self) -> "Memory":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "Memory":
        return Memory(self.array)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def set_(self, *_: Any) -> None:
        """It is the same memory."""

    def copy_(self, _: Any) -> None:
        """It is the same memory."""


def interpret(
    kernel: Callable[..., None], grid: tuple[int, ...], *arrays: np.ndarray, **constants: Any
) -> None:
    """Runs a kernel, which writes to some of the arrays.

    Args:
        kernel: the Python function, before ``triton.jit``.
        grid: how many programs there are along each axis.
        arrays: its pointers, C-contiguous.
        constants: its other arguments.
    """
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction(kernel)[grid](*map(Memory, arrays), **constants)


def main() -> None:
    """Compresses the gradient and the residual of each file, and adds the results to it."""
    from pallas_kernels.topk_compress.jax_triton import constants, programs
    from pallas_kernels.topk_compress.triton_source import compress_kernel

    for path in sys.argv[1:]:
        case = dict(np.load(path))
        codes, low, high = (case[name].copy() for name in ("codes", "low", "high"))
        total, half, k = low.size, codes.shape[-1], int(case["k"])
        values, indices = np.zeros((*low.shape, k), np.float32), np.zeros((*low.shape, k), np.int32)
        arrays = case["gradient"], codes, low, high, values, indices
        known = constants(case["gradient"].shape[-1], low.shape[-1], half, total, k)
        interpret(compress_kernel, (programs(total, half),), *arrays, **known)
        np.savez(path, values=values, indices=indices, codes=codes, low=low, high=high)


if __name__ == "__main__":
    main()
