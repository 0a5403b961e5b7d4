"""Gradients of matrices, whose singular values differ."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.oracles.microadam import Floats

SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def gradients(shape: tuple[int, ...], seed: int = 0) -> Iterator[Floats]:
    """Gradients with a mean and singular values of their own, so that no basis is arbitrary."""
    random = np.random.default_rng(seed)
    rank = min(shape[-2:])
    while True:
        left, right = (random.standard_normal((*shape[:-2], n, rank)) for n in shape[-2:])
        spectrum = 0.6 ** np.arange(rank)
        noise = random.standard_normal(shape)
        yield (left * spectrum) @ np.swapaxes(right, -2, -1) + 0.3 + 0.05 * noise
