"""NF4 with double quantization in float64 NumPy, from QLoRA (arXiv 2305.14314), Section 3."""

from statistics import NormalDist

import numpy as np

from tests.oracles.low_bit import dynamic_map, nearest


def levels() -> np.ndarray:
    """Quantiles of a normal distribution, eight above 0 and seven below, so that 0 is a level.

    The largest probability, 0.9677083, is the mean of 1 - 1/30 and 1 - 1/32 in the released code.
    """
    quantile = np.vectorize(NormalDist().inv_cdf)
    above = quantile(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -quantile(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([above, below, [0.0]]))
    return values / values.max()


def quantize(
    weights: np.ndarray, block: int = 64, group: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of flat weights, one a weight, and the scale of each block as restored.

    Codes are of the exact scales; only decoding sees the quantized ones. Scales are quantized
    around their mean over the whole tensor.
    """
    blocks = weights.reshape(-1, block)
    scales = np.abs(blocks).max(1)
    y = blocks / np.where(scales > 0, scales, 1)[:, None]
    codes = nearest(levels(), y)
    mean = scales.mean()
    restored = np.empty_like(scales)
    for start in range(0, len(scales), group):
        part = scales[start : start + group] - mean
        largest = np.abs(part).max()
        map8 = dynamic_map(8, True)
        level = map8[nearest(map8, part / largest)] if largest > 0 else part * 0
        restored[start : start + group] = level * largest + mean
    return codes.reshape(-1), restored


def round_trip(weights: np.ndarray) -> np.ndarray:
    """Returns flat weights as they come back."""
    codes, scales = quantize(weights)
    return (levels()[codes].reshape(-1, 64) * scales[:, None]).reshape(-1)
