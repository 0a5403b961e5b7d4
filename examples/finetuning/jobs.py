"""The protocol of a job, as the training loop uses it."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from microadam_jax.layers.nnx import SideNetwork

from .config import Config

Batch = dict[str, Any]  # arrays with an axis of examples in front


class Job(Protocol):
    """A pretrained model with examples to fine-tune it on.

    A model of a job has its pretrained part under `backbone`, optionally a side network under
    `side`, and new weights, if any, under `head`.
    """

    @property
    def digest(self) -> str:
        """Of examples and weights: runs are only resumed on the same."""
        ...

    def make_model(self, seed: int) -> nnx.Module:
        """Builds the model, with pretrained weights and new ones from a seed."""
        ...

    def make_side(self, config: Config, rngs: nnx.Rngs) -> SideNetwork:
        """Builds the side network for it."""
        ...

    def batch(self, step: int) -> Batch:
        """Draws the examples of a step; equal steps give equal batches."""
        ...

    def held_out_batches(self) -> Batch:
        """A few held-out batches, with an axis for them in front."""
        ...

    def loss(self, model: Any, batch: Batch) -> jax.Array:
        """The mean loss of a batch."""
        ...

    def correct(self, model_of: Any, params: Any) -> list[bool]:
        """Returns True for each held-out example that `model_of(params)` answers correctly."""
        ...


def by_parts(
    function: Callable[..., jax.Array], params: Any, *examples: np.ndarray, rows: int
) -> list[Any]:
    """Calls a compiled function on all examples, a few at a time.

    Args:
        function: From parameters and arrays of `rows` examples to a value for each.
        params: The parameters.
        *examples: Arrays with an axis of examples in front.
        rows: Examples in a part; the last part is padded with zeros.

    Returns:
        The values.
    """
    found: list[Any] = []
    for start in range(0, len(examples[0]), rows):
        parts = [array[start : start + rows] for array in examples]
        count = len(parts[0])
        padded = [np.pad(a, [(0, rows - count), *[(0, 0)] * (a.ndim - 1)]) for a in parts]
        found += np.asarray(function(params, *padded))[:count].tolist()
    return found
