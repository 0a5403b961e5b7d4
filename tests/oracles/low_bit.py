"""Codecs of few bits in float64 NumPy, from the published formulas; one block at a time."""

import numpy as np


def dynamic_map(bits: int, signed: bool) -> np.ndarray:
    """Decades of twice as many cells each, by their centres; with 0 and 1 (arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for i in range(bits - 1):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = np.linspace(0.1, 1, cells + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - (bits - 2))
        values += [*centres, *(-centres if signed else [])]
    return np.sort(np.asarray(values))


def without_zero(values: np.ndarray) -> np.ndarray:
    """ "DE-0": the entry 0 replaced by its neighbour (arXiv 2309.01507)."""
    return np.where(values == 0, values[1], values)


def symmetric(values: np.ndarray) -> np.ndarray:
    """The positive entries with both signs."""
    positive = values[values > 0]
    return np.sort(np.concatenate([-positive, positive]))


def nearest(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The code of the nearest value by trying them all; halves go to the lower code."""
    return np.abs(y[..., None] - values).argmin(-1)


def scaled(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """A block as it comes back from codes over its largest magnitude."""
    scale = np.abs(block).max(initial=0)
    return block * 0 if scale == 0 else values[nearest(values, block / scale)] * scale


def rank_one(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A matrix as it comes back from codes over the smaller of its row's and column's maximum."""
    magnitude = np.abs(matrix)
    scale = np.minimum(magnitude.max(1, keepdims=True), magnitude.max(0, keepdims=True))
    return values[nearest(values, matrix / np.where(scale > 0, scale, 1))] * scale


def expansion(block: np.ndarray, largest: float) -> tuple[float, float, float]:
    """COAT's exponent, centre and scale of a block (arXiv 2410.19313), zeros passed over."""
    magnitude = np.abs(block[block != 0])
    high, low = magnitude.max(), magnitude.min()
    k = 1.0
    if high > low:
        k = np.floor(16 * np.log2(largest**2 / 2) / np.log2(high / low)) / 16
    k = float(np.clip(k, 1 / 16, 255 / 16)) if high > low else 1.0
    centre = np.sqrt(high) * np.sqrt(low)
    return k, centre, (high / centre) ** k / largest


def adamw(
    grads: list[np.ndarray], params: np.ndarray, rate: float, decay: float, store_mu, store_nu
) -> np.ndarray:
    """AdamW whose moments pass through ``store_mu`` and ``store_nu`` after every step."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    mu, nu = np.zeros_like(params), np.zeros_like(params)
    for t, g in enumerate(grads, 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        step = mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)
        params = params - rate * (step + decay * params)
        mu, nu = store_mu(mu), store_nu(nu)
    return params


def lion(
    grads: list[np.ndarray], params: np.ndarray, rate: float, decay: float, store_mu
) -> np.ndarray:
    """Lion (arXiv 2302.06675) whose momentum passes through ``store_mu`` after every step."""
    b1, b2 = 0.9, 0.99
    mu = np.zeros_like(params)
    for g in grads:
        step = np.sign(b1 * mu + (1 - b1) * g)
        params = params - rate * (step + decay * params)
        mu = store_mu(b2 * mu + (1 - b2) * g)
    return params
