"""Quantized Side Tuning in float64 NumPy, from the paper's Section 3 (arXiv 2401.07159)."""

from collections.abc import Callable, Sequence

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def pool(h: np.ndarray, r: int, kind: str) -> np.ndarray:
    groups = h.reshape(*h.shape[:-1], -1, r)
    return groups.max(-1) if kind == "max" else groups.mean(-1)


def low_rank(h: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return h @ a @ b


def adapter(h: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the layer norm after it of the released code, at its start: no scale, no bias."""
    inner = h @ a
    y = inner * sigmoid(inner) @ b
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def side_network(
    hidden: Sequence[np.ndarray],
    downs: Sequence[Callable[[np.ndarray], np.ndarray]],
    layers: Sequence[Callable[[np.ndarray], np.ndarray]],
    gammas: Sequence[np.ndarray],
) -> np.ndarray:
    """Returns the last side state; `downs` has one more entry than there are layers."""
    side = downs[0](hidden[0])
    for h, down, layer, gamma in zip(hidden[1:], downs[1:], layers, gammas, strict=True):
        beta = sigmoid(gamma)
        side = layer((1 - beta) * down(h) + beta * side)
    return side


def mix(backbone: np.ndarray, up: np.ndarray, alpha: np.ndarray, kind: str) -> np.ndarray:
    if kind == "residual":
        return backbone + up
    alpha = sigmoid(alpha) if kind == "released" else alpha
    return alpha * backbone + (1 - alpha) * up
