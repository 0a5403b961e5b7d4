"""MicroAdam (Algorithm 1) and Adam in float64 NumPy, one leaf at a time, from the formulas alone.

Nothing here is fast or shared with the library, on purpose. A sparse window row is a dense array
that is zero off its selection, and the window is a list with its newest row first: the age of a row
is its position in the list, so there is no ring arithmetic to repeat the library's mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
LearningRate = float | Callable[[int], float]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)

HIGHEST_LEVEL = 15  # 4 bits: the levels are 0, 1, ..., 15.


def runs(length: int, size: int) -> list[slice]:
    """Cuts ``range(length)`` into runs of ``size`` elements; the last may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def rounded(values: Floats, dtype: np.dtype[Any]) -> Floats:
    """The float64 values that survive being stored as ``dtype``."""
    return values.astype(dtype).astype(np.float64)


def largest_magnitudes(values: Floats, count: int) -> Indices:
    """Indices of the ``count`` largest magnitudes, largest first; equal ones in order of index."""
    return np.argsort(-np.abs(values), kind="stable")[:count]


@dataclass(frozen=True)
class AffineCodes:
    """One bucket in 4 bits: ``low + level * unit``."""

    levels: npt.NDArray[np.uint8]
    low: float
    unit: float

    def decode(self) -> Floats:
        return self.low + self.levels * self.unit


def encode(bucket: Floats, statistics: np.dtype[Any] = FLOAT64) -> AffineCodes:
    r"""Quantizes a bucket between its minimum :math:`\delta` and its maximum :math:`\Delta`.

    .. math::

        u = (\Delta - \delta) / 15, \qquad
        \text{level} = \lfloor (x - \delta) / u + 1/2 \rfloor.

    The clamp acts only where rounding to ``statistics`` has moved the bounds inwards.
    """
    low, high = (float(rounded(bound, statistics)) for bound in (bucket.min(), bucket.max()))
    unit = (high - low) / HIGHEST_LEVEL
    if unit == 0:
        return AffineCodes(np.zeros(bucket.shape, np.uint8), low, unit)
    levels = np.floor((bucket - low) / unit + 0.5).clip(0, HIGHEST_LEVEL)
    return AffineCodes(levels.astype(np.uint8), low, unit)


def adam_stats(beta: float, window: list[Floats], step: int, *, normalized: bool = False) -> Floats:
    r"""AdamStats: the moment estimate of a window whose newest row comes first.

    .. math::

        \frac{1 - \beta}{1 - \beta^t} \sum_r \beta^r V_r
        \quad \text{or, normalized,} \quad
        \frac{\sum_r \beta^r V_r}{\sum_r \beta^r}

    over the filled rows of age :math:`r`. The two agree until the window is full; afterwards the
    true :math:`t` keeps shrinking the literal weights although the sum stays truncated.
    """
    ages = np.arange(len(window))
    total = np.tensordot(beta**ages, np.stack(window), axes=1)
    if normalized:
        return total / np.sum(beta**ages)
    return (1 - beta) * total / (1 - beta**step)


def rate_at(learning_rate: LearningRate, step: int) -> float:
    """The rate of the 1-based ``step``; a schedule counts from 0, as Optax's do."""
    return learning_rate(step - 1) if callable(learning_rate) else learning_rate


@dataclass
class AdamOracle:
    """Adam with decoupled weight decay: bias-corrected moments, eps outside the root.

    Attributes:
        theta: the parameter, which starts as ``params`` and is moved by every step.
        learning_rate: a number, or a function of the 0-based step.
    """

    params: InitVar[npt.ArrayLike]
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.mu, self.nu = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self.count = 0

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        gradient = np.asarray(grads, np.float64)
        self.count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * gradient
        self.nu = self.b2 * self.nu + (1 - self.b2) * gradient**2
        mean = self.mu / (1 - self.b1**self.count)
        variance = self.nu / (1 - self.b2**self.count)
        direction = mean / (np.sqrt(variance) + self.eps) + self.weight_decay * self.theta
        update = -rate_at(self.learning_rate, self.count) * direction
        self.theta = self.theta + update
        return update


