"""Inputs that every kernel must treat as its reference does."""

from typing import Any

import jax.numpy as jnp
import numpy as np

SIZE = 256
SHAPES = {
    "one tile": (128, 512),
    "odd rows": (37, 256),
    "many rows": (261, 256),
    "padded": (5, 700),
    "many blocks": (3, 9 * 256),
    "32 blocks": (3, 32 * 256),
    "leading axes": (2, 3, 9, 512),
}
# Blocks that the rule makes of rows of models, as the compiler lays out their codes in each way.
OTHER_SIZES = {
    "172, halves apart": ((2, 9, 5504), 172),
    "192": ((130, 768), 192),
    "228, all of a row": ((3, 2736), 228),
    "one padded block": ((9, 77), 78),
    "500, padded": ((9, 2470), 500),
}


def blocks_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(np.float32)
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "constant":
        return np.full(shape, -0.375, np.float32)
    if kind == "tied":
        return random.integers(-2, 3, shape).astype(np.float32)
    if kind == "huge range":
        return x * np.float32(10) ** random.integers(-37, 37, shape).astype(np.float32)
    if kind == "not finite":
        x[..., 0, 3:5] = np.nan, np.inf
        x[..., -1, 10:17] = np.nan
        x[..., 1, 20:30] = np.inf
        x[..., 2, :30:4] = -np.inf
    return x


KINDS = ("normal", "zero", "constant", "tied", "huge range", "not finite")


def residual_of(shape: tuple[int, ...], seed: int = 1, size: int = SIZE) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    blocks = (*shape[:-1], -(-shape[-1] // size))
    codes = random.integers(0, 256, (*blocks, size // 2), dtype=np.uint8)
    low = random.standard_normal(blocks).astype(np.float32) - 1
    high = low + np.abs(random.standard_normal(blocks).astype(np.float32))
    return jnp.asarray(codes), jnp.asarray(low), jnp.asarray(high)


def window_of(shape: tuple[int, ...], length: int, k: int, seed: int = 0, size: int = SIZE) -> Any:
    random = np.random.default_rng(seed)
    blocks = (*shape[:-1], -(-shape[-1] // size), length)
    # Few of the elements, so that most entries of a window share theirs with another.
    few = np.sort(random.choice(size, 8, replace=False))
    few[-1] = min(100, size - 1)
    indices = random.permuted(np.broadcast_to(few, (*blocks, 8)), axis=-1)[..., :k]
    values = jnp.asarray(random.standard_normal((*blocks, k)), jnp.bfloat16)
    return values, jnp.asarray(indices, jnp.uint8 if size <= SIZE else jnp.int16)
