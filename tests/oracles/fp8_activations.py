"""COAT's activations in float64 NumPy, from the paper (arXiv 2410.19313, Section 5).

Where the released code differs from this: it adds 1e-10 to the largest magnitude, and rounds the
scales of groups to the nearest bfloat16 and not up, so that the largest element is clipped.
"""

import ml_dtypes
import numpy as np

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
MANTISSA = {"e4m3": 3, "e5m2": 2}
LOWEST = {"e4m3": -6, "e5m2": -14}


def numbers(format: str) -> np.ndarray:  # noqa: A002
    """The magnitudes of a format in the order of their codes, from the definition of a float."""
    m, low = MANTISSA[format], LOWEST[format]
    found = []
    for code in range(128):
        e, f = code >> m, code % 2**m
        found.append(2.0 ** (e - 1 + low) * (1 + f / 2**m) if e else 2.0**low * f / 2**m)
    return np.array([x for x in found if x <= LARGEST[format]])


def nearest(y: np.ndarray, format: str) -> np.ndarray:  # noqa: A002
    """The codes nearest to numbers within the format, halves to the even code."""
    distance = np.abs(np.abs(y)[..., None] - numbers(format))
    code = np.argmin(distance, axis=-1)
    above = np.minimum(code + 1, distance.shape[-1] - 1)
    at_code, at_above = (
        np.take_along_axis(distance, index[..., None], -1)[..., 0] for index in (code, above)
    )
    code = np.where((at_code == at_above) & (code % 2 == 1), above, code)
    return np.where(y < 0, code + 128, code)


def value(code: np.ndarray, format: str) -> np.ndarray:  # noqa: A002
    table = numbers(format)
    return np.where(code < 128, 1.0, -1.0) * table[code % 128]


def up_to_bfloat16(s: np.ndarray) -> np.ndarray:
    rounded = s.astype(ml_dtypes.bfloat16)
    above = np.nextafter(rounded, ml_dtypes.bfloat16(np.inf))
    return np.where(rounded.astype(np.float64) < s, above, rounded).astype(np.float64)


def quantized(x: np.ndarray, format: str = "e4m3", group: int | None = 16) -> np.ndarray:  # noqa: A002
    """Returns what comes back of an array: with a bfloat16 scale for a group, or one for all."""
    x = np.asarray(x, np.float64)
    if group is None:
        s = np.float64(np.float32(np.abs(x).max() / LARGEST[format]))
        y = np.clip(x / s, -LARGEST[format], LARGEST[format]) if s else x
        return value(nearest(y, format), format) * s
    out = np.zeros_like(x)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group]
        s = up_to_bfloat16(np.abs(part).max(axis=-1, keepdims=True) / LARGEST[format])
        y = part / np.where(s > 0, s, 1)
        out[..., start : start + group] = value(nearest(y, format), format) * s
    return out


def linear(x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """COAT's linear map of a matrix of inputs: output, and gradients of input and weight."""
    qx, qw, qdy = (
        quantized(x, "e4m3", None),
        quantized(w, "e4m3", None),
        quantized(dy, "e5m2", None),
    )
    return qx @ qw, qdy @ qw.T, qx.T @ qdy


def rms_norm(
    x: np.ndarray, scale: np.ndarray, dy: np.ndarray, epsilon: float
) -> tuple[np.ndarray, ...]:
    """Output, and gradients of input and scale, by the Jacobian of each row."""
    q, dx = quantized(x), []
    r = 1 / np.sqrt(np.mean(q**2, axis=-1, keepdims=True) + epsilon)
    for row, inverse, slope in zip(q, r, dy * scale, strict=True):
        jacobian = inverse * np.eye(len(row)) - inverse**3 * np.outer(row, row) / len(row)
        dx.append(jacobian @ slope)
    return q * r * scale, np.stack(dx), np.sum(dy * q * r, axis=0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def silu_slope(x: np.ndarray) -> np.ndarray:
    s = 1 / (1 + np.exp(-x))
    return s + x * s * (1 - s)


def silu_gate(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Output, and gradients of gate and up."""
    qg, qu = quantized(gate), quantized(up)
    qs = quantized(silu(qg))
    return qs * qu, dy * qu * silu_slope(qg), dy * qs