@dataclass
class MicroAdamOracle:
    r"""MicroAdam for one leaf ``(*lead, n)``, cut into blocks along its last axis.

    With :math:`a = g_t + Q^{-1}(e_t)`, whose top entries per block enter the window, and
    :math:`e' = Q^{-1}(e_{t+1})` what the 4-bit code keeps of the others,

    .. math::

        \theta_{t+1} &= (1 - \eta \lambda) \theta_t - \eta \left(
            \frac{\hat m_t}{\epsilon + \sqrt{\hat v_t}} + \alpha e' \right) \\
        e_{t+1} &\leftarrow Q((1 - \alpha) e')

    Attributes:
        theta: the parameter, which starts as ``params`` (of any rank, any size) and is moved by
            every step.
        block_size: elements per block; the last block of a row may be shorter.
        count: survivors per block, or a function from a block's length to them.
        bucket: elements sharing quantizer statistics; the last bucket of a block may be shorter.
        quantize: whether the error is stored in 4 bits, or exactly.
        window: rows of the sliding window.
        learning_rate: a number, or a function of the 0-based step.
        alpha: share of the stored error that joins each update past the preconditioner; 0 in
            the paper.
        value_dtype: format of the window's values.
        statistics_dtype: format of the quantizer's minimum and maximum.
        normalized: whether window weights sum to one, instead of the literal 1 - beta^t.
        error: what the optimizer believes it has not sent, decoded, in the shape of ``theta``.
        rows: the window, newest row first; each is dense, and zero off its selection.
        selections: per step, per block in row-major order: block-local indices, largest first.
    """

    params: InitVar[npt.ArrayLike]
    block_size: int
    count: int | Callable[[int], int]
    bucket: int = 256
    quantize: bool = True
    window: int = 10
    learning_rate: LearningRate = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    alpha: float = 0.0
    value_dtype: np.dtype[Any] = FLOAT64
    statistics_dtype: np.dtype[Any] = FLOAT64
    normalized: bool = False
    error: Floats = field(init=False)
    rows: list[Floats] = field(init=False, default_factory=list)
    selections: list[list[Indices]] = field(init=False, default_factory=list)

    def __post_init__(self, params: npt.ArrayLike) -> None:
        self.theta: Floats = np.array(params, np.float64)
        self.error = np.zeros_like(self.theta)

    def step(self, grads: npt.ArrayLike) -> Floats:
        """Takes one step and returns what it added to ``theta``."""
        accumulated = np.asarray(grads, np.float64) + self.error
        sent = self._send(accumulated)
        self.error = self._stored(accumulated - sent)
        self.rows = [rounded(sent, self.value_dtype), *self.rows][: self.window]

        step = len(self.selections)
        squares = [row**2 for row in self.rows]
        mean = adam_stats(self.b1, self.rows, step, normalized=self.normalized)
        variance = adam_stats(self.b2, squares, step, normalized=self.normalized)
        direction = mean / (np.sqrt(variance) + self.eps) + self.weight_decay * self.theta
        if self.alpha:
            direction = direction + self.alpha * self.error
            self.error = self._stored((1 - self.alpha) * self.error)
        update = -rate_at(self.learning_rate, step) * direction
        self.theta = self.theta + update
        return update

    def add(self, share: npt.ArrayLike) -> None:
        """Adds a micro-batch's share of the gradient to the error, and takes no step."""
        self.error = self._stored(np.asarray(share, np.float64) + self.error)

    def _blocks(self, *arrays: Floats) -> Iterator[tuple[Floats, ...]]:
        """Yields, block by block, writable views into leaf-shaped contiguous arrays."""
        *lead, length = self.theta.shape or (1,)
        views = [array.reshape(math.prod(lead), length) for array in arrays]
        for row in range(math.prod(lead)):
            for run in runs(length, self.block_size):
                yield tuple(view[row, run] for view in views)

    def _send(self, accumulated: Floats) -> Floats:
        """The top entries of every block, dense; records where they were."""
        sent = np.zeros_like(accumulated)
        selection = []
        for source, target in self._blocks(accumulated, sent):
            count = self.count(source.size) if callable(self.count) else self.count
            indices = largest_magnitudes(source, count)
            target[indices] = source[indices]
            selection.append(indices)
        self.selections.append(selection)
        return sent

    def _stored(self, residual: Floats) -> Floats:
        """What decoding the stored error will give back."""
        if not self.quantize:
            return residual
        stored = np.zeros_like(residual)
        for source, target in self._blocks(residual, stored):
            for run in runs(source.size, self.bucket):
                target[run] = encode(source[run], self.statistics_dtype).decode()
        return stored
